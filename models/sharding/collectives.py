"""Sums, maxima and waiting over ranks, where there are several; on one process nothing is exchanged."""

from collections.abc import Iterable

import torch
import torch.distributed as dist

from ppo_vs_dpo.models.sharding.watch import meet


def several() -> bool:
    """Whether this process is one of several that work together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


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
