"""Finished comparisons, read back from what they wrote; on prompts that can be pooled."""

import dataclasses
from collections.abc import Container, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, read_parquet
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.compare.config import CompareStage
from ppo_vs_dpo.compare.estimates.judgements import table_of
from ppo_vs_dpo.compare.estimates.win_rates import judge_pairs
from ppo_vs_dpo.compare.pooled.figures import Run
from ppo_vs_dpo.compare.report.tables import UNDER
from ppo_vs_dpo.compare.sampling.completions import MEASURES, Draws
from ppo_vs_dpo.compare.sampling.contenders import along_training, contenders_of
from ppo_vs_dpo.compare.sampling.policies import REFERENCE, Policy, Prompts
from ppo_vs_dpo.compare.stage import SCHEMA_VERSION
from ppo_vs_dpo.compare.statistics.clusters import clusters_of
from ppo_vs_dpo.preferences.judging.llm import Judgement


def load_all(roots: list[str]) -> tuple[list[Run], list[str]]:
    """The runs, on prompts that are the same for all of them or each run's own; and what was left out for that.

    Runs that share some of their prompts are neither crossed nor nested: taken for runs of their own, half of the
    prompts shared under five seeds costs twenty points of coverage (docs/statistics.md). Where half of them or more
    are in every run, those are kept; else a prompt counts in the first run that has it.

    Raises:
        UserError: as `load`; or too few prompts are left.
    """
    runs = [load(root) for root in roots]
    kept = [run.prompts.ids for run in runs]
    sets = [set(ids) for ids in kept]
    if len({tuple(ids) for ids in kept}) == 1 or sum(map(len, sets)) == len(set().union(*sets)):
        return runs, []
    common = [identity for identity in kept[0] if all(identity in one for one in sets)]
    if len(common) >= min(map(len, sets)) / 2:
        wanted = [common] * len(runs)
        note = (
            f"{len(common)} prompts are in every run, others in some of them: the figures are of those {len(common)}."
        )
    else:
        wanted, seen = [], set()
        for ids in kept:
            wanted.append([identity for identity in ids if identity not in seen])
            seen |= set(ids)
        left = ", ".join(str(len(ids)) for ids in wanted)
        note = f"Some prompts are in several runs: each counts in the first one that has it ({left} prompts a run)."
    if min(map(len, wanted)) < 3:
        raise UserError(
            "the runs have some prompts in common, and too few are either in all of them or one run's alone: they are "
            "not repetitions of one experiment. Compare them again on the same held-out prompts."
        )
    if set(map(len, wanted)) == set(map(len, kept)) and [set(ids) for ids in wanted] == sets:
        note = ""  # the same prompts in another order
    return [load(root, ids) for root, ids in zip(roots, wanted, strict=True)], [note] if note else []


def load(root: str | Path, only: Sequence[str] | None = None) -> Run:
    """Read a finished comparison back from its Parquet file.

    ``only``: ids of the prompts that are kept, in this order; all by default.

    Raises:
        UserError: not a run, not compared yet, written by another version, or truncated.
    """
    run = RunFolder(root)
    if run.done("compare") is None:
        why = run.why_not_done("compare")
        raise UserError(f"the comparison of {root} {why}. Give that run's own command again first: it goes on.")
    report = read_json(run.path("compare", "report.json"))
    if report.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{run.path('compare', 'report.json')} has schema version {report.get('schema_version')}, this is "
            f"{SCHEMA_VERSION}. Compare that run again."
        )
    if report["pair_set"] is None:
        raise UserError(f"{run.root} compares policies that were given; only runs are pooled.")
    path = run.path("compare", "completions.parquet")
    table = read_parquet(path, ["policy", "role", "temperature", "draw", "prompt_id", "prompt", "completion"])
    frame = {name: np.array(table[name][:], dtype=object) for name in ("policy", "role", "prompt_id", "completion")}
    temperature = np.array(table["temperature"][:])
    ids = list(dict.fromkeys(frame["prompt_id"])) if only is None else list(only)
    place = {identity: number for number, identity in enumerate(ids)}
    texts = dict(zip(frame["prompt_id"], table["prompt"][:], strict=True))
    judges = [judge for judge in report["judges"] if judge in table.column_names]
    under = [name for name in table.column_names if name.startswith(UNDER)]
    numbers = {name: np.array(table[name][:]) for name in ("finished", "tokens", *MEASURES, *judges, *under)}
    draws = []
    for policy, role in dict.fromkeys(zip(frame["policy"], frame["role"], strict=True)):
        main = temperature == report["settings"]["temperature"]
        rows = np.flatnonzero((frame["policy"] == policy) & (frame["role"] == role) & main)
        if only is not None:
            places = np.array([place.get(identity, -1) for identity in frame["prompt_id"][rows]])
            rows = rows[np.argsort(places, kind="stable")][(places < 0).sum() :]
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
                under={n.removeprefix(UNDER): of[n] for n in under if np.isfinite(of[n]).all()},
            )
        )
    drawn_from = names_of(report)
    draws += [replace(one, policy=name) for name, of in drawn_from.items() for one in draws if one.policy == of]
    policies = [
        Policy(name, entry["method"], point=entry["point"])
        for name, entry in report["policies"].items()
        if entry["method"] != "best_of_n"
    ]
    policies += [
        Policy(point["policy"], point["method"], point=point["point"], checkpoint=True)
        for point in report["frontier"]
        if point["policy"] not in report["policies"]
    ]
    own = report["settings"]
    settings = CompareStage(
        temperature=own["temperature"],
        top_k=own["top_k"],
        top_p=own["top_p"],
        best_of_n=list(own["best_of_n"]),
        best_of=dict(own.get("best_of") or {}),
    )
    contenders = contenders_of(policies, draws, settings)
    ends = {one.get("last") for one in (own.get("tuning") or {}).values()}
    if drawn_from:  # a method's chosen point is not the end of its main run
        contenders = [replace(one, ends=False) for one in contenders]
    checkpoints = [replace(one, ends=one.name in ends) for one in along_training(policies, draws, settings)]
    of_prompt = [texts[identity] for identity in ids]
    prompts = Prompts(of_prompt, ids, clusters=clusters_of(of_prompt, own["near_duplicate"]))
    tables = {judge: judge_pairs(contenders, judge) for judge in judges}
    read = read_verdicts(run, [judge for judge in report["judges"] if judge not in judges], place)
    for judge, verdicts in read.items():
        table, _ = table_of(verdicts, prompts)
        tables |= {judge: table} if table is not None else {}
    return Run(
        run.root,
        own["seeds"][0],
        report,
        prompts,
        {c.name: c for c in contenders},
        {c.name: c for c in checkpoints},
        tables,
        judges,
        next((one for one in draws if (one.policy, one.role) == (REFERENCE, "pool")), None),
        settings,
        read,
    )


def names_of(report: dict[str, Any]) -> dict[str, str]:
    """Name in the report -> policy whose completions they are, where each method's point was chosen."""
    found: dict[str, str] = {}
    for method, one in (report["settings"].get("tuning") or {}).items():
        candidates = one.get("candidates") or {}
        found |= {name: about["policy"] for name, about in candidates.items() if name != about["policy"]}
        if candidates and method != candidates[one["chosen"]]["policy"]:
            found[method] = candidates[one["chosen"]]["policy"]
    return found


def read_verdicts(run: RunFolder, judges: list[str], ids: Container[str]) -> dict[str, list[Judgement]]:
    """What the judges that read said of these prompts, as the run kept it."""
    if not judges:
        return {}
    kept = read_parquet(
        run.path("compare", "judgements.parquet"), ["judge", "order", "preference", "prompt_id"]
    ).to_list()
    fields = [field.name for field in dataclasses.fields(Judgement)]
    found = {}
    for judge in judges:
        rows = [row for row in kept if row["judge"] == judge and row["order"] != "none" and row["prompt_id"] in ids]
        found[judge] = [Judgement(**{field: row[field] for field in fields if field in row}) for row in rows]
    return found
