"""Step ``pairs`` of the source ``rejection``: sample, score, choose; pairs for DPO, best-of-n examples for SFT."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.guards.digests import Digests
from ppo_vs_dpo.artifacts.guards.fingerprints import external_inputs
from ppo_vs_dpo.artifacts.guards.outputs import content_id
from ppo_vs_dpo.artifacts.stage import StageContext
from ppo_vs_dpo.models.sampling.generation import SamplingConfig, row_seed
from ppo_vs_dpo.models.training import model_settings
from ppo_vs_dpo.preferences.config import RejectionSampling
from ppo_vs_dpo.preferences.reading.parquet import (
    TableWriter,
    example_schema,
    pair_schema,
    read_rows,
    without_empty_columns,
)
from ppo_vs_dpo.preferences.recipes.functions import score_with
from ppo_vs_dpo.preferences.recipes.named import load_gold
from ppo_vs_dpo.preferences.recipes.steplog import StepLog
from ppo_vs_dpo.preferences.rejection.samples import Sampler, Scorer, sample_and_score
from ppo_vs_dpo.preferences.rejection.select import best_against_worst, bradley_terry_pairs, pick_best, rso_pairs
from ppo_vs_dpo.preferences.schema import OPTIONAL, Text, as_answer, make_pair, pair_set


def load_scorer(settings: RejectionSampling) -> Scorer:
    """The reward model that ``data.reward_model`` names, or the gold function.

    The class of reward models is named in the configuration, not imported: this room is below theirs.

    Raises:
        UserError: no such class or model.
    """
    if settings.reward_model is None:
        gold = load_gold(settings.gold)
        return lambda prompts, texts, finished: score_with(
            gold, settings.gold, prompts, texts, finished=list(finished)
        )
    model = load_gold(settings.scorer, "data.scorer").load(settings.reward_model)

    def score(prompts: Sequence[Text], texts: Sequence[str], finished: Sequence[bool]) -> list[float]:
        answers = [as_answer(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        return model.score(list(prompts), answers, finished=list(finished))

    return score


# Settings that choose among finished steps, or say how many are done before they are written down.
FILTERS = ("max_growth", "label_clamp", "rule", "rso_beta", "pairs_per_prompt", "prompts_per_step")


def policy_path(context: StageContext, path: str | None) -> str:
    """The policy to sample: the one named, or the run's SFT policy."""
    if path is not None:
        return path
    context.run.require("sft")
    return str(context.run.path("sft", "model"))


def identity_of(context: StageContext, settings: Any, policy: str) -> dict[str, Any]:
    """What the samples depend on: settings, seed, prompts and policy; contents, not names or times."""
    sft, data = context.run.done("sft") or {}, context.run.done("data") or {}
    named = OmegaConf.create({"data": context.run.config.get("data") or {}})
    return {
        "settings": {key: value for key, value in dataclasses.asdict(settings).items() if key not in FILTERS},
        "seed": context.seed,
        "model": vars(model_settings(context)),
        "policy": [policy.removeprefix(str(context.run.root)), content_id(sft, "model/")],
        "prompts": content_id(data, "prompts"),
        # Models, functions and files that the section names: who scores and judges is part of a step, too.
        "inputs": external_inputs(named, Digests(None)),
    }


def pairs_step(context: StageContext, settings: RejectionSampling) -> None:
    """Write ``pairs/{train,test}.parquet``, ``pairs/best_of_n.parquet`` and the samples that they come from."""
    context.run.require("data")
    policy = policy_path(context, settings.policy)
    identity = identity_of(context, settings, policy)
    splits = [name for name in ("train", "test") if context.run.path("data", f"prompts_{name}.parquet").is_file()]
    files = {name: context.run.path("data", f"prompts_{name}.parquet") for name in splits}
    total = sum(1 for file in files.values() for _ in read_rows(file, ["prompt_id"]))
    sampling = SamplingConfig(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        batch_size=settings.generation_batch_size,
    )
    # 1. Sample and score.
    sampler = Sampler(policy, sampling, context.seed, model_settings(context))
    scorer = load_scorer(settings)
    logs = {name: StepLog.of(context.run, "samples", name, identity) for name in splits}
    before = 0
    for name in splits:
        sample_and_score(
            read_rows(files[name]),
            logs[name],
            sampler,
            scorer,
            settings.samples,
            settings.prompts_per_step,
            lambda done, before=before: context.progress(before + done, total, f"{settings.samples} samples a prompt"),
        )
        before += sum(1 for _ in read_rows(files[name], ["prompt_id"]))
    # 2. Choose and write.
    counts = Counts()
    ids = {name: _write_pairs(context, settings, name, logs[name], counts) for name in splits}
    if not ids["train"]:
        raise UserError(
            f"no pair for any of {counts.prompts} prompts: the samples of each were equal, equally scored or did not "
            f"end within data.max_new_tokens={settings.max_new_tokens}. Raise it, or data.samples or data.temperature."
        )
    best = _write_best(context, logs["train"])
    context.finish(
        pair_set=pair_set(ids),
        rule=settings.rule,
        samples=settings.samples,
        policy=policy,
        scorer=settings.reward_model or settings.gold,
        best_of_n=best,
        **dataclasses.asdict(counts),
    )


@dataclasses.dataclass
class Counts:
    """What became of the prompts and samples."""

    prompts: int = 0
    prompts_without_pair: int = 0
    unfinished_samples: int = 0
    repeated_samples: int = 0


def candidates(row: dict[str, Any], counts: Counts | None = None) -> list[dict[str, Any]]:
    """Different finished samples of a prompt, in the order of the draws."""
    finished = [sample for sample in row["samples"] if sample["finished"] and sample["text"].strip()]
    unique = list({sample["text"]: sample for sample in finished}.values())
    if counts is not None:
        counts.unfinished_samples += len(row["samples"]) - len(finished)
        counts.repeated_samples += len(finished) - len(unique)
    return unique


def _write_pairs(
    context: StageContext, settings: RejectionSampling, split: str, log: StepLog, counts: Counts
) -> list[str]:
    ids: list[str] = []
    first = next(iter(log), None)
    chat = first is not None and isinstance(first["prompt"], list)
    path = context.dir / f"{split}.parquet"
    with TableWriter(path, pair_schema(chat)) as out:
        for row in log:
            counts.prompts += 1
            samples = candidates(row, counts)
            scores = [sample["score"] for sample in samples]
            # The prompt names the stream: choosing again after a crash chooses the same.
            rng = np.random.default_rng(row_seed(context.seed, "choose", row["prompt_id"]))
            chosen = choose(scores, settings, rng) if len(samples) > 1 else []
            counts.prompts_without_pair += not chosen
            for winner, loser in chosen:
                pair = make_pair(
                    row["prompt"],
                    as_answer(row["prompt"], samples[winner]["text"]),
                    as_answer(row["prompt"], samples[loser]["text"]),
                    chosen_score=scores[winner],
                    rejected_score=scores[loser],
                )
                out.write(pair)
                ids.append(pair["pair_id"])
    without_empty_columns(path, OPTIONAL)
    return ids


def choose(scores: Sequence[float], settings: RejectionSampling, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Pairs (chosen, rejected) among scored samples by ``data.rule``."""
    if settings.rule == "best_vs_worst":
        return best_against_worst(scores, rng)
    if settings.rule == "rso":
        return rso_pairs(scores, settings.pairs_per_prompt, settings.rso_beta, rng)
    return bradley_terry_pairs(scores, settings.pairs_per_prompt, rng)


def _write_best(context: StageContext, log: StepLog) -> dict[str, float]:
    """RAFT (Dong et al. 2023) and Llama 2's rejection sampling: the best sample of each prompt, to fine-tune on.

    All finished draws count here, repeated ones too: that is what makes the law best-of-n.
    """
    first = next(iter(log), None)
    chat = first is not None and isinstance(first["prompt"], list)
    best_scores, mean_scores = [], []
    with TableWriter(context.dir / "best_of_n.parquet", example_schema(chat)) as out:
        for row in log:
            samples = [sample for sample in row["samples"] if sample["finished"] and sample["text"].strip()]
            if not samples:
                continue
            scores = [sample["score"] for sample in samples]
            rng = np.random.default_rng(row_seed(context.seed, "best", row["prompt_id"]))
            best = samples[pick_best(scores, rng)]
            out.write({"prompt": row["prompt"], "completion": as_answer(row["prompt"], best["text"])})
            best_scores.append(best["score"])
            mean_scores.append(float(np.mean(scores)))
    return {
        "examples": out.rows,
        "mean_score": float(np.mean(best_scores)) if best_scores else 0.0,
        "policy_mean_score": float(np.mean(mean_scores)) if mean_scores else 0.0,
    }
