"""How a rollout is cut: into minibatches (an optimizer step each), and those into micro-batches (a pass each)."""

from collections.abc import Iterator

import numpy as np
import torch
from accelerate import Accelerator

from ppo_vs_dpo.ppo.config import PPOConfig
from ppo_vs_dpo.ppo.rollouts.rollout import Rollout


def minibatches(rows: int, number: int, seed: int, update: int, epoch: int, group: int = 1) -> list[torch.Tensor]:
    """A fresh random partition of so many rows into ``number`` minibatches; the same on every rank.

    Args:
        rows: of the whole rollout.
        update: which update, from 0.
        epoch: which pass over this rollout, from 0.
        group: so many neighbouring rows stay together.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, (update << 20) + epoch]))
    groups = torch.from_numpy(generator.permutation(rows // group))
    return list((groups[:, None] * group + torch.arange(group)).flatten().chunk(number))


def micro_batches(
    lengths: torch.Tensor, size: int, tokens: int | None = None, at_least: int = 1
) -> list[torch.Tensor]:
    """Row numbers in groups, similar lengths together, so that little is padding.

    Args:
        lengths: ``(N,)`` real tokens of each row, prompt and response; on the host.
        size: rows of a group at most.
        tokens: real tokens of a group at most, unless a single row has more.
        at_least: groups; the largest are parted until there are so many (or rows).
    """
    lengths, order = torch.sort(lengths, stable=True)
    if tokens is None:
        groups = list(order.split(size))
    else:
        groups, start, held = [], 0, 0
        for stop, length in enumerate(lengths.tolist()):
            if stop > start and (stop - start == size or held + length > tokens):
                groups.append(order[start:stop])
                start, held = stop, 0
            held += length
        groups.append(order[start:])
    while len(groups) < min(at_least, len(order)):
        place = max(range(len(groups)), key=lambda number: len(groups[number]))
        half = (len(groups[place]) + 1) // 2
        groups[place : place + 1] = [groups[place][:half], groups[place][half:]]
    return groups


def passes(rollout: Rollout, args: PPOConfig, number: int, together: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """All minibatches of an update: number of the pass, number in the pass, rows."""
    group = args.samples_per_prompt if together == 1 else together
    for epoch in range(args.num_ppo_epochs):
        for index, rows in enumerate(
            minibatches(len(rollout), args.num_mini_batches, args.seed, number, epoch, group)
        ):
            yield epoch, index, rows


def share_of(
    rollout: Rollout, rows: torch.Tensor, args: PPOConfig, accelerator: Accelerator, together: int
) -> tuple[Rollout, list[torch.Tensor]]:
    """This rank's rows of a minibatch and their cut into micro-batches: as many as on any rank, which all can tell.

    Sharded weights are gathered in each pass, by all ranks together. ``together`` neighbouring rows are never parted.
    """
    ranks, rank = accelerator.num_processes, accelerator.process_index
    size, tokens = args.per_device_train_batch_size // together, args.micro_batch_tokens
    units = rows.view(-1, together)
    mine, most = rollout.select(units[rank::ranks].flatten()), 1
    if tokens is not None and ranks > 1:
        total = rollout.extents.total[units].sum(1)
        most = max(len(micro_batches(total[other::ranks], size, tokens)) for other in range(ranks))
    parts = micro_batches(mine.extents.total.view(-1, together).sum(1), size, tokens, most)
    return mine, [(part[:, None] * together + torch.arange(together)).flatten() for part in parts]
