"""All completions that a small vocabulary and a short budget allow, with their exact probabilities."""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from ppo_vs_dpo.models.passes.logprobs import pad_batch, response_logits

# Prefixes of one forward pass.
ROWS = 512


@dataclass(frozen=True)
class Space:
    """Every completion of at most ``length`` tokens: ended by an end-of-sequence token, or cut at the budget.

    Attributes:
        tokens: ``V - E`` tokens that do not end a completion.
        ends: ``E`` tokens that do.
        length: budget in tokens, the end of sequence included.
    """

    tokens: tuple[int, ...]
    ends: tuple[int, ...]
    length: int

    @property
    def size(self) -> int:
        """How many completions there are."""
        inner = len(self.tokens)
        return sum(inner**t * len(self.ends) for t in range(self.length)) + inner**self.length

    def completions(self) -> tuple[list[list[int]], list[bool]]:
        """Token ids of all of them, ends included, and whether each ended by itself; `log_probabilities`' order."""
        found: list[list[int]] = []
        finished: list[bool] = []
        prefixes: list[list[int]] = [[]]
        for _ in range(self.length):
            found += [[*prefix, end] for prefix in prefixes for end in self.ends]
            finished += [True] * (len(prefixes) * len(self.ends))
            prefixes = [[*prefix, token] for prefix in prefixes for token in self.tokens]
        return found + prefixes, finished + [False] * len(prefixes)


@torch.no_grad()
def log_probabilities(
    model: PreTrainedModel, prompt: list[int], space: Space, pad_id: int, temperature: float = 1.0
) -> np.ndarray:
    """Exact log-probabilities ``(Y,)`` of every completion of a prompt; their exponentials sum to 1.

    One forward pass over all prefixes of ``length - 1`` tokens gives the next-token laws after all shorter ones too.
    """
    inner, length = len(space.tokens), space.length
    prefixes = np.array(list(np.ndindex(*[inner] * (length - 1))), dtype=np.int64).reshape(
        -1 if length > 1 else 1, length - 1
    )
    ids = np.array(space.tokens, dtype=np.int64)[prefixes]
    device = next(model.parameters()).device
    laws = []
    for start in range(0, len(ids), ROWS):
        # The last token is read by nobody: logits stand before each response token.
        rows = [[*row, space.tokens[0]] for row in ids[start : start + ROWS].tolist()]
        batch = pad_batch([prompt] * len(rows), rows, pad_id, device)
        logits = response_logits(model, batch).double() / temperature
        laws.append(logits.log_softmax(-1).reshape(len(rows), length, -1).cpu().numpy())
    law = np.concatenate(laws)
    pieces, reached = [], np.zeros(1)
    for depth in range(length):
        # All full prefixes that begin alike have the same law there; the first of them is read.
        here = law[:: inner ** (length - 1 - depth), depth]
        pieces.append((reached[:, None] + here[:, list(space.ends)]).ravel())
        reached = (reached[:, None] + here[:, list(space.tokens)]).ravel()
    return np.concatenate([*pieces, reached])


def space_of(model: PreTrainedModel, end_ids: list[int], length: int, limit: int) -> Space | None:
    """The space of a model's completions, or ``None`` where it holds more than ``limit``."""
    vocabulary = model.config.vocab_size
    ends = tuple(sorted({end for end in end_ids if end < vocabulary}))
    # Counted before it is written out: a real vocabulary to the power of a real budget is astronomic.
    if limit < 1 or not ends or length * np.log(max(vocabulary - len(ends), 1)) > np.log(limit) + 1:
        return None
    space = Space(tuple(token for token in range(vocabulary) if token not in ends), ends, length)
    return space if space.size <= limit else None
