"""What to change so that a stage fits: the mildest settings first, then more GPUs."""

import dataclasses
from typing import Any, NamedTuple

from ppo_vs_dpo.pipeline.planning.estimate import Job, estimate
from ppo_vs_dpo.pipeline.planning.memory import Gpu, Shape, Sharding


class Change(NamedTuple):
    """Something to set in the configuration that saves memory.

    Attributes:
        text: as it is written on the command line.
        job: fields of `Job` that it sets.
        sharding: fields of `Sharding` that it sets.
    """

    text: str
    job: dict[str, Any] = {}
    sharding: dict[str, Any] = {}


def changes(job: Job, sharding: Sharding) -> list[Change]:
    """Changes that save memory, mildest first."""
    stage, pairs = job.stage, 1 if job.stage in ("sft", "ppo") else 2
    found = []
    if not job.checkpointing:
        found.append(Change(f"{stage}.gradient_checkpointing=true", {"checkpointing": True}))
    stages = [number for number in (2, 3) if number > (sharding.stage or 0) and sharding.ranks > 1]
    found += [Change(f"deepspeed=zero{number}", {}, {"stage": number}) for number in stages]
    rows = job.rows // pairs
    while rows > 1:
        rows //= 2
        found.append(Change(f"{stage}.per_device_train_batch_size={rows}", {"rows": rows * pairs}))
    best = max(2, sharding.stage or 0, *stages)
    if not sharding.offload_optimizer and best == 2:
        found.append(Change("deepspeed=zero2_offload", {}, {"stage": 2, "offload_optimizer": True}))
    if not sharding.offload_weights:
        everything = {"stage": 3, "offload_optimizer": True, "offload_weights": True}
        found.append(Change("deepspeed=zero3_offload", {}, everything))
    if job.adapters is None:
        adapters = (16, ("q_proj", "v_proj", "query_key_value"))
        found.append(Change(f"{stage}.lora={{r: 16, alpha: 32}}", {"adapters": adapters, "reference": False}))
    if stage == "ppo" and not job.server:
        # A tensor-parallel server on GPUs of its own: the policy is whole on no trainer's GPU.
        found.append(Change("ppo.generation_engine=vllm ppo.vllm_mode=server", {"server": True}))
    if stage == "ppo" and not job.shared:
        # Of no use without adapters; `fitting` takes it together with them.
        found.append(Change("ppo.shared_base=true reward_model.lora={r: 16, alpha: 32}", {"shared": True}))
    return found


def changed(job: Job, sharding: Sharding, taken: list[Change]) -> tuple[Job, Sharding]:
    """Work and spread after some changes, in their order."""
    for change in taken:
        job, sharding = dataclasses.replace(job, **change.job), dataclasses.replace(sharding, **change.sharding)
    return job, sharding


def fitting(shape: Shape, job: Job, sharding: Sharding, gpu: Gpu) -> list[Change] | None:
    """The mildest changes with which a stage fits, none of them idle; ``None`` where all together are too little."""

    def fits(taken: list[Change]) -> bool:
        return estimate(shape, *changed(job, sharding, taken), gpu).peak <= gpu.usable

    taken: list[Change] = []
    for change in changes(job, sharding):
        taken.append(change)
        if fits(taken):
            for earlier in taken[:-1]:
                without = [c for c in taken if c is not earlier]
                # A shared base is made of adapters.
                possible = changed(job, sharding, without)[0]
                if (possible.adapters or not possible.shared) and fits(without):
                    taken = without
            return taken
    return None


def advice(shape: Shape, job: Job, sharding: Sharding, gpu: Gpu) -> str:
    """What makes a stage fit: the mildest changes together, or more GPUs; or that nothing here does."""
    taken = fitting(shape, job, sharding, gpu)
    if taken is not None:
        return "add " + " ".join(change.text for change in taken)
    for factor in (2, 4, 8, 16, 32, 64):
        more = dataclasses.replace(sharding, stage=3, ranks=sharding.ranks * factor)
        if estimate(shape, job, more, gpu).peak <= gpu.usable:
            return f"deepspeed=zero3 on {more.ranks} GPUs"
        if job.stage == "ppo":
            served = dataclasses.replace(job, server=True)
            if estimate(shape, served, more, gpu).peak <= gpu.usable:
                return f"deepspeed=zero3 on {more.ranks} GPUs, ppo.generation_engine=vllm ppo.vllm_mode=server"
    return "no change here helps: a smaller model, or GPUs with more memory"
