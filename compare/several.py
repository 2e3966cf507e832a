"""Several finished runs as one report: ``ppo-vs-dpo compare runs/a runs/b ... [--output FOLDER]``.

Runs are repetitions of one experiment under different seeds. Intervals are over prompts *and* seeds: how far another
seed would move a figure is in them, which no single run can say.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from scipy import stats

from artifacts.errors import UserError, explain_os_error
from artifacts.files import read_json, read_parquet
from artifacts.run import RunFolder
from compare.completions import MEASURES, Draws
from compare.config import CompareStage
from compare.contenders import PROXY, Contender, contenders_of
from compare.measure import PairTable, Settings, judge_pairs, matched_kl, reverse
from compare.policies import Policy, Prompts
from compare.report import sample_table, write_pages
from compare.stage import SCHEMA_VERSION
from compare.statistics import Interval, crossed_interval, holm, nested_interval
from compare.verdict import main_judge, sentences, warnings

# Sections that may differ between runs that are pooled.
FREE = ("name", "seed", "output_dir", "stages", "launch", "experiment")


@dataclass
class Run:
    """One finished comparison, read back.

    Attributes:
        root: the run folder.
        seed: its seed.
        report: its ``report.json``.
        prompts: what it was judged on.
        contenders: by name.
        tables: judge -> preferences of all pairs.
    """

    root: Path
    seed: int
    report: dict[str, Any]
    prompts: Prompts
    contenders: dict[str, Contender]
    tables: dict[str, PairTable]


def load(root: str | Path) -> Run:
    """Read a finished comparison back from its Parquet file.

    Raises:
        UserError: not a run, not compared yet, written by another version, or truncated.
    """
    run = RunFolder(root)
    if run.done("compare") is None:
        raise UserError(f"{root} has not been compared yet. Run `python -m compare {root}` first.")
    report = read_json(run.path("compare", "report.json"))
    if report.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{run.path('compare', 'report.json')} has schema version {report.get('schema_version')}, this is "
            f"{SCHEMA_VERSION}. Compare that run again."
        )
    path = run.path("compare", "completions.parquet")
    table = read_parquet(path, ["policy", "role", "temperature", "draw", "prompt_id", "prompt", "completion"])
    frame = {name: np.array(table[name][:], dtype=object) for name in ("policy", "role", "prompt_id", "completion")}
    temperature = np.array(table["temperature"][:])
    ids = list(dict.fromkeys(frame["prompt_id"]))
    texts = dict(zip(frame["prompt_id"], table["prompt"][:], strict=True))
    judges = [judge for judge in report["judges"] if judge in table.column_names]
    numbers = {name: np.array(table[name][:]) for name in ("finished", "tokens", *MEASURES, *judges)}
    draws = []
    for policy, role in dict.fromkeys(zip(frame["policy"], frame["role"], strict=True)):
        main = temperature == report["settings"]["temperature"]
        rows = np.flatnonzero((frame["policy"] == policy) & (frame["role"] == role) & main)
        shape = (len(ids), len(rows) // len(ids))
        of = {name: values[rows].reshape(shape) for name, values in numbers.items()}
        draws.append(
            Draws(
                policy=policy,
                role=role,
                temperature=report["settings"]["temperature"],
                texts=frame["completion"][rows].tolist(),
                token_ids=[],
                finished=of["finished"].astype(bool),
                tokens=of["tokens"],
                measures={name: of[name].astype(np.float64) for name in MEASURES},
                scores={judge: of[judge] for judge in judges},
            )
        )
    policies = [
        Policy(name, entry["method"], point=entry["point"])
        for name, entry in report["policies"].items()
        if entry["method"] != "best_of_n"
    ]
    settings = CompareStage(
        temperature=report["settings"]["temperature"], best_of_n=list(report["settings"]["best_of_n"])
    )
    contenders = contenders_of(policies, draws, settings)
    tables = {judge: judge_pairs(contenders, judge) for judge in judges}
    prompts = Prompts([texts[identity] for identity in ids], ids)
    return Run(run.root, report["settings"]["seeds"][0], report, prompts, {c.name: c for c in contenders}, tables)


def check_alike(runs: list[Run]) -> list[str]:
    """Warnings about what differs between the runs.

    Raises:
        UserError: two runs of one seed, or other data, models or comparison settings.
    """
    seeds = [run.seed for run in runs]
    for seed in seeds:
        same = [run for run in runs if run.seed == seed]
        if len(same) > 1:
            pair_sets = {run.report["pair_set"]["hash"] for run in same}
            what = "the same pairs: the same run twice" if len(pair_sets) == 1 else "different pair sets"
            raise UserError(
                f"{same[0].root} and {same[1].root} both have seed {seed} and {what}. Pool runs that differ in "
                f"their seed only."
            )
    configs = [OmegaConf.to_container(RunFolder(run.root).config, resolve=True) for run in runs]
    notes = []
    for run, config in zip(runs[1:], configs[1:], strict=True):
        different = [key for key in {**configs[0], **config} if configs[0].get(key) != config.get(key)]
        different = sorted(set(different) - set(FREE))
        hard = [key for key in different if key in ("data", "model")]
        if hard:
            raise UserError(
                f"{runs[0].root} and {run.root} differ in their section {', '.join(hard)}: they are not repetitions "
                f"of one experiment, and one figure for both would mean nothing."
            )
        if different:
            notes.append(f"{run.root.name} has other settings than {runs[0].root.name} in {', '.join(different)}.")
    if len({run.report["settings"]["temperature"] for run in runs}) > 1:
        raise UserError("the runs were compared at different temperatures; compare them again at one.")
    return notes


Pooling = Callable[[list[np.ndarray]], Interval]


def pooling(runs: list[Run], settings: Settings, bounds: tuple[float, float] | None = None) -> Pooling:
    """The interval over seeds and prompts: crossed where all runs share prompts, nested where each has its own."""
    shared = len({tuple(run.prompts.ids) for run in runs}) == 1
    if shared:
        return lambda groups: crossed_interval(np.stack(groups), bounds=bounds, **settings.kwargs())
    return lambda groups: nested_interval(groups, bounds=bounds, **settings.kwargs())


def pooled_win_rates(runs: list[Run], judge: str, names: list[str], settings: Settings) -> list[dict[str, Any]]:
    """Win rates of all pairs that every run has; p-values by a t-test on the runs' win rates."""
    pairs = [
        pair
        for pair in runs[0].tables[judge].pairs
        if set(pair) <= set(names) and all(run.tables[judge].has(*pair) for run in runs)
    ]
    groups = [np.stack([run.tables[judge].of(*pair) for pair in pairs], axis=1) for run in runs]
    interval = pooling(runs, settings, (0.0, 1.0))(groups)
    of_seed = np.stack([group.mean(axis=0) for group in groups])
    with np.errstate(invalid="ignore", divide="ignore"):
        p_values = np.nan_to_num(stats.ttest_1samp(of_seed, 0.5, axis=0).pvalue, nan=1.0)
    corrected = holm(p_values)
    entries = []
    for column, (policy, versus) in enumerate(pairs):
        low, high = interval.ci(column)
        entry = {
            "policy": policy,
            "versus": versus,
            "judge": judge,
            "n": sum(len(group) for group in groups),
            "win_rate": float(interval.mean[column]),
            "ci": [low, high],
            "wilson": [low, high],
            "length_controlled": None,
            "ties": float(np.mean([_ties(run.tables[judge], policy, versus) for run in runs])),
            "p": float(p_values[column]),
            "p_holm": float(corrected[column]),
            "per_seed": of_seed[:, column].tolist(),
        }
        backwards = {**reverse(entry), "per_seed": (1.0 - of_seed[:, column]).tolist()}
        entries += [entry, backwards]
    for entry in entries:
        entry.pop("wilson")  # of one run's prompts; there is none over seeds
    return entries


def _ties(table: PairTable, policy: str, versus: str) -> float:
    pair = (policy, versus) if (policy, versus) in table.pairs else (versus, policy)
    return float(table.ties[:, table.pairs.index(pair)].mean())


def pooled_policy(runs: list[Run], name: str, settings: Settings) -> dict[str, Any]:
    """The entry of one policy under ``policies``, pooled."""
    pool = pooling(runs, settings)
    own = [run.contenders[name] for run in runs]
    first = runs[0].report["policies"][name]
    entry: dict[str, Any] = {
        "method": own[0].method,
        "point": own[0].point,
        "n_prompts": sum(len(c.weights) for c in own),
        "draws": own[0].draws.shape[1],
    }
    for key, judge in (("gold_reward", "gold"), ("proxy_reward", PROXY)):
        entry[key], entry[f"{key}_ci"], entry[f"{key}_per_seed"] = None, None, None
        if all(judge in c.draws.scores for c in own):
            groups = [c.score(judge)[:, None] for c in own]
            interval = pool(groups)
            entry[key], entry[f"{key}_ci"] = float(interval.mean[0]), interval.ci(0)
            entry[f"{key}_per_seed"] = [float(group.mean()) for group in groups]
    entry["kl"] = _pooled_kl(runs, name, own, pool)
    for key, values in (("length", [c.length() for c in own]), ("eos_rate", [c.eos_rate() for c in own])):
        entry[key] = float(np.mean([value.mean() for value in values]))
    entry["quality"] = {
        key: _mean_of([run.report["policies"][name]["quality"][key] for run in runs]) for key in first["quality"]
    }
    moved = [run.report["policies"][name].get("displacement") for run in runs]
    entry["displacement"] = {key: _mean_of([m[key] for m in moved]) for key in moved[0]} if all(moved) else None
    return entry


def _pooled_kl(runs: list[Run], name: str, own: list[Contender], pool: Pooling) -> dict[str, Any]:
    single = [run.report["policies"][name]["kl"] for run in runs]
    if any(kl["mean"] is None for kl in single):
        return {"mean": None, "ci": None, "kind": "not measured"}
    per_seed = [kl["mean"] for kl in single]
    if own[0].method == "best_of_n":
        bound = single[0]["bound"]
        ci = [min(per_seed), max(per_seed)]
        return {"mean": float(np.mean(per_seed)), "ci": ci, "kind": single[0]["kind"], "bound": bound}
    interval = pool([c.kl()[:, None] for c in own])
    return {"mean": float(interval.mean[0]), "ci": interval.ci(0), "kind": single[0]["kind"], "per_seed": per_seed}


def _mean_of(values: list[float | None]) -> float | None:
    return None if any(value is None for value in values) else float(np.mean(values))


def pooled_matched_kl(runs: list[Run], judge: str, settings: Settings) -> dict[str, Any]:
    """Matched KL in every run, then the mean over runs with a t interval."""
    found = [matched_kl(list(run.contenders.values()), run.tables[judge], "ppo", "dpo", settings) for run in runs]
    refused = [one for one in found if "refused" in one]
    if refused:
        return refused[0]
    rates = np.array([one["win_rate"] for one in found])
    interval = nested_interval([np.array([[rate]]) for rate in rates], bounds=(0.0, 1.0), **settings.kwargs())
    # Seeds may agree by luck: never narrower than the prompts' share, which every run's own interval shows.
    width = float(np.mean([one["ci"][1] - one["ci"][0] for one in found])) / np.sqrt(len(found))
    middle = float(rates.mean())
    low, high = interval.ci(0)
    low, high = max(0.0, min(low, middle - width / 2)), min(1.0, max(high, middle + width / 2))
    return {
        "policy": "ppo",
        "versus": "dpo",
        "kl": float(np.mean([one["kl"] for one in found])),
        "win_rate": middle,
        "ci": [low, high],
        "per_seed": rates.tolist(),
        "points": found[0]["points"],
    }


def pooled_frontier(policies: dict[str, dict[str, Any]], runs: list[Run]) -> list[dict[str, Any]]:
    """Points of all methods; over-optimised where every run marks the point so."""
    marks = [{p["policy"]: p for p in run.report["frontier"]} for run in runs]
    points = []
    for name in (p["policy"] for p in runs[0].report["frontier"]):
        if name not in policies or not all(name in mark for mark in marks):
            continue
        entry = policies[name]
        keys = (
            "method",
            "point",
            "kl",
            "gold_reward",
            "gold_reward_ci",
            "proxy_reward",
            "proxy_reward_ci",
            "eos_rate",
        )
        point = {"policy": name, **{key: entry[key] for key in keys}}
        if point["kl"]["mean"] is not None:
            point["sqrt_kl"] = float(np.sqrt(max(point["kl"]["mean"], 0.0)))
        marked = [mark[name] for mark in marks]
        point["over_optimised"] = all(mark.get("over_optimised") for mark in marked)
        if point["over_optimised"]:
            point["against"] = marked[0]["against"]
            point["gold_change"] = float(np.mean([mark["gold_change"] for mark in marked]))
            point["proxy_change"] = float(np.mean([mark["proxy_change"] for mark in marked]))
        points.append(point)
    return points


def pool(runs: list[Run], settings: Settings) -> dict[str, Any]:
    """The pooled report."""
    notes = check_alike(runs)
    names = [name for name in runs[0].contenders if all(name in run.contenders for run in runs)]
    missing = sorted({name for run in runs for name in run.contenders} - set(names))
    if missing:
        notes.append(f"Left out, because not every run has it: {', '.join(missing)}.")
    judges = [judge for judge in runs[0].tables if all(judge in run.tables for run in runs)]
    if not judges:
        raise UserError("the runs share no judge that scores (gold, reward model): there is nothing to pool.")
    reading = sorted({judge for run in runs for judge in run.report["judges"]} - set(judges))
    if reading:
        notes.append(f"Not pooled: judges that read or that not every run has ({', '.join(reading)}).")
    policies = {name: pooled_policy(runs, name, settings) for name in names}
    win = [entry for judge in judges for entry in pooled_win_rates(runs, judge, names, settings)]
    first = main_judge({"judges": {judge: runs[0].report["judges"][judge] for judge in judges}})
    both = {"ppo", "dpo"} <= set(names)
    pair_sets = [run.report["pair_set"] for run in runs]
    accuracy = [run.report.get("reward_model") or {} for run in runs]
    report = {
        "schema_version": SCHEMA_VERSION,
        "verdict": [],
        "warnings": [],
        "settings": {
            **runs[0].report["settings"],
            "seeds": [run.seed for run in runs],
            "runs": [run.root.name for run in runs],
            "n_prompts": sum(len(run.prompts) for run in runs),
            "prompts": "shared by all runs" if len({tuple(r.prompts.ids) for r in runs}) == 1 else "each run its own",
        },
        "pair_set": {
            "hash": ", ".join(pair_set["hash"][:16] for pair_set in pair_sets),
            "n_train": sum(pair_set["n_train"] for pair_set in pair_sets),
            "n_test": sum(pair_set["n_test"] for pair_set in pair_sets),
            "same": all(pair_set["same"] for pair_set in pair_sets),
        },
        "judges": {judge: runs[0].report["judges"][judge] for judge in judges},
        "policies": policies,
        "win_rates": win,
        "control": [],
        "power": None,
        "matched_kl": pooled_matched_kl(runs, first, settings)
        if both
        else {"policy": "ppo", "versus": "dpo", "refused": "not every run has PPO and DPO"},
        "frontier": pooled_frontier(policies, runs),
        "ranking": {},
        "agreement": [],
        "temperatures": [],
        "reward_model": {key: _mean_of([a.get(key) for a in accuracy]) for key in ("accuracy", "ceiling", "ece")},
        "cost": {"methods": {}},
    }
    if len(runs) == 2:
        notes.append("Two seeds: the spread between them is known from one difference; intervals are wide and rough.")
    report["warnings"] = notes + warnings(report)
    report["verdict"] = sentences(report)
    return report


def pooled_samples(runs: list[Run], names: list[str], judges: list[str]) -> dict[str, Any]:
    """The side-by-side table of all runs, one under the other."""
    tables = [sample_table([run.contenders[name] for name in names], run.prompts, judges) for run in runs]
    merged = tables[0]
    merged["ids"] = [f"seed {run.seed} · {identity}" for run in runs for identity in run.prompts.ids]
    for table in tables[1:]:
        merged["prompts"] += table["prompts"]
        for policy, further in zip(merged["policies"], table["policies"], strict=True):
            for key in ("texts", "tokens", "finished"):
                policy[key] += further[key]
            for judge in policy["scores"]:
                policy["scores"][judge] += further["scores"][judge]
    return merged


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="ppo-vs-dpo compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="finished run folders, one a seed")
    parser.add_argument("--output", metavar="FOLDER", help="where to write; default: pooled/ beside the first run")
    arguments = parser.parse_args(argv)
    try:
        runs = [load(root) for root in arguments.runs]
        own = runs[0].report["settings"]
        report = pool(runs, Settings(own["resamples"], own["seeds"][0], own["confidence"]))
        folder = Path(arguments.output) if arguments.output else runs[0].root.parent / "pooled"
        samples = pooled_samples(runs, list(report["policies"]), list(report["judges"]))
        write_pages(folder, report, samples, " + ".join(run.root.name for run in runs))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except OSError as error:
        explained = explain_os_error(error)
        if explained is None:
            raise
        sys.stderr.write(f"error: {explained}\n")
        return 2
    sys.stdout.write("\n".join(report["verdict"]) + f"\n\nReport: {folder / 'report.html'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
