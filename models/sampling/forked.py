"""Work of one process shared between forked ones, on CPUs: importing torch again would take as long as the work."""

import concurrent.futures
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ppo_vs_dpo.artifacts.guards.processes import die_with_parent

# What forked processes call: inherited by the fork, since a closure cannot be sent.
_inherited: Callable[[Any], Any] | None = None


def may_fork(workers: int, alone: bool = True) -> bool:
    """Whether work is shared between forked processes: asked for, by one rank, without a GPU (it survives no fork).

    Nor do OpenMP's threads: a fork of a process that has several waits for them for ever.
    """
    if workers < 2 or not alone or torch.get_num_threads() > 1:
        return False
    return not torch.accelerator.is_available() and "fork" in multiprocessing.get_all_start_methods()


def in_processes(function: Callable[[Any], Any], items: Sequence[Any], workers: int) -> Iterator[tuple[Any, Any]]:
    """Call ``function`` on every item in forked processes; yields ``(item, result)``, whichever is ready first."""
    global _inherited
    _inherited, context = function, multiprocessing.get_context("fork")
    try:
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=die_with_parent) as pool:
            running = {pool.submit(_call, item): item for item in items}
            for future in concurrent.futures.as_completed(running):
                yield running[future], future.result()
    finally:
        _inherited = None


def _call(item: Any) -> Any:
    return _inherited(item)
