"""The stage ``compare``: completions, judges, win rates, KL, frontier, one report."""

import resource
import time
from typing import Any

import numpy as np

from artifacts.files import read_json, write_parquet
from artifacts.settings import split
from artifacts.stage import StageContext
from compare.agreement import agreement
from compare.completions import Draws, split_draws
from compare.config import CompareStage
from compare.contenders import Contender, contenders_of, realised_best, shown_columns, uniform
from compare.gather import Gatherer, model_config_of, score_all
from compare.judges.scores import FunctionJudge, RewardModelJudge, preference_by_score
from compare.kl import sequence_kl
from compare.measure import (
    PairTable,
    Settings,
    control,
    describe,
    describe_kl,
    frontier,
    judge_pairs,
    matched_kl,
    power_line,
    win_rates,
)
from compare.policies import REFERENCE, Prompts, check_pair_set, heldout_prompts, policies_of
from compare.quality import quality
from compare.ranking import ranking
from compare.report import write_report
from compare.statistics import mean_interval, win_rate_interval
from compare.verdict import main_judge, sentences, warnings

# Version of report.json; docs/compare.md describes the fields.
SCHEMA_VERSION = 1

TRAINED = ("sft", "reward_model", "ppo", "dpo")
# What a method needs trained after SFT: the price of "which is better".
METHOD_STAGES = {"ppo": ("reward_model", "ppo"), "dpo": ("dpo",), "best_of_n": ("reward_model",)}
# Figures of a stage's done.json that are costs.
COST_FIGURES = (
    "episodes",
    "steps",
    "updates",
    "tokens_generated",
    "peak_memory_mb",
    "gpu_peak_memory_mb",
    "total_flos",
)


def run_compare(context: StageContext) -> None:
    """Compare all policies of a run; writes ``compare/``."""
    started = time.monotonic()
    settings, _ = split(context.config, CompareStage, where="compare")
    # 1. The same pairs in both branches, and prompts that nobody was trained on.
    pair_set = check_pair_set(context.run)
    prompts = heldout_prompts(context.run, settings.n_prompts)
    policies, notes = policies_of(context.run, settings)
    if prompts.trained_on:
        notes.append(f"{prompts.trained_on} held-out prompts had been trained on in this run and were left out.")
    # 2. Completions of every policy, with their KL to the reference.
    gatherer = Gatherer(context, settings, prompts)
    gathered = gatherer.all(policies)
    draws = [one for table, _ in gathered for one in split_draws(table, len(prompts))]
    learned = {policy.name: extra for policy, (_, extra) in zip(policies, gathered, strict=True)}
    # 3. Scores.
    judges = scoring_judges(context)
    for number, judge in enumerate(judges):
        score_all(judge, draws, prompts, settings.workers)
        context.progress(80 + 10 * (number + 1) / len(judges), 100, f"judged by {judge.name}")
    # 4. Figures.
    contenders = contenders_of(policies, draws, settings)
    tables = {judge.name: judge_pairs(contenders, judge.name) for judge in judges}
    report = {
        "schema_version": SCHEMA_VERSION,
        "verdict": [],
        "warnings": [],
        "settings": {
            "seeds": [context.seed],
            "n_prompts": len(prompts),
            **{key: getattr(settings, key) for key in settings.__dataclass_fields__ if key not in ("workers",)},
        }
        | {"n_prompts": len(prompts)},
        "pair_set": pair_set,
        "judges": {judge.name: {**judge.identity(), "in_sample": judge.in_sample} for judge in judges},
        **figures(contenders, draws, tables, gatherer, settings, context.seed, learned),
        "reward_model": reward_model_figures(context),
    }
    report["warnings"] = notes + warnings(report)
    report["verdict"] = sentences(report)
    report["cost"] = cost(context, learned, started)
    # 5. Files.
    context.progress(95, 100, "report")
    write_completions(context, draws, prompts)
    write_judgements(context, tables, prompts)
    write_report(context.dir, report, contenders, prompts, context.run.root.name)
    context.finish(verdict=report["verdict"], n_prompts=len(prompts), pair_set=pair_set["hash"])


def scoring_judges(context: StageContext) -> list[FunctionJudge | RewardModelJudge]:
    """The gold function, where the data has one, and the reward model, where there is one."""
    judges: list[FunctionJudge | RewardModelJudge] = []
    gold = (context.run.config.get("data") or {}).get("gold")
    if gold:
        judges.append(FunctionJudge(gold))
    if context.run.done("reward_model") is not None:
        folder = context.run.stage_dir("reward_model") / "model"
        judges.append(RewardModelJudge(folder, model_config_of(context.run)))
    return judges


def figures(
    contenders: list[Contender],
    draws: list[Draws],
    tables: dict[str, PairTable],
    gatherer: Gatherer,
    settings: CompareStage,
    seed: int,
    learned: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Everything in the report that is computed from draws and judgements."""
    how = Settings(settings.resamples, seed, settings.confidence)
    judges = list(tables)
    pool = next((one for one in draws if one.role == "pool"), None)
    baseline = next(one for one in draws if one.role == "baseline")
    logprobs = best_of_n_logprobs([c.n for c in contenders if c.n is not None], pool, gatherer)
    policies = {c.name: describe(c, judges, how, logprobs.get(c.n)) for c in contenders}
    for contender in contenders:
        policies[contender.name]["quality"] = quality(contender, shown_columns(contender))
        policies[contender.name]["displacement"] = learned.get(contender.name, {}).get("displacement")
    controls = [found for judge in judges if (found := control(baseline, pool, judge, how))]
    lengths = {c.name: c.length() for c in contenders}
    win = [entry for judge in judges for entry in win_rates(tables[judge], judge, how, lengths)]
    first = main_judge({"judges": {name: {"in_sample": name == "reward_model"} for name in judges}})
    both = {"ppo", "dpo"} <= set(policies)
    return {
        "policies": policies,
        "win_rates": win + controls,
        "control": controls,
        "power": power_line(tables[first], "ppo", "dpo", how) if both else None,
        "matched_kl": matched_kl(contenders, tables[first], "ppo", "dpo", how),
        "frontier": frontier(contenders, policies, how),
        "ranking": {judge: ranking_of(tables[judge], contenders, how) for judge in judges},
        "agreement": judge_agreement(tables),
        "temperatures": temperatures(draws, baseline, settings, judges, how),
    }


def ranking_of(table: PairTable, contenders: list[Contender], how: Settings) -> dict[str, Any]:
    """Bradley-Terry ranking by one judge."""
    return ranking(
        table.pairs,
        table.preferences,
        [contender.name for contender in contenders],
        resamples=min(how.resamples, 500),
        seed=how.seed,
        confidence=how.confidence,
    )


def judge_agreement(tables: dict[str, PairTable]) -> list[dict[str, Any]]:
    """Agreement of every two judges over all pairs that both judged."""
    found = []
    for i, first in enumerate(tables):
        for second in list(tables)[:i]:
            shared = [pair for pair in tables[first].pairs if pair in tables[second].pairs]
            if shared:
                sides = [np.concatenate([tables[j].of(*pair) for pair in shared]) for j in (first, second)]
                found.append({"judges": [first, second], **agreement(*sides)})
    return found


def temperatures(
    draws: list[Draws], baseline: Draws, settings: CompareStage, judges: list[str], how: Settings
) -> list[dict[str, Any]]:
    """Every policy at the further temperatures, against the reference at the main one."""
    found = []
    for one in draws:
        if one.temperature == settings.temperature:
            continue
        contender = Contender(one.policy, "other", one, uniform(one))
        entry = {
            "policy": one.policy,
            "temperature": one.temperature,
            "kl": describe_kl(contender, how, None),
            "length": float(contender.length().mean()),
            "eos_rate": float(contender.eos_rate().mean()),
            "scores": {},
            "win_rates": [],
        }
        for judge in (j for j in judges if j in one.scores):
            score = mean_interval(contender.score(judge), **how.kwargs())
            entry["scores"][judge] = {"mean": score.mean, "ci": score.ci()}
            preference, ties = preference_by_score(
                one.scores[judge], baseline.scores[judge], contender.weights, uniform(baseline)
            )
            interval = win_rate_interval(preference[:, None], **how.kwargs())
            entry["win_rates"].append(
                {
                    "versus": f"{REFERENCE} at {settings.temperature}",
                    "judge": judge,
                    "n": len(preference),
                    "win_rate": float(interval.mean[0]),
                    "ci": interval.ci(0),
                    "ties": float(ties.mean()),
                }
            )
        found.append(entry)
    return found


def best_of_n_logprobs(ns: list[int], pool: Draws | None, gatherer: Gatherer) -> dict[int, np.ndarray]:
    """n -> log-probability under the reference ``(P,)`` of one best-of-n completion a prompt."""
    if pool is None or not ns:
        return {}
    chosen = {n: realised_best(pool, n) for n in ns}
    prompts, per = pool.shape
    slots = sorted({(row, int(column)) for columns in chosen.values() for row, column in enumerate(columns)})
    reference = gatherer.reference
    measured = sequence_kl(
        reference.model,
        reference.model,
        [reference.prompt_ids[row] for row, _ in slots],
        [pool.token_ids[row * per + column] for row, column in slots],
        reference.tokenizer.pad_token_id,
        temperature=pool.temperature,
    )
    of = dict(zip(slots, measured.logprob, strict=True))
    return {n: np.array([of[row, int(columns[row])] for row in range(prompts)]) for n, columns in chosen.items()}


def reward_model_figures(context: StageContext) -> dict[str, Any] | None:
    """Accuracy, ceiling and calibration error of the reward model, from its own report."""
    path = context.run.stage_dir("reward_model") / "report.json"
    if not path.is_file():
        return None
    found = read_json(path)
    return {key: found.get(key) for key in ("accuracy", "ceiling", "ece")}


def cost(context: StageContext, learned: dict[str, dict[str, Any]], started: float) -> dict[str, Any]:
    """What each method took. The only part of the report that differs between two equal runs."""
    run, methods = context.run, {}
    seconds = {stage: (run.done(stage) or {}).get("seconds") for stage in TRAINED}
    for method, stages in METHOD_STAGES.items():
        known = [seconds[stage] for stage in stages if seconds[stage] is not None]
        if len(known) == len(stages):
            methods[method] = {"stages": list(stages), "seconds": round(sum(known), 3)}
    for stage in TRAINED:
        figures = (run.done(stage) or {}).get("figures") or {}
        kept = {key: figures[key] for key in COST_FIGURES if isinstance(figures.get(key), int | float)}
        methods.setdefault(stage, {}).update(kept)
    generation = {
        name: {
            "tokens": extra["tokens_generated"],
            "seconds": extra["seconds"],
            # A forward pass costs about 2 FLOPs a parameter and token (Kaplan et al. 2020, section 2.1).
            "flops": 2 * extra["parameters"] * extra["tokens_generated"],
        }
        for name, extra in learned.items()
        if extra.get("tokens_generated")
    }
    return {
        "stage_seconds": seconds,
        "methods": {name: figures for name, figures in methods.items() if figures},
        "generation": generation,
        "compare_seconds": round(time.monotonic() - started, 3),
        "compare_peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def write_completions(context: StageContext, draws: list[Draws], prompts: Prompts) -> None:
    """``completions.parquet``: every completion with its measures and scores, a row each."""
    columns: dict[str, list] = {"policy": [], "role": [], "temperature": [], "draw": [], "prompt_id": [], "prompt": []}
    values: dict[str, list[np.ndarray]] = {}
    texts: list[str] = []
    for one in draws:
        n, per = one.shape
        columns["policy"] += [one.policy] * (n * per)
        columns["role"] += [one.role] * (n * per)
        columns["temperature"] += [one.temperature] * (n * per)
        columns["draw"] += list(range(per)) * n
        columns["prompt_id"] += [identity for identity in prompts.ids for _ in range(per)]
        columns["prompt"] += [prompt for prompt in prompts.prompts for _ in range(per)]
        texts += one.texts
        for name, array in {"finished": one.finished, "tokens": one.tokens, **one.measures, **one.scores}.items():
            values.setdefault(name, []).append(array.ravel())
    merged = {name: np.concatenate(arrays) for name, arrays in values.items()}
    write_parquet(context.dir / "completions.parquet", {**columns, "completion": texts, **merged})


def write_judgements(context: StageContext, tables: dict[str, PairTable], prompts: Prompts) -> None:
    """``judgements.parquet``: the preference of every judge for every pair on every prompt."""
    import pyarrow as pa
    from datasets import Dataset

    parts = []
    for judge, table in tables.items():
        n, k = table.preferences.shape
        pair = np.repeat(np.arange(k), n)
        names = [pa.array([side[i] for side in table.pairs]).take(pa.array(pair)) for i in (0, 1)]
        parts.append(
            pa.table(
                {
                    "judge": pa.array([judge]).take(pa.array(np.zeros(n * k, dtype=np.int64))),
                    "policy": names[0],
                    "versus": names[1],
                    "prompt_id": pa.array(prompts.ids).take(pa.array(np.tile(np.arange(n), k))),
                    "preference": table.preferences.T.ravel(),
                    "ties": table.ties.T.ravel(),
                }
            )
        )
    if parts:
        write_parquet(context.dir / "judgements.parquet", Dataset(pa.concat_tables(parts)))
