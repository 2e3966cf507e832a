"""Which prompts are one unit of evidence: the prompts of one dialogue, and near duplicates."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ppo_vs_dpo.preferences.reading.near import FEWEST_WORDS, NearTexts, messages_of, plain


def _opening(prompt: Any) -> str | None:
    """The first message from the user, where it is long enough to be no common greeting."""
    if isinstance(prompt, str):
        return None
    first = next((str(message["content"]) for message in prompt if message["role"] == "user"), "")
    return plain(first) if len(first.split()) >= FEWEST_WORDS else None


def _exchange(prompt: Any) -> str | None:
    """The first two messages: who was answered the same is in the same dialogue."""
    return None if isinstance(prompt, str) or len(prompt) < 2 else plain(" \n ".join(messages_of(prompt)[:2]))


def clusters_of(prompts: list[Any], near_duplicate: float) -> np.ndarray:
    """``(P,)`` labels 0, 1, ...: prompts with the same label are one unit.

    Together are: the same text; conversations that begin with the same exchange, or with the same first user message
    of `FEWEST_WORDS` words or more (prompts of one dialogue are prefixes of each other); texts whose sets of
    5-character shingles have a Jaccard similarity of at least ``near_duplicate``, again of `FEWEST_WORDS` words or
    more. What is linked to the same prompt is linked.

    Args:
        near_duplicate: 1 and above: only the same text and the same dialogue count.
    """
    n = len(prompts)
    texts = list(map(plain, prompts))
    links: list[tuple[int, int]] = []
    for keys in (texts, list(map(_opening, prompts)), list(map(_exchange, prompts))):
        first: dict[str, int] = {}
        for row, key in enumerate(keys):
            if key is not None and first.setdefault(key, row) != row:
                links.append((first[key], row))
    if near_duplicate < 1:
        finder = NearTexts(texts, near_duplicate)
        links += [(row, other) for other, text in enumerate(texts) for row in finder.of(text) if row < other]
    rows, columns = np.array(links, dtype=int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(links)), (rows, columns)), shape=(n, n))
    return connected_components(graph, directed=False)[1]


def near_training(prompts: list[Any], training: Iterable[Any], near_duplicate: float) -> np.ndarray:
    """Rows of the prompts that belong together with a training prompt, as `clusters_of` means it.

    ``training`` is passed over once.
    """
    rows_of: dict[tuple[str, str], set[int]] = {}
    kinds = {"opening": _opening, "exchange": _exchange}
    for row, prompt in enumerate(prompts):
        for kind, key_of in kinds.items():
            if (key := key_of(prompt)) is not None:
                rows_of.setdefault((kind, key), set()).add(row)
    finder = NearTexts(prompts if near_duplicate < 1 else [], near_duplicate)
    found: set[int] = set()
    for prompt in training:
        for kind, key_of in kinds.items():
            found |= rows_of.get((kind, key_of(prompt) or ""), set())
        found |= set(finder.of(prompt))
    return np.array(sorted(found), dtype=int)
