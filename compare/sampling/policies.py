"""Which policies a run offers for comparison, and which prompts they are compared on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_parquet
from ppo_vs_dpo.artifacts.guards.digests import Digests
from ppo_vs_dpo.artifacts.guards.fingerprints import ROWS
from ppo_vs_dpo.artifacts.guards.outputs import content_id
from ppo_vs_dpo.artifacts.run import RunFolder, point_name
from ppo_vs_dpo.compare.config import CompareStage, method_of
from ppo_vs_dpo.compare.statistics.clusters import clusters_of, near_training
from ppo_vs_dpo.preferences.schema import Text, prompt_id

REFERENCE = "sft"


@dataclass(frozen=True)
class Policy:
    """One contender.

    Attributes:
        name: ``"ppo"``, ``"dpo,beta=0.3"`` or a name from ``compare.policies``.
        method: ``"sft"``, one of `METHODS`, or ``"other"``.
        model: folder or Hub name; ``None`` where completions were made elsewhere.
        completions: a file of completions, or ``None``.
        point: the point of the sweep, or ``{"step": 8}`` along training.
        checkpoint: a point along training.
        identity: what the model depends on; a change makes its completions stale.
    """

    name: str
    method: str
    model: str | None = None
    completions: str | None = None
    point: dict[str, Any] = field(default_factory=dict)
    checkpoint: bool = False
    identity: Any = None


@dataclass(frozen=True)
class Prompts:
    """Held-out prompts, in a fixed order.

    Attributes:
        prompts: texts or conversations.
        ids: their fingerprints, all different.
        trained_on: how many were left out because some stage was trained on them.
        repeated: how many were left out because the same prompt stood there before.
        clusters: ``(P,)`` which of them are one unit of evidence (`clusters_of`); ``None``: each one is.
        near_training: how many are of a dialogue that was trained on, or near duplicates of a training prompt.
        answers: the chosen answer to each in the pairs that it was held out with; ``None`` where none is known.
    """

    prompts: list[Any]
    ids: list[str]
    trained_on: int = 0
    repeated: int = 0
    clusters: np.ndarray | None = None
    near_training: int = 0
    answers: Sequence[str | None] = ()

    @property
    def units(self) -> int:
        """How many units of evidence they are."""
        return len(self) if self.clusters is None else len(np.unique(self.clusters))

    def unit_of(self) -> dict[str, int] | None:
        """Prompt id -> its unit of evidence; ``None`` where each is one."""
        return None if self.clusters is None else dict(zip(self.ids, self.clusters.tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.ids)


def policies_of(run: RunFolder, settings: CompareStage) -> tuple[list[Policy], list[str]]:
    """Every finished policy of a run, its sweep points, and those the configuration adds; the reference first.

    Returns:
        The policies, and a warning for each main policy that has not finished.

    Raises:
        UserError: the reference has not finished, or nothing but it has; an added policy names neither or both.
    """
    run.require(REFERENCE)
    found, warnings = [], []
    for stage in (REFERENCE, "ppo", "dpo"):
        if run.done(stage) is None:
            warnings.append(f"{stage} has not finished in this run and is left out.")
            continue
        points = run.points(stage) if stage != REFERENCE else []
        warnings += rows_apart(run, stage, points)
        for name in [stage, *points]:
            done = run.done(name)
            point, identity = _point(name), model_content(run, name, done)
            method = method_of(stage, {**_section(run, stage), **point})
            found.append(Policy(name, method, **_source(run, name, done), point=point, identity=identity))
    along, missing = checkpoints_of(run, settings.checkpoints)
    found, warnings = found + along, warnings + missing
    digests = Digests(run.cache("policy_digests.json"))
    for name, source in (settings.policies or {}).items():
        found.append(_added(name, source, {policy.name for policy in found}, digests))
    digests.save()
    if len(found) < 2:
        raise UserError(
            f"{run.root} has only the reference policy: there is nothing to compare. Run ppo or dpo first."
        )
    return found, warnings


def rows_apart(run: RunFolder, stage: str, points: list[str]) -> list[str]:
    """A warning where points of a sweep differ from the main run in the rows of an update, and do not vary them.

    A finished result stays one whatever the ranks are now (`guards.fingerprints`); a point added on more of them has
    larger updates.
    """
    varied, own = {*ROWS, "rollout_batch_size"}, run.rows(stage)
    rows = {name: run.rows(name) for name in points if not varied & _point(name).keys()}
    others = [
        f"those of {name} of {count}" for name, count in rows.items() if None not in (own, count) and count != own
    ]
    if not others:
        return []
    said = f"Updates of {stage} were of {own} rows, {', '.join(others)} (other ranks, the same batch on each)"
    return [f"{said}: these points differ in more than the sweep's keys."]


def checkpoints_of(run: RunFolder, wanted: dict[str, Any]) -> tuple[list[Policy], list[str]]:
    """Checkpoints of the main runs as policies, and a warning for each that is not there.

    A missing checkpoint cannot be had without training again, so it costs a point of the frontier, not the report.
    """
    found, warnings = [], []
    digests = Digests(run.cache("checkpoint_digests.json"))
    for stage, steps in (wanted or {}).items():
        done = run.done(stage)
        if done is None:
            continue
        kept = _checkpoints(run.stage_dir(stage) / "checkpoints")
        figures = done.get("figures") or {}
        last = figures.get("updates", figures.get("steps"))
        for step in sorted(kept) if steps == "all" else sorted(set(steps)):
            if step == last:
                continue  # the main policy itself
            if step not in kept:
                there = ", ".join(map(str, sorted(kept))) or "none"
                warnings.append(
                    f"{stage} has no checkpoint of step {step} (there: {there}) and its point is left out of the "
                    f"frontier. {stage}.save_steps and {stage}.save_total_limit say which are kept."
                )
                continue
            point = {"step": step}
            name, identity = point_name(stage, point), _weights(kept[step], digests)
            method = method_of(stage, _section(run, stage))
            found.append(Policy(name, method, str(kept[step]), point=point, checkpoint=True, identity=identity))
    digests.save()
    return found, warnings


def _section(run: RunFolder, stage: str) -> dict[str, Any]:
    return dict(run.config.get(stage) or {})


def _checkpoints(folder: Path) -> dict[int, Path]:
    """Step -> folder of every checkpoint that holds a whole model or an adapter."""
    found = {}
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdigit() and (any(path.glob("model*.safetensors")) or (path / "adapter_config.json").is_file()):
            found[int(number)] = path
    return found


def _added(name: str, source: Any, taken: set[str], digests: Digests) -> Policy:
    where = f"compare.policies.{name}"
    if name in taken or name.startswith("best_of_"):
        raise UserError(f"{where}: the name is taken. Choose another.")
    if not isinstance(source, dict) or len(set(source) & {"path", "completions"}) != 1:
        raise UserError(f"{where}: give either path: MODEL or completions: FILE.")
    if "path" in source:
        return Policy(name, "other", model=str(source["path"]), identity=_content(source["path"], digests))
    if not Path(source["completions"]).is_file():
        raise UserError(f"{where}.completions: {source['completions']} does not exist.")
    identity = _content(source["completions"], digests)
    return Policy(name, "other", completions=str(source["completions"]), identity=identity)


def model_content(run: RunFolder, name: str, done: dict[str, Any]) -> str:
    """Hash of a finished stage's model: as its last word lists the files, or of the files themselves."""
    if "given" in (done.get("figures") or {}):
        return done["fingerprint"]  # made by `pipeline.comparing` from what lies elsewhere
    return (
        content_id(done, "model/") if done.get("outputs") else _content(run.stage_dir(name) / "model", Digests(None))
    )


def _content(path: str | Path, digests: Digests) -> str:
    """Hash of a file or a folder; a Hub name has no more than its name."""
    return digests.of(Path(path)) if Path(path).exists() else str(path)


def _weights(folder: Path, digests: Digests) -> list[str]:
    """Hashes of a checkpoint's model, without the optimizer's state beside it."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")])
    return [digests.of(path) for path in files]


def _source(run: RunFolder, name: str, done: dict[str, Any]) -> dict[str, str]:
    """Where a stage's policy is: its model, or in a comparison of given outputs their file."""
    outputs = (done.get("figures") or {}).get("completions")
    return {"model": str(run.stage_dir(name) / "model")} if outputs is None else {"completions": outputs}


def is_given(run: RunFolder) -> bool:
    """Whether this is a comparison of policies that were given, not a run that trained any."""
    return run.config.get("given") is not None


def unmeasured(policies: list[Policy], learned: dict[str, dict[str, Any]]) -> list[str]:
    """Why a policy has no KL, a sentence each."""
    found = []
    for policy in policies:
        if policy.completions is not None:
            found.append(f"{policy.name} has no KL: its completions come from a file, and its model is not known.")
        elif policy.method == "other" and not (learned.get(policy.name) or {}).get("measurable", True):
            found.append(f"{policy.name} has no KL: its vocabulary is another than the reference's.")
    return found


def _point(name: str) -> dict[str, Any]:
    from ppo_vs_dpo.artifacts.stage import parse_point

    _, _, rest = name.partition(",")
    return parse_point(rest) if rest else {}


# What some stage was trained on.
TRAINING = (("data", "prompts_train.parquet"), ("pairs", "train.parquet"), ("data", "sft_train.parquet"))


def training_prompts(run: RunFolder) -> Iterator[tuple[str, Any]]:
    """Every prompt that some stage of this run was trained on, once, behind its fingerprint."""
    seen: set[str] = set()
    for parts in TRAINING:
        path = run.path(*parts)
        table = read_parquet(path) if path.is_file() else None
        if table is None or "prompt" not in table.column_names:
            continue
        # Whole chunks of the two columns: a row at a time, with all that it holds, takes a hundred times as long.
        names = [name for name in ("prompt", "prompt_id") if name in table.column_names]
        for chunk in table.select_columns(names).with_format("arrow").iter(batch_size=1_000):
            prompts = chunk.column("prompt").to_pylist()
            ids = chunk.column("prompt_id").to_pylist() if "prompt_id" in names else map(prompt_id, prompts)
            for identity, prompt in zip(ids, prompts, strict=True):
                if identity not in seen:
                    seen.add(identity)
                    yield identity, prompt


def heldout_prompts(run: RunFolder, limit: int, near_duplicate: float = 1.0) -> Prompts:
    """The first ``limit`` different held-out prompts that no training split holds, and which of them belong together.

    Raises:
        UserError: there is none, or all of them were trained on.
    """
    _, table, ids, kept, dropped = _untrained(run)
    repeated = len(ids) - dropped - len(kept)
    kept = kept[:limit]
    texts = [table[row]["prompt"] for row in kept]
    near = len(near_training(texts, (prompt for _, prompt in training_prompts(run)), near_duplicate))
    clusters, answers = clusters_of(texts, near_duplicate), [None] * len(kept)
    if "reference" in table.column_names:
        answers = [_text(table[row]["reference"]) for row in kept]
    return Prompts(texts, [ids[row] for row in kept], dropped, repeated, clusters, near, answers)


def validation_prompts(run: RunFolder, reported: Prompts, wanted: int, near_duplicate: float) -> Prompts:
    """The next ``wanted`` held-out prompts that are not reported on, nor one unit of evidence with one that is.

    Raises:
        UserError: there is none.
    """
    path, table, ids, kept, _ = _untrained(run)
    taken = set(reported.ids)
    rest = [row for row in kept if ids[row] not in taken][: 2 * wanted]
    texts = [table[row]["prompt"] for row in rest]
    label = clusters_of([*reported.prompts, *texts], near_duplicate)
    of_reported = set(np.asarray(label[: len(reported)]).tolist())
    rest = [row for row, unit in zip(rest, label[len(reported) :], strict=True) if unit not in of_reported][:wanted]
    if len(rest) < 2:
        raise UserError(
            f"compare.select has no validation prompts: {path} holds {len(kept)} different held-out prompts, and "
            f"{len(reported)} of them are reported on. Lower compare.n_prompts, or hold more prompts out."
        )
    texts = [table[row]["prompt"] for row in rest]
    return Prompts(texts, [ids[row] for row in rest], clusters=clusters_of(texts, near_duplicate))


def _untrained(run: RunFolder) -> tuple[Path, Any, list[str], list[int], int]:
    """The file of held-out prompts, its rows, their fingerprints, the rows that are different and untrained, and how
    many were trained on."""
    path = run.path("data", "prompts_heldout.parquet")
    table = read_parquet(path, ["prompt"])
    known = "prompt_id" in table.column_names
    ids = table["prompt_id"][:] if known else [prompt_id(prompt) for prompt in table["prompt"][:]]
    if not ids:
        raise UserError(f"{path} holds no prompts.")
    trained = {identity for identity, _ in training_prompts(run)}
    untrained = [row for row in range(len(ids)) if ids[row] not in trained]
    # The same prompt twice would get the same completions twice.
    first: dict[str, int] = {}
    for row in untrained:
        first.setdefault(ids[row], row)
    if not first:
        raise UserError(
            f"all {len(ids)} prompts of {path} were trained on in this run. A comparison needs prompts held out from "
            f"SFT, the pairs and PPO: make the split again (data step), or give other prompts."
        )
    return path, table, ids, list(first.values()), len(ids) - len(untrained)


def _text(answer: Text | None) -> str | None:
    return answer if answer is None or isinstance(answer, str) else str(answer[0]["content"])


def check_pair_set(run: RunFolder) -> dict[str, Any] | None:
    """The pair set of the run, after checking that both branches were trained on it (papers.md 3.8.6).

    Returns:
        ``hash``, ``n_train``, ``n_test``, ``branches`` (stage -> the hash it recorded), ``same``, ``trained_on``
        (stage -> what it really trained on: `models.text.trained_on`) and ``differences`` between those, in words;
        ``None`` where policies were given and nothing was trained.

    Raises:
        UserError: a branch recorded another hash.
    """
    if is_given(run):
        return None
    pairs = run.require("pairs")["figures"]["pair_set"]
    branches, trained, soft = {}, {}, {}
    for stage in ("reward_model", "dpo", *run.points("dpo")):
        figures = (run.done(stage) or {}).get("figures") or {}
        recorded = figures.get("pair_set")
        if recorded is not None:
            branches[stage] = recorded["hash"] if isinstance(recorded, dict) else recorded
        if figures.get("trained_on"):
            trained[stage], soft[stage] = figures["trained_on"], figures.get("soft_labels")
    different = [stage for stage, value in branches.items() if value != pairs["hash"]]
    if different:
        raise UserError(
            f"the branches were trained on different pairs: {', '.join(different)} on pair set "
            f"{branches[different[0]][:12]}, the run's pairs are {pairs['hash'][:12]}. A comparison of PPO and DPO on "
            f"different data says nothing about the methods; train {', '.join(different)} again."
        )
    differences = pair_differences(trained, soft)
    return {
        **pairs,
        "branches": branches,
        "same": {"reward_model", "dpo"} <= set(branches) and len({own["hash"] for own in trained.values()}) < 2,
        "trained_on": trained,
        "differences": differences,
    }


def pair_differences(trained: dict[str, dict[str, Any]], soft_labels: dict[str, bool | None]) -> list[str]:
    """Where the branches did not learn the same from the same pairs; a sentence each.

    ``soft_labels``: stage -> whether it took the pairs' probabilities, where they have any.
    """
    first = trained.get("reward_model")
    found = []
    for stage, own in trained.items():
        if own["epochs"] is not None and own["epochs"] < 0.999:
            found.append(f"{stage} saw {own['epochs']:.0%} of its {own['pairs']} training pairs.")
        if first is None or stage == "reward_model":
            continue
        if own["hash"] != first["hash"]:
            advice = (
                " Give reward_model.max_length and dpo.max_length the same value."
                if own["left_out"] != first["left_out"]
                else ""
            )
            found.append(
                f"The reward model and {stage} did not train on the same pairs: {first['pairs']} against "
                f"{own['pairs']} (left out: {first['left_out']} and {own['left_out']}).{advice}"
            )
        if soft_labels.get(stage) != soft_labels.get("reward_model"):
            which = ("the reward model", stage) if soft_labels.get("reward_model") else (stage, "the reward model")
            found.append(f"{which[0]} took the pairs' soft labels, {which[1]} took every pair for certain.")
    return found
