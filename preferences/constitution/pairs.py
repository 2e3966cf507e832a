"""Step ``pairs`` of the source ``constitution``: do the steps, filter, write pairs with their provenance."""

import dataclasses
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import fingerprint_file, write_json, write_jsonl
from ppo_vs_dpo.artifacts.stage import StageContext
from ppo_vs_dpo.models.sampling.generation import SamplingConfig
from ppo_vs_dpo.models.training import model_settings
from ppo_vs_dpo.preferences.config import ConstitutionalPairs
from ppo_vs_dpo.preferences.constitution.asking import (
    Item,
    Runner,
    all_steps,
    compare_samples,
    critique_and_revise,
    load_items,
    position_bias,
    preference_log_odds,
    soft_label,
)
from ppo_vs_dpo.preferences.constitution.endpoints import load_model
from ppo_vs_dpo.preferences.constitution.principles import load_constitution, load_few_shot
from ppo_vs_dpo.preferences.reading.parquet import (
    TableWriter,
    example_schema,
    pair_schema,
    read_rows,
    without_empty_columns,
)
from ppo_vs_dpo.preferences.recipes.steplog import StepLog
from ppo_vs_dpo.preferences.rejection.pairs import identity_of, policy_path
from ppo_vs_dpo.preferences.schema import OPTIONAL, as_answer, make_pair, pair_set

# Openings of answers that only refuse. A revision of this kind teaches to refuse, not to answer better.
REFUSAL = re.compile(
    r"^\W*(i('m| am) (very |so |really )?(sorry|afraid)|sorry\b|i (can'?t|cannot|can not|won'?t|will not|am unable|"
    r"am not able)|i'm (unable|not able)|as an ai\b|unfortunately, i (can'?t|cannot))",
    re.IGNORECASE,
)


def pairs_step(context: StageContext, settings: ConstitutionalPairs) -> None:
    """Write ``pairs/{train,test}.parquet``, ``provenance_*.jsonl``, ``revisions_*.parquet`` and a report."""
    context.run.require("data")
    principles = load_constitution(settings.constitution)
    few_shot = load_few_shot(settings.few_shot)
    splits = [name for name in ("train", "test") if context.run.path("data", f"prompts_{name}.parquet").is_file()]
    identity = [
        identity_of(context, settings, settings.helper.model or "sft"),
        [dataclasses.asdict(principle) for principle in principles],
        fingerprint_file(settings.few_shot) if settings.few_shot else None,
    ]
    # 1. Who answers, criticises and judges. Equal settings share one model.
    helper, critic, judge = _models(context, settings)
    logs = {name: StepLog.of(context.run, "steps", name, identity) for name in splits}
    items = {
        name: load_items(read_rows(context.run.path("data", f"prompts_{name}.parquet")), logs[name]) for name in splits
    }
    total = sum(map(len, items.values())) * len(all_steps(settings.mode, settings.rounds, settings.chain_of_thought))
    # 2. Do what the logs lack.
    done = 0
    for name in splits:
        runner = Runner(
            logs[name], context.seed, settings.batch, lambda done, what: context.progress(done, total, what), done
        )
        if settings.mode in ("revision", "both"):
            critique_and_revise(
                items[name], runner, helper, critic, principles, settings.rounds, few_shot, settings.system
            )
        if settings.mode in ("feedback", "both"):
            compare_samples(items[name], runner, helper, judge, principles, settings.chain_of_thought, settings.system)
        done = runner.done
    # 3. Filter and write.
    report = Tally(settings)
    ids = {name: _write(context, settings, name, items[name], report) for name in splits}
    write_json(context.dir / "report.json", report.as_dict())
    if not ids["train"]:
        raise UserError(
            f"no pair came out of {len(items['train'])} prompts; left out: {dict(report.left_out) or 'none'} "
            f"({context.dir / 'report.json'}). Try another critic, more data.rounds or a larger data.max_new_tokens."
        )
    context.finish(
        pair_set=pair_set(ids),
        mode=settings.mode,
        constitution=settings.constitution,
        **report.as_dict(),
    )


def _models(context: StageContext, settings: ConstitutionalPairs):
    sampling = SamplingConfig(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        batch_size=min(settings.generation_batch_size, settings.batch),
    )
    config = model_settings(context)
    loaded: dict[str, Any] = {}

    def load(endpoint):
        key = repr(endpoint)
        if key not in loaded:
            own = endpoint.kind == "local" and endpoint.model is None
            policy = policy_path(context, None) if own else ""
            loaded[key] = load_model(endpoint, sampling, policy, config)
        return loaded[key]

    needs_critic, needs_judge = settings.mode != "feedback", settings.mode != "revision"
    return (
        load(settings.helper),
        load(settings.critic) if needs_critic else None,
        load(settings.judge) if needs_judge else None,
    )


class Tally:
    """What became of each prompt, by principle."""

    def __init__(self, settings: ConstitutionalPairs):
        self.settings = settings
        self.left_out: Counter[str] = Counter()
        self.principles: dict[str, Counter[str]] = {}
        self.biases: list[float] = []
        self.labels: list[float] = []
        self.clamped = 0

    def note(self, principle: str, outcome: str) -> None:
        """Count an outcome (``pair``, or why there is none) under a principle."""
        self.principles.setdefault(principle, Counter())[outcome] += 1
        if outcome != "pair":
            self.left_out[outcome] += 1

    def as_dict(self) -> dict[str, Any]:
        """For ``report.json`` and ``done.json``."""
        result: dict[str, Any] = {
            "left_out": dict(self.left_out),
            "principles": {name: dict(counts) for name, counts in sorted(self.principles.items())},
        }
        if self.biases:
            result["position_bias"] = float(np.mean(self.biases))
        if self.labels:
            result["mean_soft_label"] = float(np.mean(self.labels))
            result["clamped_labels"] = self.clamped
        return result


def why_not(original: dict[str, Any], revision: dict[str, Any], max_growth: float) -> str | None:
    """Why a revision makes no pair, or ``None``."""
    before, after = original["text"].split(), revision["text"].split()
    if not before or not after:
        return "empty"
    if before == after:
        return "unchanged"
    if REFUSAL.match(revision["text"]):
        return "refusal"
    if not revision["finished"] or len(after) > max_growth * max(len(before), 10):
        return "runaway"
    return None


def _revision_pair(item: Item, settings: ConstitutionalPairs, tally: Tally) -> tuple[dict, dict] | None:
    """(pair, provenance) of original against last revision."""
    rounds = range(1, settings.rounds + 1)
    original, revision = item.steps["answer", 0], item.steps["revision", settings.rounds]
    principles = [item.steps["revision", round]["principle"] for round in rounds]
    reason = why_not(original, revision, settings.max_growth)
    tally.note(principles[-1], reason or "pair")
    if reason is not None:
        return None
    pair = make_pair(item.prompt, as_answer(item.prompt, revision["text"]), as_answer(item.prompt, original["text"]))
    return pair, {
        "kind": "revision",
        "principles": principles,
        "critiques": [item.text("critique", round) for round in rounds],
        "revisions": [item.text("revision", round) for round in rounds],
    }


def _feedback_pair(item: Item, settings: ConstitutionalPairs, tally: Tally) -> tuple[dict, dict] | None:
    """(pair, provenance) of two samples and the judge's soft label."""
    samples = [item.steps["sample", draw] for draw in (0, 1)]
    if ("choice", 0) not in item.steps:
        tally.left_out["equal samples"] += 1
        return None
    principle = item.steps["choice", 0]["principle"]
    shown = [item.steps["choice", order]["log_odds"] for order in (0, 1)]
    log_odds = preference_log_odds(*shown)
    reason = None
    if math.isnan(log_odds):
        reason = "too long"
    elif not all(sample["text"].strip() for sample in samples):
        reason = "empty"
    elif not all(sample["finished"] for sample in samples):
        reason = "runaway"
    elif log_odds == 0:
        reason = "tie"
    tally.note(principle, reason or "pair")
    if reason != "too long":
        tally.biases.append(position_bias(*shown))
    if reason is not None:
        return None
    winner = 0 if log_odds > 0 else 1
    label = soft_label(log_odds, settings.largest_label)
    tally.clamped += label == settings.largest_label < 1
    tally.labels.append(label)
    sides = (as_answer(item.prompt, samples[side]["text"]) for side in (winner, 1 - winner))
    pair = make_pair(item.prompt, *sides, soft_label=label)
    source = {"kind": "feedback", "principles": [principle], "log_odds": shown, "soft_label": label}
    if settings.chain_of_thought:
        source["reasoning"] = [item.text("reasoning", order) for order in (0, 1)]
    return pair, source


def _write(
    context: StageContext, settings: ConstitutionalPairs, split: str, items: list[Item], tally: Tally
) -> list[str]:
    chat = any(isinstance(item.prompt, list) for item in items)
    path = context.dir / f"{split}.parquet"
    makers = {"revision": (_revision_pair,), "feedback": (_feedback_pair,), "both": (_revision_pair, _feedback_pair)}
    ids: list[str] = []
    provenance: list[dict[str, Any]] = []
    with (
        TableWriter(path, pair_schema(chat)) as out,
        TableWriter(context.dir / f"revisions_{split}.parquet", example_schema(chat)) as revisions,
    ):
        for item in items:
            if item.refused:
                tally.left_out["refused"] += 1
                continue
            for make in makers[settings.mode]:
                made = make(item, settings, tally)
                if made is None:
                    continue
                pair, source = made
                out.write(pair)
                ids.append(pair["pair_id"])
                provenance.append(
                    {"pair_id": pair["pair_id"], "prompt_id": item.prompt_id, **source, **_who(settings)}
                )
                if source["kind"] == "revision":
                    revisions.write({"prompt": item.prompt, "completion": pair["chosen"]})
    without_empty_columns(path, OPTIONAL)
    if settings.mode == "feedback":
        Path(context.dir / f"revisions_{split}.parquet").unlink()
    write_jsonl(context.dir / f"provenance_{split}.jsonl", provenance)
    return ids


def _who(settings: ConstitutionalPairs) -> dict[str, str]:
    """Who answered, criticised and judged; names only."""
    named = {"helper": settings.helper, "critic": settings.critic, "judge": settings.judge}
    return {role: f"{end.kind}:{end.function or end.model or 'sft'}" for role, end in named.items()}
