"""Memory and arithmetic of training, by formula: what a plan is made of.

Sources
    ZeRO  Rajbhandari et al. 2020 (1910.02054), section 3 and figure 1: which state each stage splits over N ranks.
    KOR   Korthikanti et al. 2022 (2205.05198), section 4: activations of a transformer layer in 16-bit.
    KAP   Kaplan et al. 2020 (2001.08361), table 1 and eq. 2.2: 2 N FLOPs a token forward, twice that backward.
    PAL   Chowdhery et al. 2022 (2204.02311), appendix B: attention's 12 L H Q T, forward and backward.
    POPE  Pope et al. 2022 (2211.05102), sections 2 and 3: the key-value cache, and decoding bound by memory bandwidth.
"""

import functools
import json
from dataclasses import dataclass
from typing import Any

GB = 1e9
# Kept free on every GPU: CUDA context, NCCL buffers, fragmentation of the allocator.
RESERVED = 0.08
# TRL's head (trl.kernels.chunked_logprob): so many tokens and entries of the vocabulary at once.
TOKENS, TILE = 4096, 32768
# Bits of a weight in NF4 with double quantisation (Dettmers et al. 2023, section 3): 4, and 8 for each block of 64 and
# 32 for each 256 blocks.
NF4 = 4 + 8 / 64 + 32 / (64 * 256)


@dataclass(frozen=True)
class Shape:
    """A model's sizes.

    Attributes:
        parameters: of the causal language model, tied weights once.
        scalar_parameters: of the same backbone with a scalar head (reward and value model).
        layers: transformer layers.
        hidden: width of the residual stream.
        kv: width of all key heads together.
        ffn: width of the feed-forward layers.
        gated: a gate beside the up-projection (Llama).
        vocabulary: tokens.
        multiplied: weights of the linear layers in the backbone: what each token is multiplied with.
        linear: ``(name, inputs, outputs)`` of every linear layer, for adapters.
    """

    parameters: int
    scalar_parameters: int
    layers: int
    hidden: int
    kv: int
    ffn: int
    gated: bool
    vocabulary: int
    multiplied: int
    linear: tuple[tuple[str, int, int], ...]

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """The sizes of a transformers configuration; the model is built without its weights (``meta`` device)."""
        return _shape(type(config), json.dumps(config.to_dict(), sort_keys=True, default=str))

    def frozen_linear(self, parameters: int) -> int:
        """Weights of linear layers in a frozen model of so many parameters: the backbone's, and a head of its own."""
        head = self.vocabulary * self.hidden
        return self.multiplied + (head if parameters - self.scalar_parameters >= head - self.hidden else 0)

    def adapters(self, rank: int, targets: list[str]) -> int:
        """Parameters of low-rank adapters (Hu et al. 2021, section 4.1): r (inputs + outputs) for each layer."""
        chosen = [x for x in self.linear if x[0].split(".")[-1] in targets]
        return sum(rank * (inputs + outputs) for _, inputs, outputs in chosen)


@functools.lru_cache(maxsize=16)
def _shape(kind: type, content: str) -> Shape:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.pytorch_utils import Conv1D

    config = kind.from_dict(json.loads(content))
    config.num_labels = 1
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        scalar = AutoModelForSequenceClassification.from_config(config)
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    # GPT-2's linear layers are Conv1D, whose weight is (inputs, outputs).
    layers = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    output = model.get_output_embeddings()
    linear = [
        (name, m.in_features, m.out_features) if isinstance(m, torch.nn.Linear) else (name, *m.weight.shape)
        for name, m in layers.items()
    ]
    ffn = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        scalar_parameters=sum(p.numel() for p in scalar.parameters()),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        kv=(getattr(config, "num_key_value_heads", None) or heads) * head,
        ffn=ffn,
        gated=any(name.endswith("gate_proj") for name, _, _ in linear),
        vocabulary=config.vocab_size,
        multiplied=sum(module.weight.numel() for module in layers.values() if module is not output),
        linear=tuple(linear),
    )


@dataclass(frozen=True)
class Sharding:
    """How a run is spread.

    Attributes:
        ranks: GPUs.
        stage: of ZeRO; ``None`` without DeepSpeed (every rank holds everything).
        offload_optimizer: fp32 weights, moments and gradients in the CPU's memory.
        offload_weights: weights in the CPU's memory while they are not used.
        live: ZeRO-3's ``stage3_max_live_parameters``.
        bucket: elements of gradients in one message.
        half: weights and gradients in 16-bit.
        sums: bytes of a gradient as it adds up (``data_types.grad_accum_dtype``); ``None``: of a weight.
    """

    ranks: int
    stage: int | None = None
    offload_optimizer: bool = False
    offload_weights: bool = False
    live: int = 1_000_000_000
    bucket: int = 50_000_000
    half: bool = True
    sums: int | None = None

    @property
    def width(self) -> int:
        """Bytes of a weight as the model computes with it."""
        return 2 if self.half else 4

    @property
    def autocast(self) -> bool:
        """Whether fp32 weights are cast to 16-bit at each use; DeepSpeed holds 16-bit weights beside fp32 ones."""
        return self.half and self.stage is None


@dataclass
class Part:
    """Bytes on one rank.

    Attributes:
        role: ``policy``, ``value``, ``reference``, ``reward`` or ``model``.
        weights: as the model computes with them.
        gradients: between a backward pass and the step.
        optimizer: fp32 weights and Adam's two moments.
        cpu: what of these is in the CPU's memory instead.
    """

    role: str
    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    cpu: float = 0

    @property
    def gpu(self) -> float:
        """All that is on the GPU."""
        return self.weights + self.gradients + self.optimizer


def held(role: str, parameters: int, trained: int, sharding: Sharding, halved: int = 0, quantized: int = 0) -> Part:
    """What a rank holds of one role between passes (ZeRO, figure 1; K = 12 for Adam with fp32 weights).

    Args:
        trained: how many of them train: all, none, or the adapters'.
        halved: how many frozen ones are in linear layers of their own, held in 16-bit without DeepSpeed, too.
        quantized: how many are held in 4 bits; never under DeepSpeed.
    """
    stage, ranks, width = sharding.stage, sharding.ranks, sharding.width
    part = Part(role)
    if stage is None:
        # DDP: weights as loaded (fp32, autocast to 16-bit), Adam's moments of the same width, no second copy. Frozen
        # ones are held as autocast casts them (models.loading.pretrained.halve_frozen), or in 4 bits.
        saved = 2.0 * halved if sharding.half else 0.0
        part.weights, part.gradients, part.optimizer = 4.0 * parameters - saved, 4.0 * trained, 8.0 * trained
        part.weights -= (4.0 - NF4 / 8) * quantized
        return part
    part.weights = width * parameters / (ranks if stage == 3 else 1)
    part.gradients = (sharding.sums or width) * trained / (ranks if stage >= 2 else 1)
    # DeepSpeed keeps fp32 weights of its own also where the model's are fp32 already.
    part.optimizer = 12.0 * trained / (ranks if stage >= 1 else 1)
    if sharding.offload_optimizer:
        part.cpu += part.optimizer + part.gradients
        part.optimizer = part.gradients = 0
    if sharding.offload_weights:
        part.cpu += part.weights
        part.weights = 0
    return part


def live_weights(parameters: int, sharding: Sharding) -> float:
    """Weights that ZeRO-3 holds gathered while a model runs; 0 where a rank has them all anyway."""
    return sharding.width * min(parameters, sharding.live) if sharding.stage == 3 else 0.0


def message_bytes(trained: int, sharding: Sharding, passes: int = 2) -> float:
    """Gradients on their way: one bucket that fills and one that is sent. DDP has buckets for all of them, which are
    the gradients themselves where a step is one pass (models.sharding.collectives.gradients_in_buckets)."""
    if sharding.stage is None:
        return 4.0 * trained if sharding.ranks > 1 and passes > 1 else 0.0
    return 2.0 * sharding.width * min(trained, sharding.bucket)


@dataclass
class Kept:
    """Bytes of activations (KOR, section 4.1, counted for the layer's widths).

    No dropout, and attention that recomputes its scores (flash, sdpa: KOR's selective recomputation, eq. 6).

    Attributes:
        kept: from the forward pass to the backward pass: with checkpointing the layers' inputs, else all.
        layer: made again for one layer at a time; 0 without checkpointing.
        working: gradients under way in one layer's backward pass.
    """

    kept: float
    layer: float
    working: float


def activations(
    shape: Shape,
    tokens: int,
    checkpointing: bool,
    sharding: "Sharding",
    share: float = 1.0,
    adapted: int | None = None,
) -> Kept:
    """What a pass over ``tokens`` tokens keeps for its backward pass.

    Args:
        share: of the tokens whose states are wanted from the last layer (responses, last tokens): it leaves out the
            others' queries and feed-forward.
        adapted: inputs of adapters in a layer, in numbers a token; ``None`` where all weights train.
    """
    hidden, kv, ffn = shape.hidden, shape.kv, shape.ffn
    width, wide = (2 if sharding.half else 4), (4 if sharding.autocast or not sharding.half else 2)
    # Inputs of both norms; queries and attention's output; keys and values.
    stream, attended = 2 * wide * hidden, width * (2 * hidden + 2 * kv)
    if adapted is not None:
        # Frozen weights ask for no inputs: what is kept is what the gate's and attention's slopes need.
        inputs, inner, to_keys = width * adapted, width * (3 if shape.gated else 1) * ffn, 0
    else:
        # Queries, keys, values, gate and up-projection: under autocast each takes a copy in half precision.
        copies = (5 if shape.gated else 4) if sharding.autocast else 2
        inputs, inner = width * copies * hidden, width * (4 if shape.gated else 2) * ffn
        to_keys = (2 if sharding.autocast else 1) * width * hidden
    layer = stream + attended + inputs + inner
    # Where a token's state is not wanted from the last layer, its key and value are.
    last = share * layer + (1 - share) * (wide * hidden + attended + to_keys)
    # Of the feed-forward's values, its gate's slope and its product; of the stream, twice, and of a norm's input.
    working = tokens * (width * (5 if shape.gated else 2) * ffn + 3 * wide * hidden)
    if checkpointing:
        return Kept(tokens * wide * hidden * shape.layers, tokens * (layer if shape.layers > 1 else last), working)
    return Kept(tokens * (layer * (shape.layers - 1) + last), 0.0, working)


def casts(shape: Shape, sharding: "Sharding", head: bool = True) -> float:
    """Autocast's copies of fp32 weights in half precision, kept for the backward pass."""
    if not sharding.autocast:
        return 0.0
    return 2.0 * (shape.multiplied + (shape.vocabulary * shape.hidden if head else 0))


def fused_head(shape: Shape, positions: int, trains: bool, sharding: "Sharding") -> float:
    """TRL's head at its backward pass: one tile of logits, its slice of the weights, fp32 gradients of states and,
    where they train, of weights."""
    width = 2 if sharding.half else 4
    tile = width * min(TILE, shape.vocabulary) * shape.hidden if sharding.half else 0
    gradient = 4.0 * shape.vocabulary * shape.hidden if trains else 0.0
    return width * TILE * min(positions, TOKENS) + tile + 4.0 * positions * shape.hidden + gradient


def logits_bytes(shape: Shape, positions: int, half: bool = True) -> float:
    """Logits of one piece of rows (`models.passes.head`), in fp32 too, and their gradient; with more pieces than one
    also the fp32 sum of the head's gradients."""
    width, piece = 2 if half else 4, max(1024, (1 << 24) // shape.vocabulary)
    sums = 4.0 * shape.vocabulary * shape.hidden if positions > piece else 0.0
    return min(positions, piece) * shape.vocabulary * (2 * width + 4) + sums


def cache_bytes(shape: Shape, rows: int, length: int, half: bool = True) -> float:
    """The key-value cache of ``rows`` sequences (POPE, section 2): 2 x layers x key width x tokens."""
    return 2 * shape.layers * shape.kv * rows * length * (2 if half else 4)


def attention_flops(shape: Shape, rows: int, length: int) -> float:
    """Scores and weighted values of one causal forward pass (PAL: 4 L d T a token, halved by the causal mask)."""
    return 2.0 * shape.layers * shape.hidden * length * rows * length


def forward_flops(shape: Shape, rows: int, length: int, logits: int = 0) -> float:
    """FLOPs of one forward pass over ``rows`` sequences: 2 a weight and token (KAP), and attention.

    Args:
        logits: positions at which the vocabulary's logits are computed; none for a scalar head.
    """
    head = 2.0 * logits * shape.vocabulary * shape.hidden
    return 2.0 * rows * length * shape.multiplied + attention_flops(shape, rows, length) + head


@dataclass(frozen=True)
class Gpu:
    """A GPU as its maker states it.

    Attributes:
        name: as given on the command line.
        memory: bytes.
        flops: 16-bit tensor FLOP/s, dense.
        bandwidth: bytes/s of its memory.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float

    @property
    def usable(self) -> float:
        """Memory less what is kept free."""
        return self.memory * (1 - RESERVED)


# NVIDIA's data sheets (A100, H100 SXM, H200, L40S, V100, RTX 4090); dense 16-bit tensor throughput.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40gb", 40 * GB, 312e12, 1.555e12),
        Gpu("a100-80gb", 80 * GB, 312e12, 2.039e12),
        Gpu("h100-80gb", 80 * GB, 989e12, 3.35e12),
        Gpu("h200-141gb", 141 * GB, 989e12, 4.8e12),
        Gpu("l40s-48gb", 48 * GB, 362e12, 0.864e12),
        Gpu("v100-32gb", 32 * GB, 125e12, 0.9e12),
        Gpu("rtx4090-24gb", 24 * GB, 165e12, 1.008e12),
    )
}
