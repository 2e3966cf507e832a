"""Sums, maxima and waiting over ranks, where there are several; on one process nothing is exchanged."""

from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator

from ppo_vs_dpo.models.sharding.watch import meet, ranks

Value = TypeVar("Value")


def several() -> bool:
    """Whether this process is one of several that work together."""
    return ranks() > 1


def is_first() -> bool:
    """Whether this process is the first of those, or the only one."""
    return not several() or dist.get_rank() == 0


def of_first(value: Value) -> Value:
    """The first rank's value, on all."""
    box = [value]
    if several():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def global_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum of ``x`` over ranks when torch.distributed is up, else ``x`` itself."""
    if several():
        x = x.clone()
        dist.all_reduce(x)
    return x


def global_max(x: torch.Tensor) -> torch.Tensor:
    """Elementwise maximum over ranks when torch.distributed is up, else ``x`` itself."""
    if several():
        x = x.clone()
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def any_rank(flag: bool | torch.Tensor, device: torch.device) -> bool:
    """Whether the flag is set on some rank: all then act alike, and none waits for another."""
    return bool(global_max(torch.as_tensor(flag, device=device).float()).item())


def union(names: Iterable[str]) -> list[str]:
    """The names that any rank has, sorted."""
    found = [set(names)]
    if several():
        gathered: list[set[str]] = [set()] * dist.get_world_size()
        dist.all_gather_object(gathered, found[0])
        found = gathered
    return sorted(set().union(*found))


def barrier() -> None:
    """Wait for all ranks, also for one that writes files for longer than a collective may take."""
    meet()


def gradients_in_buckets(accelerator: Accelerator) -> None:
    """Under DDP gradients are views into the buckets that go over, where a step is one pass: 4 bytes a trained weight
    less. (Those of several passes add up beside them until the last.)

    Args:
        accelerator: of a trainer whose model is not wrapped yet.
    """
    if accelerator.ddp_handler is not None:
        accelerator.ddp_handler.gradient_as_bucket_view = True
