"""What a training stage needs on one rank: memory by role and phase, arithmetic, and the least time it takes."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from ppo_vs_dpo.pipeline.planning import memory
from ppo_vs_dpo.pipeline.planning.memory import Gpu, Part, Shape, Sharding

# What decoding does (models.sampling: generation.SamplingConfig, kv_cache, weights), without importing torch for it.
ROWS, SHARE, PICKING, BUCKET = 256, 0.8, 24, 1e9


@dataclass(frozen=True)
class Job:
    """What a training stage does, as far as memory and arithmetic go.

    Attributes:
        stage: ``sft``, ``reward_model``, ``dpo`` or ``ppo``.
        rows: sequences of one forward and backward pass on a rank (a pair is two).
        updates_rows: sequences of one optimizer step (PPO: of one rollout), over all ranks.
        prompt: tokens.
        response: tokens.
        checkpointing: activations are computed again in the backward pass.
        adapters: ``(rank, target modules)``; ``None`` trains everything.
        epochs: PPO's passes over a rollout.
        forward_rows: PPO's rows of a forward pass without gradients.
        reference: whether a frozen reference is in memory beside the model.
        reward: how many reward models are.
        shared: PPO's roles are adapters on one base (``ppo.shared_base``).
        server: a vLLM server on other GPUs samples (``ppo.vllm_mode``).
        critic: PPO trains a value model beside the policy.
        trained: share of PPO's responses that the update trains on (online DPO: two of a prompt's k).
    """

    stage: str
    rows: int
    updates_rows: int
    prompt: int
    response: int
    checkpointing: bool = False
    adapters: tuple[int, tuple[str, ...]] | None = None
    epochs: int = 1
    forward_rows: int = 64
    reference: bool = False
    reward: int = 0
    shared: bool = False
    server: bool = False
    critic: bool = True
    trained: float = 1.0

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.prompt + self.response


@dataclass
class Estimate:
    """The figures of one stage on one rank.

    Attributes:
        parts: what each role holds all the time.
        phases: bytes that come and go, by phase of the work; phases do not overlap.
        flops: of one update, over all ranks.
        seconds: the floor of its time, by phase.
    """

    parts: list[Part]
    phases: dict[str, dict[str, float]] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def held(self) -> float:
        """Bytes on the GPU between phases."""
        return sum(part.gpu for part in self.parts)

    @property
    def peak(self) -> float:
        """Bytes on the GPU in the hungriest phase."""
        return self.held + max(sum(extra.values()) for extra in self.phases.values())


def estimate(shape: Shape, job: Job, sharding: Sharding, gpu: Gpu) -> Estimate:
    """All figures of a stage.

    Args:
        shape: of the policy; value and reward models have its backbone.
        job: what the stage does.
        sharding: how it is spread.
        gpu: on what.
    """
    rank, targets = job.adapters or (0, ())

    def part(role: str, parameters: int, trains: bool) -> Part:
        if not trains:
            frozen = dataclasses.replace(sharding, offload_optimizer=False)
            return memory.held(role, parameters, 0, frozen)
        trained = parameters if job.adapters is None else shape.adapters(rank, list(targets))
        extra = 0 if job.adapters is None else trained
        return memory.held(role, parameters + extra, trained, sharding)

    if job.stage == "ppo":
        return _ppo(shape, job, sharding, gpu, part)
    scalar = job.stage == "reward_model"
    parameters = shape.scalar_parameters if scalar else shape.parameters
    parts = [part("model", parameters, True)]
    if job.reference:
        parts.append(part("reference", shape.parameters, False))
    result = Estimate(parts)
    tokens = job.rows * job.length
    positions = {"sft": tokens, "dpo": job.rows * job.response, "reward_model": 0}[job.stage]
    result.phases["update"] = {
        "activations": memory.activations(shape, tokens, job.checkpointing, sharding.half),
        "logits": memory.logits_bytes(shape, positions, sharding.half),
        "gathered weights": memory.live_weights(parameters, sharding),
        "message": memory.message_bytes(parameters, sharding),
    }
    passes = 3 + job.checkpointing + job.reference  # a backward pass is two forward passes (KAP)
    logits = 0 if scalar else job.updates_rows * positions // job.rows
    result.flops["update"] = passes * memory.forward_flops(shape, job.updates_rows, job.length, logits)
    result.seconds["update"] = result.flops["update"] / (sharding.ranks * gpu.flops)
    return result


def _ppo(shape: Shape, job: Job, sharding: Sharding, gpu: Gpu, part: Callable[[str, int, bool], Part]) -> Estimate:
    both = shape.parameters + job.critic * shape.scalar_parameters
    if job.shared:
        parts = _on_one_base(shape, job, sharding)
    else:
        parts = [part("policy", shape.parameters, True)]
        if job.critic:
            parts.append(part("value", shape.scalar_parameters, True))
        if job.reference:
            parts.append(part("reference", shape.parameters, False))
        if job.reward:
            parts.append(part("reward", job.reward * shape.scalar_parameters, False))
    result = Estimate(parts)
    half, width = sharding.half, sharding.width
    mine = math.ceil(job.updates_rows / sharding.ranks)
    # ZeRO-3 gathers the whole policy once per rollout; to a server it goes in buckets (models.sampling.weights).
    whole = width * shape.parameters if sharding.stage == 3 else 0.0
    if job.server:
        whole = min(BUCKET, width * shape.parameters)
    row = memory.cache_bytes(shape, 1, job.length - 1, half) + shape.vocabulary * PICKING
    # At most as many rows as the free memory takes (models.sampling.kv_cache), and one.
    room = int(SHARE * (gpu.usable - result.held - whole)) // int(row)
    decoding = max(1, min(mine, ROWS, room))
    live = memory.live_weights(both, sharding)
    tokens, seen = job.rows * job.length, min(job.forward_rows, mine) * job.length
    result.phases = {
        "generate": {
            "gathered weights": whole,
            "KV cache": 0.0 if job.server else memory.cache_bytes(shape, decoding, job.length - 1, half),
            "logits": 0.0 if job.server else decoding * shape.vocabulary * float(PICKING),
        },
        "forward": {
            "gathered weights": live,
            "activations": memory.activations(shape, seen, False, half) / shape.layers,
            "logits": memory.logits_bytes(shape, min(job.forward_rows, mine) * job.response, half) / 2,
        },
        "update": {
            "gathered weights": live,
            # The graphs of policy and value model are there at once.
            "activations": (1 + job.critic) * memory.activations(shape, tokens, job.checkpointing, half),
            "logits": memory.logits_bytes(shape, job.rows * job.response, half),
            "message": memory.message_bytes(both, sharding),
        },
    }
    one = memory.forward_flops(shape, job.updates_rows, job.length, job.updates_rows * job.response)
    scalar = memory.forward_flops(shape, job.updates_rows, job.length)
    result.flops = {
        "generate": one,
        # Policy and reference (with adapters the same weights twice), value and reward model.
        "forward": 2 * one + (job.critic + job.reward) * scalar,
        "update": job.trained * job.epochs * (3 + job.checkpointing) * (one + job.critic * scalar),
    }
    result.seconds = {name: flops / (sharding.ranks * gpu.flops) for name, flops in result.flops.items()}
    # Each decoding step reads all weights of the policy once (POPE, section 3.1).
    steps = job.response * math.ceil(mine / decoding)
    result.seconds["generate"] = max(result.seconds["generate"], steps * width * shape.parameters / gpu.bandwidth)
    return result


def _on_one_base(shape: Shape, job: Job, sharding: Sharding) -> list[Part]:
    """The base once, and each role's adapter (and head) beside it."""
    rank, targets = job.adapters
    adapter = shape.adapters(rank, list(targets))
    roles = {"base": (shape.parameters, 0), "policy": (adapter, adapter)}
    if job.critic:
        roles["value"] = (adapter + shape.hidden, adapter + shape.hidden)
    if job.reward:
        roles["reward"] = (adapter + shape.hidden, 0)
    return [memory.held(role, parameters, trained, sharding) for role, (parameters, trained) in roles.items()]
