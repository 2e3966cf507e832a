"""Several finished runs as one report: ``ppo-vs-dpo compare runs/a runs/b ... [--output FOLDER]``.

Runs are repetitions of one experiment under different seeds. Intervals are over prompts *and* seeds: how far another
seed would move a figure is in them, which no single run can say.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.errors import UserError, in_help, say
from ppo_vs_dpo.artifacts.files import read_marker, sha256_of
from ppo_vs_dpo.artifacts.run import TRAINED, RunFolder
from ppo_vs_dpo.compare.config import REWARD_MODEL_FIGURES
from ppo_vs_dpo.compare.estimates.allowed import sampled_as_measured, use_kl
from ppo_vs_dpo.compare.estimates.controls import controls_of, positive_control
from ppo_vs_dpo.compare.estimates.win_rates import PairTable, Settings
from ppo_vs_dpo.compare.judges.noise import add_corrections
from ppo_vs_dpo.compare.pooled.curves import pooled_frontier, pooled_matched_kl, pooled_optimum
from ppo_vs_dpo.compare.pooled.figures import (
    Run,
    mean_of,
    pooled_control,
    pooled_policy,
    pooled_power,
    pooled_ranking,
    pooled_temperatures,
    pooled_win_rates,
    shares_prompts,
)
from ppo_vs_dpo.compare.pooled.reading import load_all
from ppo_vs_dpo.compare.report.assemble import judge_agreement, verdict_sides
from ppo_vs_dpo.compare.report.cost import pooled_cost
from ppo_vs_dpo.compare.report.decision import decide, find, main_judge
from ppo_vs_dpo.compare.report.pages import sample_table, write_pages
from ppo_vs_dpo.compare.report.verdict import sentences, warnings, would_change
from ppo_vs_dpo.compare.sampling.contenders import PROXY
from ppo_vs_dpo.compare.sampling.policies import REFERENCE
from ppo_vs_dpo.compare.stage import SCHEMA_VERSION

# Sections that may differ between runs that are pooled.
FREE = ("name", "seed", "output_dir", "stages", "launch", "experiment")


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
    ids = [set(run.prompts.ids) for run in runs]
    if not shares_prompts(runs) and sum(map(len, ids)) != len(set().union(*ids)):
        raise UserError("the runs share some of their prompts; read them together (load_all), on those that count.")
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
        for stage in TRAINED:
            rows = [RunFolder(one.root).rows(stage) for one in (runs[0], run)]
            if None not in rows and rows[0] != rows[1]:
                notes.append(
                    f"Updates of {stage} were of {rows[0]} rows in {runs[0].root.name} and of {rows[1]} in "
                    f"{run.root.name}."
                )
    if len({run.report["settings"]["temperature"] for run in runs}) > 1:
        raise UserError("the runs were compared at different temperatures; compare them again at one.")
    return notes


def pool(runs: list[Run], settings: Settings, notes: Sequence[str] = ()) -> dict[str, Any]:
    """The pooled report; ``notes`` are put before its other warnings."""
    notes = [*notes, *check_alike(runs)]
    names = [name for name in runs[0].contenders if all(name in run.contenders for run in runs)]
    missing = sorted({name for run in runs for name in run.contenders} - set(names))
    if missing:
        notes.append(f"Left out, because not every run has it: {', '.join(missing)}.")
    judges = [judge for judge in runs[0].tables if all(judge in run.tables for run in runs)]
    if not judges:
        raise UserError("the runs share no judge (gold, reward model, or one that reads): there is nothing to pool.")
    other = sorted({judge for run in runs for judge in run.report["judges"]} - set(judges))
    if other:
        notes.append(f"Not pooled, because not every run has verdicts of it: {', '.join(other)}.")
    scored = [judge for judge in judges if all(judge in run.scored for run in runs)]
    policies = {name: pooled_policy(runs, name, settings) for name in names}
    shared = shares_prompts(runs)
    win = [entry for judge in judges for entry in pooled_win_rates(runs, judge, names, settings)]
    if all(sampled_as_measured(run.settings) for run in runs):
        win = use_kl(
            win,
            lambda name: [run.contenders[name] for run in runs],
            [run.own_draws() for run in runs],
            settings,
            shared,
            [run.prompts.clusters for run in runs],
        )
    for judge in (one for one in judges if all(one in run.read for run in runs)):
        spoken, units = [run.read[judge] for run in runs], [run.prompts.unit_of() for run in runs]
        add_corrections(win, judge, spoken, confidence=settings.confidence, shared=shared, unit_of=units)
    labels = [run.prompts.clusters for run in runs]
    positive, many = None, controls_of(scored, list(runs[0].contenders.values()))
    if PROXY in scored:
        sizes = {(run.pool.shape[1], run.contenders[REFERENCE].draws.shape[1]) for run in runs if run.pool is not None}
        if len(sizes) == 1:
            tables, options = [run.tables[PROXY] for run in runs], {"shared": shared, "clusters": labels}
            positive = positive_control(win, tables, settings, sizes.pop(), controls=many, **options)
    controls = [found for judge in scored if (found := pooled_control(runs, judge, settings, many))]
    known = {judge: pooled_judge(runs, judge) for judge in judges}
    first = main_judge({"judges": known})
    head = find({"win_rates": win}, "ppo", "dpo", first)
    pair_sets = [run.report["pair_set"] for run in runs]
    accuracy = [run.report.get("reward_model") or {} for run in runs]
    sides = [verdict_sides(list(run.contenders.values()), _only(run, scored), _only(run, judges)) for run in runs]
    report = {
        "schema_version": SCHEMA_VERSION,
        "verdict": [],
        "would_change": [],
        "warnings": [],
        "settings": {
            **runs[0].report["settings"],
            "seeds": [run.seed for run in runs],
            "runs": [run.root.name for run in runs],
            "n_prompts": len(runs[0].prompts) if shared else sum(len(run.prompts) for run in runs),
            "units": runs[0].prompts.units if shared else sum(run.prompts.units for run in runs),
            "near_training": (max if shared else sum)(run.report["settings"].get("near_training", 0) for run in runs),
            "prompts": "shared by all runs" if shared else "each run its own",
            "tuning": pooled_tuning(runs),
        },
        "trained": runs[0].report.get("trained"),
        "pair_set": {
            "hash": ", ".join(pair_set["hash"][:16] for pair_set in pair_sets),
            "n_train": sum(pair_set["n_train"] for pair_set in pair_sets),
            "n_test": sum(pair_set["n_test"] for pair_set in pair_sets),
            "same": all(pair_set["same"] for pair_set in pair_sets),
            "differences": list(
                dict.fromkeys(text for pair_set in pair_sets for text in pair_set.get("differences", []))
            ),
        },
        "judges": known,
        "head_to_head": ["ppo", "dpo"],
        "names": {},
        "policies": policies,
        "win_rates": win + controls,
        "control": controls + ([positive] if positive else []),
        "power": pooled_power(runs, head, first, settings, runs[0].report["settings"]["delta"]),
        "matched_kl": pooled_matched_kl(runs, first, settings, head)
        if head is not None
        else {"policy": "ppo", "versus": "dpo", "refused": "not every run has PPO and DPO"},
        "frontier": pooled_frontier(policies, runs, settings),
        "optimum": pooled_optimum(runs, settings),
        "ranking": {judge: pooled_ranking(runs, judge, names, settings) for judge in judges},
        "agreement": judge_agreement(sides),
        "temperatures": pooled_temperatures(runs, settings),
        "reward_model": {key: mean_of([a.get(key) for a in accuracy]) for key in REWARD_MODEL_FIGURES},
        "cost": pooled_cost([run.report["cost"] for run in runs]),
    }
    if len(runs) == 2:
        notes.append("Two seeds: the spread between them is known from one difference; intervals are wide and rough.")
    report["decision"] = decide(report)
    report["warnings"] = notes + warnings(report)
    report["verdict"] = sentences(report)
    report["would_change"] = would_change(report)
    return report


def pooled_tuning(runs: list[Run]) -> dict[str, Any]:
    """How each method's point was found in every run: the same number of settings, and which was chosen in each."""
    found = {}
    for method, first in (runs[0].report["settings"].get("tuning") or {}).items():
        own = [(run.report["settings"].get("tuning") or {}).get(method) for run in runs]
        if any(one is None or one["chosen_on"] != first["chosen_on"] for one in own):
            continue
        about = {key: value for key, value in first.items() if key not in ("candidates", "chosen", "last")}
        about["settings"] = max(one["settings"] for one in own)
        chosen = {"chosen": [one["chosen"] for one in own]} if all("chosen" in one for one in own) else {}
        found[method] = {**about, **chosen}
    return found


def _only(run: Run, judges: list[str]) -> dict[str, PairTable]:
    return {judge: run.tables[judge] for judge in judges}


def pooled_judge(runs: list[Run], judge: str) -> dict[str, Any]:
    """A judge's identity, with what all runs asked of it."""
    entries = [run.report["judges"][judge] for run in runs]
    found = dict(entries[0])
    again = [entry.get("self_disagreement") for entry in entries]
    if all(again):
        known = [one for one in again if one["rate"] is not None]
        sizes = [one["n"] for one in known]
        found["self_disagreement"] = {
            "repeats": again[0]["repeats"],
            "n": sum(sizes),
            "rate": float(np.average([one["rate"] for one in known], weights=sizes)) if known else None,
            "flip_rate": None,  # of one run's own verdicts
        }
    for key in ("judged", "excluded"):
        if all(key in entry for entry in entries):
            found[key] = sum(entry[key] for entry in entries)
    checked = [entry.get("heldout") for entry in entries]
    if all(checked):
        # Runs that share their pairs were checked on the same ones: those count once, with the runs' mean.
        same = len({run.report["pair_set"]["hash"] for run in runs}) == 1
        found["heldout"] = {
            key: round(sum(one[key] for one in checked) / (len(runs) if same else 1)) for key in ("n", "right")
        }
    biases = [entry.get("position_bias") for entry in entries]
    if all(biases):
        known = [bias for bias in biases if bias["n"]]
        weights = [bias["n"] for bias in known]
        found["position_bias"] = {
            "n": sum(weights),
            "bias": float(np.average([bias["bias"] for bias in known], weights=weights)) if known else None,
            "consistent": float(np.average([bias["consistent"] for bias in known], weights=weights))
            if known
            else None,
        }
    return found


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


def own_folder(runs: list[Run]) -> Path:
    """``pooled/`` beside the first run; under another name where that holds the report of other runs."""
    names = [run.root.name for run in runs]
    folder = runs[0].root.parent / "pooled"
    there = folder / "report.json"
    # One that cannot be read may be of others.
    if there.exists() and ((read_marker(there) or {}).get("settings") or {}).get("runs") != names:
        return folder.with_name(f"pooled-{sha256_of(sorted(names))[:8]}")
    return folder


def main(argv: list[str] | None = None) -> int:
    """The command.

    Raises:
        UserError: runs that cannot be pooled.
    """
    parser = argparse.ArgumentParser(prog="ppo-vs-dpo compare", description=in_help(__doc__.split("\n\n")[0]))
    parser.add_argument("runs", nargs="+", metavar="RUN", help="finished run folders, one a seed")
    parser.add_argument("--output", metavar="FOLDER", help="where to write; default: pooled/ beside the first run")
    arguments = parser.parse_args(argv)
    if len(arguments.runs) == 1:
        alone = RunFolder(arguments.runs[0]).path("compare", "report.html")
        raise UserError(f"one run is not pooled: its report is {alone}. Name the runs of other seeds, too.")
    runs, notes = load_all(arguments.runs)
    own = runs[0].report["settings"]
    report = pool(runs, Settings(own["resamples"], own["seeds"][0], own["confidence"]), notes)
    folder = Path(arguments.output) if arguments.output else own_folder(runs)
    samples = pooled_samples(runs, list(report["policies"]), list(report["judges"]))
    write_pages(folder, report, samples, " + ".join(run.root.name for run in runs))
    say("\n".join(report["verdict"]) + f"\n\nReport: {folder / 'report.html'}\n")
    return 0
