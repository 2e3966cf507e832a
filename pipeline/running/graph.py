"""Which jobs a run consists of, what each depends on, and which of them are done, stale or to do."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_marker
from ppo_vs_dpo.artifacts.guards import replaced
from ppo_vs_dpo.artifacts.guards.digests import Digests
from ppo_vs_dpo.artifacts.guards.fingerprints import Made, fingerprints, needs_of, point_name, points_of
from ppo_vs_dpo.artifacts.run import STAGES, STARTED_KEYS, RunFolder
from ppo_vs_dpo.pipeline.planning.gpus import ranks_of

# Stages that run on several ranks when launch.processes says so.
DISTRIBUTED = ("sft", "reward_model", "dpo", "ppo", "compare")


@dataclass
class Job:
    """One process to run: a stage, or a point of its sweep.

    Attributes:
        name: ``"ppo"`` or ``"ppo,kl_coef=0.0"``.
        stage: ``"ppo"``.
        point: ``{}`` or ``{"kl_coef": 0.0}``.
        needs: names of the jobs whose results it reads.
        made: what it depends on, and the hash of all that.
        state: ``done``, ``stale`` (finished, but with other inputs), ``todo`` or ``part`` (has checkpoints).
        because: for a stale job, what changed; for one whose files are not whole any more, which.
        kept: an earlier result, made from just this and moved aside since.
        spared: of its needs, those it can do without: read where they are done, not asked for where they are not.
    """

    name: str
    stage: str
    point: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    made: Made = field(default_factory=lambda: Made("", {}))
    state: str = "todo"
    because: str = ""
    kept: Path | None = None
    spared: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Hash of all it depends on."""
        return self.made.fingerprint

    @property
    def parts(self) -> dict[str, str]:
        """Hash of each thing the fingerprint is made of, so that a change can be named."""
        return self.made.parts


def build(run: RunFolder, digests: Digests | None = None) -> list[Job]:
    """The jobs of a run in an order that respects their needs, fingerprints and states filled in.

    Hashes of large files are remembered in the run's cache; not where ``digests`` are given: a run that is not begun
    yet, and may be refused, leaves no trace.
    """
    taken = digests if digests is not None else Digests(run.cache("digests.json"))
    jobs = []
    try:
        ranks = ranks_of(run.config.get("launch"))
    except UserError:  # a hostfile is gone, a driver hangs: said where something is started, and what is done is done
        ranks = None
    known = fingerprints(run.config, taken, ranks, run.begun)
    if digests is None:
        taken.save()
    for stage in STAGES:
        for point in [{}, *points_of(run.config, stage)]:
            job = Job(point_name(stage, point), stage, point, needs_of(run.config, stage))
            job.made = known[job.name]
            job.spared = spared(run.config, stage)
            _set_state(run, job)
            jobs.append(job)
    return jobs


def spared(config: DictConfig, stage: str) -> tuple[str, ...]:
    """The reward model, where PPO's reward is made of functions only: then nothing but best-of-n would read it."""
    if stage not in ("ppo", "compare"):
        return ()
    section = config.get("ppo") or {}
    reward = section.get("reward") or "reward_model"
    parts = [reward] if isinstance(reward, str) else list(reward)
    return ("reward_model",) if section.get("gold_reward") or "reward_model" not in parts else ()


def _set_state(run: RunFolder, job: Job) -> None:
    folder = run.stage_dir(job.name)
    done = run.done(job.name)
    before = read_marker(folder / "started.json", set_aside=True, keys=STARTED_KEYS) or done
    parts = (before or {}).get("parts") or {}
    changed = [name for name in job.parts if before is not None and parts.get(name) != job.parts[name]]
    if done is not None and done.get("fingerprint") == job.fingerprint:
        job.state = "done"
        return
    if before is not None and before.get("fingerprint") != job.fingerprint:
        job.state, job.because = "stale", ", ".join(changed) or "its inputs"
    elif before is not None:
        job.state = "part"
        damaged = run.damage(job.name)
        job.because = damaged[0] if damaged else ""
    kept = replaced.find(run.root, job.name, job.fingerprint)
    if kept is not None and (job.state != "part" or (kept / "done.json").is_file()):
        job.kept = kept
        if not (kept / "done.json").is_file():
            job.state, job.because = "part", ""


def select(run: RunFolder, jobs: list[Job], stages: list[str]) -> list[Job]:
    """The jobs of the chosen stages that are not done.

    Raises:
        UserError: one of them needs a job that is neither chosen nor done, or would go on with updates of other rows.
    """
    by_name = {job.name: job for job in jobs}
    chosen = [job for job in jobs if job.stage in stages and job.state != "done"]
    for job in chosen:
        run.refuse_other_rows(job.name, job.made)
        for need in job.needs:
            other = by_name[need]
            if other.stage not in stages and other.state != "done" and need not in job.spared:
                reason = f"it is stale ({other.because} changed)" if other.state == "stale" else "it has not finished"
                raise UserError(
                    f"stage {job.name} needs {other.name}, which is not among stages={list(stages)}, and {reason}. "
                    f"Add {other.stage} to stages."
                )
    return chosen
