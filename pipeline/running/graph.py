"""Which jobs a run consists of, what each depends on, and which of them are done, stale or to do."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import fingerprint_file, read_json, sha256_of
from ppo_vs_dpo.artifacts.run import STAGES, RunFolder, point_name

# What a stage reads from other stages' folders.
NEEDS = {
    "data": (),
    "sft": ("data",),
    "pairs": ("data", "sft"),
    "reward_model": ("sft", "pairs"),
    "dpo": ("sft", "pairs"),
    "ppo": ("data", "sft", "reward_model"),
    "compare": ("data", "sft", "pairs", "reward_model", "dpo", "ppo"),
}
# What a stage reads from the configuration, besides its own section and the seed.
READS = {
    "data": ("model",),
    "sft": ("model",),
    "pairs": ("data", "model"),
    "reward_model": ("model", "data"),
    "dpo": ("model",),
    "ppo": ("model", "data"),
    "compare": ("model", "data"),
}
# Stages that run on several ranks when launch.processes says so.
DISTRIBUTED = ("sft", "reward_model", "dpo", "ppo", "compare")
# Keys that change how a result is made, not what it is.
COSMETIC = ("report_to", "disable_tqdm", "logging_steps", "run_name", "workers")
COSMETIC += ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision")
# Settings that may name a local file or folder, whose content then counts.
INPUT_KEYS = (
    "model.path",
    *(f"data.{key}" for key in ("path", "test_path", "prompts_path", "sft_path", "constitution", "few_shot")),
    *("data.policy", "data.reward_model", "dpo.reference_path"),
)


@dataclass
class Job:
    """One process to run: a stage, or a point of its sweep.

    Attributes:
        name: ``"ppo"`` or ``"ppo,kl_coef=0.0"``.
        stage: ``"ppo"``.
        point: ``{}`` or ``{"kl_coef": 0.0}``.
        needs: names of the jobs whose results it reads.
        fingerprint: hash of all it depends on.
        state: ``done``, ``stale`` (finished, but with other inputs), ``todo`` or ``part`` (has checkpoints).
        because: for a stale job, what changed.
        parts: hash of each thing the fingerprint is made of, so that a change can be named.
    """

    name: str
    stage: str
    point: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    fingerprint: str = ""
    state: str = "todo"
    because: str = ""
    parts: dict[str, str] = field(default_factory=dict)


def points_of(config: DictConfig, stage: str) -> list[dict[str, Any]]:
    """Points of a stage's sweep, ``{"kl_coef": [0, 1]}`` -> ``[{"kl_coef": 0}, {"kl_coef": 1}]``.

    A value equal to the main run's is left out: that point is the main run.
    """
    section = config.get(stage)
    sweep = OmegaConf.to_container(section.get("sweep"), resolve=True) if section and section.get("sweep") else {}
    return [{key: value} for key, values in sweep.items() for value in values if value != section.get(key)]


def build(run: RunFolder) -> list[Job]:
    """The jobs of a run in an order that respects their needs, fingerprints and states filled in."""
    inputs = external_inputs(run.config)
    jobs: dict[str, Job] = {}
    for stage in STAGES:
        needs = NEEDS[stage]
        if stage == "compare":
            needs = (*needs, *(name for name, job in jobs.items() if job.point))
        for point in [{}, *points_of(run.config, stage)]:
            job = Job(point_name(stage, point), stage, point, needs)
            job.fingerprint, parts = fingerprint(run.config, job, jobs, inputs)
            _set_state(run, job, parts)
            jobs[job.name] = job
    return list(jobs.values())


def external_inputs(config: DictConfig) -> dict[str, str]:
    """Fingerprints of the local files that the configuration names: a changed file makes what read it stale."""
    found = {}
    for key in INPUT_KEYS:
        value = OmegaConf.select(config, key)
        if isinstance(value, str) and Path(value).exists():
            found[key] = fingerprint_file(value)
    return found


def fingerprint(
    config: DictConfig, job: Job, upstream: dict[str, Job], inputs: dict[str, str]
) -> tuple[str, dict[str, str]]:
    """Hash of what a job's result depends on, and the hash of each part under its name."""
    own = OmegaConf.to_container(config.get(job.stage, OmegaConf.create({})), resolve=True)
    own = {key: value for key, value in own.items() if key not in (*COSMETIC, "sweep")}
    parts = {f"the settings of {job.stage}": sha256_of([own, job.point]), "the seed": str(config.get("seed"))}
    for section in READS[job.stage]:
        if config.get(section) is not None:
            parts[f"the section {section}"] = sha256_of(OmegaConf.to_container(config[section], resolve=True))
    parts |= {
        f"the content of {key}": value
        for key, value in inputs.items()
        if key.split(".")[0] in READS[job.stage] or key.split(".")[0] == job.stage
    }
    parts |= {f"stage {name}": upstream[name].fingerprint for name in job.needs}
    return sha256_of(parts), parts


def _set_state(run: RunFolder, job: Job, parts: dict[str, str]) -> None:
    folder = run.stage_dir(job.name)
    done = run.done(job.name)
    started = folder / "started.json"
    before = read_json(started) if started.is_file() else None
    changed = [name for name in parts if before is not None and before["parts"].get(name) != parts[name]]
    job.parts = parts
    if done is not None and done.get("fingerprint") == job.fingerprint:
        job.state = "done"
    elif before is not None and before["fingerprint"] != job.fingerprint:
        job.state, job.because = "stale", ", ".join(changed) or "its inputs"
    elif before is not None:
        job.state = "part"


def select(jobs: list[Job], stages: list[str]) -> list[Job]:
    """The jobs of the chosen stages that are not done.

    Raises:
        UserError: one of them needs a job that is neither chosen nor done.
    """
    by_name = {job.name: job for job in jobs}
    chosen = [job for job in jobs if job.stage in stages and job.state != "done"]
    for job in chosen:
        for need in job.needs:
            other = by_name[need]
            if other.stage not in stages and other.state != "done":
                reason = f"it is stale ({other.because} changed)" if other.state == "stale" else "it has not finished"
                raise UserError(
                    f"stage {job.name} needs {other.name}, which is not among stages={list(stages)}, and {reason}. "
                    f"Add {other.stage} to stages."
                )
    return chosen
