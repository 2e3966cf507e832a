"""The stage ``compare``: completions, judges, win rates, KL, frontier, one report."""

import resource
import time
from typing import Any

import numpy as np

from artifacts.files import read_json, write_parquet
from artifacts.settings import split
from artifacts.stage import StageContext
from compare.completions import Draws, split_draws
from compare.config import CompareStage
from compare.contenders import Contender, contenders_of, realised_best
from compare.gather import Gatherer, model_config_of, score_all
from compare.judges.scores import FunctionJudge, RewardModelJudge
from compare.kl import sequence_kl
from compare.measure import (
    PairTable,
    Settings,
    control,
    describe,
    frontier,
    judge_pairs,
    matched_kl,
    power_line,
    win_rates,
)
from compare.policies import Prompts, check_pair_set, heldout_prompts, policies_of
from compare.report import write_report
from compare.verdict import main_judge, sentences, warnings

# Version of report.json; docs/compare.md describes the fields.
SCHEMA_VERSION = 1


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
    draws = [one for table in gatherer.all(policies) for one in split_draws(table, len(prompts))]
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
        **figures(contenders, draws, tables, gatherer, settings, context.seed),
        "reward_model": reward_model_figures(context),
    }
    report["warnings"] = notes + warnings(report)
    report["verdict"] = sentences(report)
    report["cost"] = cost(context, started)
    # 5. Files.
    context.progress(95, 100, "report")
    write_completions(context, draws, prompts)
    write_judgements(context, tables, prompts)
    write_report(context.dir, report, contenders, prompts)
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
) -> dict[str, Any]:
    """Everything in the report that is computed from draws and judgements."""
    how = Settings(settings.resamples, seed, settings.confidence)
    judges = list(tables)
    pool = next((one for one in draws if one.role == "pool"), None)
    baseline = next(one for one in draws if one.role == "baseline")
    logprobs = best_of_n_logprobs([c.n for c in contenders if c.n is not None], pool, gatherer)
    policies = {c.name: describe(c, judges, how, logprobs.get(c.n)) for c in contenders}
    controls = [found for judge in judges if (found := control(baseline, pool, judge, how))]
    win = [entry for judge in judges for entry in win_rates(tables[judge], judge, how)]
    first = main_judge({"judges": {name: {"in_sample": name == "reward_model"} for name in judges}})
    both = {"ppo", "dpo"} <= set(policies)
    return {
        "policies": policies,
        "win_rates": win + controls,
        "control": controls,
        "power": power_line(tables[first], "ppo", "dpo", how) if both else None,
        "matched_kl": matched_kl(contenders, tables[first], "ppo", "dpo", how),
        "frontier": frontier(contenders, policies, how),
    }


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


def cost(context: StageContext, started: float) -> dict[str, Any]:
    """What each stage took; the only figures of the report that differ between two equal runs."""
    stages = ("data", "sft", "pairs", "reward_model", "ppo", "dpo")
    return {
        "stage_seconds": {stage: (context.run.done(stage) or {}).get("seconds") for stage in stages},
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
