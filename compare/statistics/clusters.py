"""Which prompts are one unit of evidence: the prompts of one dialogue, and near duplicates."""

from typing import Any

import numpy as np
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

# Characters of a shingle; shingles see changed words, not changed order.
SHINGLE = 5
# Texts of fewer words differ in most of what they say when they differ in one word.
FEWEST_WORDS = 8


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _messages(prompt: Any) -> list[str]:
    return [prompt] if isinstance(prompt, str) else [str(message["content"]) for message in prompt]


def _opening(prompt: Any) -> str | None:
    """The first message from the user, where it is long enough to be no common greeting."""
    if isinstance(prompt, str):
        return None
    first = next((str(message["content"]) for message in prompt if message["role"] == "user"), "")
    return _plain(first) if len(first.split()) >= FEWEST_WORDS else None


def _exchange(prompt: Any) -> str | None:
    """The first two messages: who was answered the same is in the same dialogue."""
    return None if isinstance(prompt, str) or len(prompt) < 2 else _plain(" \n ".join(_messages(prompt)[:2]))


def clusters_of(prompts: list[Any], near_duplicate: float) -> np.ndarray:
    """``(P,)`` labels 0, 1, ...: prompts with the same label are one unit.

    Together are: the same text; conversations that begin with the same exchange, or with the same first user message
    of `FEWEST_WORDS` words or more (prompts of one dialogue are prefixes of each other); texts whose sets of
    5-character shingles have a Jaccard similarity of at least ``near_duplicate``, again of `FEWEST_WORDS` words or
    more. What is linked to the same prompt is linked.

    Args:
        prompts: texts or conversations.
        near_duplicate: 1 and above: only the same text and the same dialogue count.
    """
    n = len(prompts)
    texts = [_plain(" \n ".join(_messages(prompt))) for prompt in prompts]
    links: list[tuple[int, int]] = []
    for keys in (texts, list(map(_opening, prompts)), list(map(_exchange, prompts))):
        first: dict[str, int] = {}
        for row, key in enumerate(keys):
            if key is not None and first.setdefault(key, row) != row:
                links.append((first[key], row))
    if near_duplicate < 1:
        links += _near(texts, near_duplicate)
    rows, columns = np.array(links, dtype=int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(links)), (rows, columns)), shape=(n, n))
    return connected_components(graph, directed=False)[1]


def _near(texts: list[str], least: float) -> list[tuple[int, int]]:
    long = [row for row, text in enumerate(texts) if len(text.split()) >= FEWEST_WORDS]
    sets = [{texts[row][at : at + SHINGLE] for at in range(len(texts[row]) - SHINGLE + 1)} for row in long]
    number = {shingle: column for column, shingle in enumerate(sorted(set().union(*sets)))}
    if not number:
        return []
    columns = np.array([number[shingle] for one in sets for shingle in sorted(one)])
    ends = np.cumsum([0, *map(len, sets)])
    holds = csr_array((np.ones(len(columns), dtype=np.int32), columns, ends), shape=(len(long), len(number)))
    both = (holds @ holds.T).tocoo()
    sizes = np.diff(ends)
    near = both.data >= least * (sizes[both.row] + sizes[both.col] - both.data)
    pairs = zip(both.row[near].tolist(), both.col[near].tolist(), strict=True)
    return [(long[a], long[b]) for a, b in pairs if a < b]
