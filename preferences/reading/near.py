"""Prompts that are nearly the same: what was trained on and is asked about again under another fingerprint.

Two texts are near where their sets of 5-character shingles have a Jaccard similarity |A and B| / |A or B| of at least
a given one (Broder 1997). Exact, without sampling: near texts have one of their rarest shingles in common, so that few
pairs are looked at.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from ppo_vs_dpo.preferences.schema import Text

# Characters of a shingle; shingles see changed words, not changed order.
SHINGLE = 5
# Texts of fewer words differ in most of what they say when they differ in one word.
FEWEST_WORDS = 8
# What counts as near unless it is said otherwise.
NEAR = 0.8
_BASE = np.uint64(0x9E3779B97F4A7C15)


def messages_of(prompt: Text) -> list[str]:
    """What a text or a conversation says, message by message."""
    return [prompt] if isinstance(prompt, str) else [str(message["content"]) for message in prompt]


def plain(prompt: Text) -> str:
    """Lower case, single spaces, messages one under the other."""
    return " ".join(" \n ".join(messages_of(prompt)).lower().split())


def shingles(text: str) -> np.ndarray:
    """Sorted hashes of the different shingles of a plain text; none below `SHINGLE` characters."""
    letters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    if len(letters) < SHINGLE:
        return np.zeros(0, dtype=np.uint64)
    with np.errstate(over="ignore"):
        hashed = np.zeros(len(letters) - SHINGLE + 1, dtype=np.uint64)
        for offset in range(SHINGLE):
            hashed = hashed * _BASE + letters[offset : offset + len(hashed)] + np.uint64(1)
    return np.unique(hashed)


class NearTexts:
    """Which of some texts are near to one of a large corpus, which is passed over once."""

    def __init__(self, texts: Iterable[Text], least: float = NEAR):
        """Texts of `FEWEST_WORDS` words or more are looked for, at a similarity of at least ``least``."""
        self.least = least
        kept = [(row, text) for row, text in enumerate(map(plain, texts)) if len(text.split()) >= FEWEST_WORDS]
        sets = [shingles(text) for _, text in kept]
        self.rows = np.array([row for row, _ in kept], dtype=int)
        self.sizes = np.array(list(map(len, sets)), dtype=int)
        together = np.concatenate([np.zeros(0, dtype=np.uint64), *sets])
        self.known, columns, often = np.unique(together, return_inverse=True, return_counts=True)
        # From the rarest to the most common one.
        self.rank = np.empty(len(self.known), dtype=np.int64)
        self.rank[np.argsort(often, kind="stable")] = np.arange(len(self.known))
        self.columns = np.split(columns, np.cumsum(self.sizes)[:-1]) if sets else []
        self.found = np.zeros(len(self.known), dtype=bool)
        texts_with: dict[int, list[int]] = {}
        for number, own in enumerate(self.columns):
            for column in own[self._rarest(self.rank[own], len(own), 0)].tolist():
                texts_with.setdefault(column, []).append(number)
        self.texts_with = {column: np.array(numbers) for column, numbers in texts_with.items()}

    def _rarest(self, ranks: np.ndarray, size: int, unseen: int) -> np.ndarray:
        """Which of a text's shingles must be looked up: two near texts have one of their rarest in common.

        Both share ``least`` of the larger one, so of either all but as many may be left out, whatever their order, as
        long as it is one order (the prefix filter of Chaudhuri et al. 2006). Shingles in no text that is looked for,
        ``unseen`` of them, are the rarest.
        """
        number = size - int(np.ceil(self.least * size - 1e-9)) + 1 - unseen
        return np.argsort(ranks)[: max(number, 0)]

    def of(self, prompt: Text) -> dict[int, float]:
        """Rows of the texts that this one is near, each with its similarity."""
        text = plain(prompt)
        if not len(self.rows) or len(text.split()) < FEWEST_WORDS:
            return {}
        own = shingles(text)
        at = np.searchsorted(self.known, own)
        at[at == len(self.known)] = 0
        there = at[self.known[at] == own]
        rare = there[self._rarest(self.rank[there], len(own), len(own) - len(there))]
        with_them = [self.texts_with[column] for column in rare.tolist() if column in self.texts_with]
        if not with_them:
            return {}
        numbers = np.unique(np.concatenate(with_them))
        sizes = self.sizes[numbers]
        alike = np.minimum(sizes, len(own)) >= self.least * np.maximum(sizes, len(own))
        near = {}
        self.found[there] = True
        for number in numbers[alike].tolist():
            both = int(np.count_nonzero(self.found[self.columns[number]]))
            similarity = both / (int(self.sizes[number]) + len(own) - both)
            if similarity >= self.least:
                near[int(self.rows[number])] = similarity
        self.found[there] = False
        return near


class LeakCount:
    """Held-out prompts that some training prompt is near, counted as training prompts go by.

    Attributes:
        n: how many prompts are held out.
        rows: those of them that have a near one.
        first: where the first such training prompt stood, the held-out one, and their similarity.
    """

    def __init__(self, heldout: Sequence[Text], least: float = NEAR):
        """``heldout`` prompts, at a similarity of at least ``least``; equal ones are not counted."""
        self.texts, self.finder = list(heldout), NearTexts(heldout, least)
        self.n, self.rows = len(self.texts), set()
        self.first: tuple[str, str, float] | None = None

    def passes(self, place: str, prompt: Text) -> None:
        """A training prompt, and where it stands."""
        for row, similarity in self.finder.of(prompt).items():
            if similarity == 1 and plain(prompt) == plain(self.texts[row]):
                continue  # a prompt that both have is another matter
            self.rows.add(row)
            self.first = self.first or (place, plain(self.texts[row])[:80], similarity)

    def sentence(self) -> str | None:
        """What was found, for people; ``None``: nothing."""
        if self.first is None:
            return None
        place, text, similarity = self.first
        return (
            f"{len(self.rows)} of {self.n} held-out prompts are near duplicates of training prompts (5-character "
            f"shingles, Jaccard similarity of at least {self.finder.least:g}): what was learned by heart counts as "
            f"quality there. The first is {place} ({similarity:.2f}): {text!r}."
        )
