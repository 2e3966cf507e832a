"""What a training stage needs on one rank: memory by role and phase, arithmetic, and the least time it takes."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from ppo_vs_dpo.pipeline.planning import memory
from ppo_vs_dpo.pipeline.planning.memory import Gpu, Part, Shape, Sharding

# What decoding does (models.sampling: generation.SamplingConfig, kv_cache, weights), without importing torch for it.
ROWS, SHARE, PICKING, BUCKET = 256, 0.8, 24, 1e9
# To a server by vLLM's own transfer: two messages beside the bucket (models.sampling.vllm.transfer).
MESSAGES = 2 * BUCKET / 4


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
        colocated: share of the GPU that vLLM takes in the trainer's process while it samples (asleep it takes none).
        passes: forward and backward passes of one optimizer step; with one, no gradients are there beside its
            activations.
        quantized: adapters are on a base in 4 bits (``lora.load_in_4bit``).
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
    colocated: float = 0.0
    passes: int = 2
    quantized: bool = False

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
    """
    rank, targets = job.adapters or (0, ())

    def part(role: str, parameters: int, trains: bool) -> Part:
        if not trains:
            frozen = dataclasses.replace(sharding, offload_optimizer=False)
            halved = job.reward * shape.multiplied if role == "reward" else shape.frozen_linear(parameters)
            return memory.held(role, parameters, 0, frozen, halved=halved)
        trained = parameters if job.adapters is None else shape.adapters(rank, list(targets))
        extra = 0 if job.adapters is None else trained
        frozen = {"halved": _halved(shape, job, parameters), "quantized": _quantized(shape, job)}
        return memory.held(role, parameters + extra, trained, sharding, **frozen)

    if job.stage == "ppo":
        return _ppo(shape, job, sharding, gpu, part)
    scalar = job.stage == "reward_model"
    parameters = shape.scalar_parameters if scalar else shape.parameters
    parts = [part("model", parameters, True)]
    if job.reference:
        parts.append(part("reference", shape.parameters, False))
    result = Estimate(parts)
    # SFT learns the completions, too.
    positions = 0 if scalar else job.rows * job.response
    trains, kept = job.adapters is None, (1 if scalar else job.response) / job.length
    logits = 0.0 if scalar else memory.fused_head(shape, positions, trains, sharding)
    result.phases["update"] = {
        **_passes(shape, job, sharding, kept, 1, logits, head=not scalar),
        "gathered weights": memory.live_weights(parameters, sharding),
        "message": memory.message_bytes(parameters, sharding, job.passes),
    }
    _first_pass(result, job, sharding)
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
    logits = memory.logits_bytes(shape, job.rows * job.response, half)
    mine = math.ceil(job.updates_rows / sharding.ranks)
    # ZeRO-3 gathers the whole policy once per rollout; to a server it goes in buckets (models.sampling.weights).
    whole = width * shape.parameters if sharding.stage == 3 else 0.0
    if job.server or job.colocated:
        whole = min(BUCKET, width * shape.parameters) + (MESSAGES if job.server else 0.0)
    elsewhere = job.server or job.colocated
    row = memory.cache_bytes(shape, 1, job.length - 1, half) + shape.vocabulary * PICKING
    # At most as many rows as the free memory takes (models.sampling.kv_cache), and one.
    room = int(SHARE * (gpu.usable - result.held - whole)) // int(row)
    decoding = max(1, min(mine, ROWS, room))
    live = memory.live_weights(both, sharding)
    seen = min(job.forward_rows, mine) * job.length
    result.phases = {
        "generate": {
            "gathered weights": whole,
            # Its share, or what its weights ask for: each rank's engine holds them whole.
            "vLLM": max(job.colocated * gpu.memory, width * shape.parameters) if job.colocated else 0.0,
            "casts": 0.0 if elsewhere else _casts(shape, job, sharding),
            "KV cache": 0.0 if elsewhere else memory.cache_bytes(shape, decoding, job.length - 1, half),
            "logits": 0.0 if elsewhere else decoding * shape.vocabulary * float(PICKING),
        },
        "forward": {
            "gathered weights": live,
            "casts": _casts(shape, job, sharding),
            "activations": memory.activations(shape, seen, False, sharding).kept / shape.layers,
            "logits": memory.logits_bytes(shape, min(job.forward_rows, mine) * job.response, half) / 2,
        },
        "update": {
            "gathered weights": live,
            # The graphs of policy and value model are there at once.
            **_passes(shape, job, sharding, job.response / job.length, 1 + job.critic, logits),
            "message": memory.message_bytes(both, sharding, job.passes),
        },
    }
    _first_pass(result, job, sharding)
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


@dataclass(frozen=True)
class Frozen:
    """Two ways to split a frozen role over GPUs, in bytes of one rank: held, and got from others for one pass.

    Attributes:
        zero3: by ZeRO-3 over all ranks: each layer's weights are gathered (Rajbhandari et al. 2020, section 7).
        parallel: by tensor parallelism over the GPUs of a machine, which then all read the rows of each of them: the
            hidden states are added up over these GPUs twice a layer (Shoeybi et al. 2019, section 3), and to add up is
            to get them twice over (reduced and gathered).
        tokens: of the pass, on a rank.
        group: GPUs of a machine.
        rows: sequences of a pass from which on ZeRO-3 gets less than tensor parallelism would.
    """

    zero3: tuple[float, float]
    parallel: tuple[float, float]
    tokens: int
    group: int
    rows: int


def frozen_role(shape: Shape, job: Job, sharding: Sharding, group: int = 8) -> Frozen:
    """What PPO's reference or reward model costs to hold and to read with, split one way or the other."""
    group, weights = min(group, sharding.ranks), float(sharding.width * shape.parameters)
    tokens = min(job.forward_rows, math.ceil(job.updates_rows / sharding.ranks)) * job.length
    gathered = weights * (1 - 1 / sharding.ranks)
    # Of one token on each GPU of the machine.
    added_up = 2 * shape.layers * 2 * float(sharding.width * group * shape.hidden) * (1 - 1 / group)
    return Frozen(
        (weights / sharding.ranks, gathered),
        (weights / group, added_up * tokens),
        tokens,
        group,
        math.ceil(gathered / (added_up * job.length)),
    )


def _on_one_base(shape: Shape, job: Job, sharding: Sharding) -> list[Part]:
    """The base once, and each role's adapter (and head) beside it."""
    rank, targets = job.adapters
    adapter = shape.adapters(rank, list(targets))
    roles = {"policy": (adapter, adapter)}
    if job.critic:
        roles["value"] = (adapter + shape.hidden, adapter + shape.hidden)
    if job.reward:
        roles["reward"] = (adapter + shape.hidden, 0)
    frozen = {"halved": _halved(shape, job, shape.parameters), "quantized": _quantized(shape, job)}
    base = memory.held("base", shape.parameters, 0, sharding, **frozen)
    return [base, *(memory.held(role, *both, sharding) for role, both in roles.items())]


def _quantized(shape: Shape, job: Job) -> int:
    """Weights held in 4 bits: the backbone's linear layers (models.loading.quantized)."""
    return shape.multiplied if job.quantized and job.adapters else 0


def _halved(shape: Shape, job: Job, parameters: int) -> int:
    """Weights under PPO's adapters that are held in 16-bit (ppo.roles.roles.halve_bases)."""
    adapted = job.stage == "ppo" and job.adapters is not None
    return shape.frozen_linear(parameters) - _quantized(shape, job) if adapted else 0


def _casts(shape: Shape, job: Job, sharding: Sharding, head: bool = True) -> float:
    """Autocast's copies of a role's weights; 4-bit ones are widened at each use and kept nowhere, and what is held in
    16-bit needs none."""
    if _halved(shape, job, shape.parameters):
        return 0.0
    return max(0.0, memory.casts(shape, sharding, head) - (2.0 * _quantized(shape, job) if sharding.autocast else 0.0))


def _passes(
    shape: Shape, job: Job, sharding: Sharding, share: float, models: int, logits: float, head: bool = True
) -> dict[str, float]:
    """What forward and backward passes of one micro-batch hold at their hungriest moment: see `memory.activations`."""
    found = memory.activations(shape, job.rows * job.length, job.checkpointing, sharding, share, _adapted(shape, job))
    casts = models * _casts(shape, job, sharding, head)
    if not job.checkpointing:
        phase = {"activations": models * found.kept, "casts": casts}
        return {**phase, "logits, or a layer's gradients": max(logits, found.working)}
    # Autocast keeps copies of weights that train until the forward pass ends; layers are made again one at a time.
    casts = casts if job.adapters is None else 0.0
    again = max(casts + logits, found.layer + found.working)
    return {"activations": models * found.kept, "logits, or a layer again and its gradients": again}


def _adapted(shape: Shape, job: Job) -> int | None:
    """Inputs of a layer's adapters, in numbers a token; ``None`` without adapters."""
    if job.adapters is None:
        return None
    inputs = [ins for name, ins, _ in shape.linear if name.split(".")[-1] in job.adapters[1]]
    return sum(inputs) // shape.layers


def _first_pass(result: Estimate, job: Job, sharding: Sharding) -> None:
    """One GPU without DeepSpeed lets go of gradients after each step: they are there in the update alone, and with one
    pass a step they come as activations go, so that its peak has the larger of the two."""
    if sharding.stage is not None or sharding.ranks > 1:
        return
    gradients = sum(part.gradients for part in result.parts)
    for name, phase in result.phases.items():
        if name != "update":
            phase["gradients not there yet"] = -gradients
        elif job.passes == 1:
            phase["gradients not there yet"] = -min(gradients, sum(phase.values()))
