"""A policy's weights on their way to an engine: in buckets, whole one bucket at a time, adapters added in.

Under ZeRO-3 no rank ever holds more than its own share and one bucket, so that a policy that fits no GPU trains beside
a server that runs it on several.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.resources import parameter_size
from ppo_vs_dpo.models.loading.adapters import adapts_tied
from ppo_vs_dpo.models.sharding.deepspeed import is_sharded, whole

# Bytes of a bucket: enough to keep a network or a disk busy.
BUCKET = 1_000_000_000


@dataclass
class Weight:
    """One tensor of a checkpoint.

    Attributes:
        name: in the checkpoint.
        parts: parameters that it is made of; whole while `make` is called.
        make: gives it.
    """

    name: str
    parts: list[torch.nn.Parameter]
    make: Callable[[], torch.Tensor]

    @property
    def size(self) -> int:
        """Numbers."""
        return parameter_size(self.parts[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """When it is whole."""
        return tuple(getattr(self.parts[0], "ds_shape", self.parts[0].shape))


def weights_of(policy: torch.nn.Module) -> list[Weight]:
    """The weights of a causal language model under the names of its checkpoint, LoRA adapters added in.

    The model is not touched: merging and unmerging in place would leave its rounding in the frozen base.

    Args:
        policy: a model, or a ``peft.PeftModel`` with plain LoRA; on a shared base the other roles' adapters are left
            out. One that says ``adapters_off`` stands for the base of its ``policy``.

    Raises:
        UserError: adapters whose effect is not a sum of weights.
    """
    off = getattr(policy, "adapters_off", False)
    model = policy.policy if off else policy
    if not hasattr(model, "peft_config"):
        return [Weight(name, [p], p.detach) for name, p in model.named_parameters()]
    check_mergeable(model)
    active, inner = None if off else model.active_adapter, model.get_base_model()
    found = []
    for name, parameter in inner.named_parameters():
        if ".lora_" in name:
            continue
        path, _, kind = name.rpartition(".")
        layer = None
        if path.endswith(".base_layer"):
            path = path.removesuffix(".base_layer")
            layer = inner.get_submodule(path)
        if kind == "weight" and layer is not None and active in layer.scaling:
            adapters = [p for n, p in layer.named_parameters() if f".{active}." in n]
            found.append(Weight(f"{path}.{kind}", [parameter, *adapters], _merged(parameter, layer, active)))
        else:
            found.append(Weight(f"{path}.{kind}", [parameter], parameter.detach))
    return found


def check_mergeable(policy: torch.nn.Module) -> None:
    """Adapters must be plain LoRA, to be sent as one set of weights.

    Raises:
        UserError: they are not; names what.
    """
    for name, config in getattr(policy, "peft_config", {}).items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        features = ("use_dora", "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices")
        odd = [feature for feature in features if getattr(config, feature, None)]
        odd += ["an adapter on tied embeddings"] if adapts_tied(policy) else []
        if kind != "LORA" or odd:
            raise UserError(
                f"ppo.generation_engine=vllm gets adapters merged into the weights, and adapter {name} is {kind}"
                f"{' with ' + ', '.join(odd) if odd else ''}: only plain LoRA can be. Use plain LoRA, or "
                f"generation_engine=transformers."
            )


def _merged(parameter: torch.nn.Parameter, layer: torch.nn.Module, adapter: str) -> Callable[[], torch.Tensor]:
    def make() -> torch.Tensor:
        weight = parameter.detach()
        return weight + layer.get_delta_weight(adapter).detach().to(weight.dtype)

    return make


def buckets(
    policy: torch.nn.Module, dtype: torch.dtype, keep: bool = True, size: int | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """The weights in some dtype, a bucket at a time; all ranks must go through all of them.

    Ranks that do not ``keep`` them help to gather, and get empty buckets; a single tensor of more than ``size``
    bytes is a bucket of its own.
    """
    bucket: list[Weight] = []
    size, held = BUCKET if size is None else size, 0
    for weight in [*weights_of(policy), None]:
        own = 0 if weight is None else weight.size * dtype.itemsize
        if bucket and (weight is None or held + own > size):
            with whole({id(p): p for one in bucket for p in one.parts}.values(), write=False):
                made = {one.name: one.make().to(dtype) for one in bucket} if keep else {}
                # A view of what is gathered would be empty afterwards.
                made = {name: x.clone() if x.data_ptr() in _addresses(bucket) else x for name, x in made.items()}
            yield made
            bucket, held = [], 0
        if weight is not None:
            bucket.append(weight)
            held += own


def _addresses(bucket: list[Weight]) -> set[int]:
    return {p.data_ptr() for one in bucket for p in one.parts}


def named_weights(
    policy: torch.nn.Module, dtype: torch.dtype | None = None, size: int | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights of a policy by name, one after another, on every rank; under ZeRO-3 a bucket at a time is whole."""
    if dtype is None:
        for weight in weights_of(policy):
            with whole(weight.parts, write=False):
                made = weight.make()
                made = made.clone() if any(is_sharded(part) for part in weight.parts) else made
            yield weight.name, made
        return
    for bucket in buckets(policy, dtype, size=size):
        # Let go of one by one: none of this bucket is left when the next is gathered.
        while bucket:
            name = next(iter(bucket))
            yield name, bucket.pop(name)
