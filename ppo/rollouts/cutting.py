"""How a rollout is cut: into minibatches (an optimizer step each), and those into micro-batches (a pass each)."""

import numpy as np
import torch


def minibatches(rows: int, number: int, seed: int, update: int, epoch: int, group: int = 1) -> list[torch.Tensor]:
    """A fresh random partition of so many rows into ``number`` minibatches; the same on every rank.

    Args:
        rows: of the whole rollout.
        number: how many.
        seed: the run's seed.
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
