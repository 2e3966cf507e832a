"""A critic and a judge for the testbed that a program can be: they find what a principle names and mend one thing.

They answer the requests of configs/constitution/testbed.yaml, so constitutional AI can be shown exactly: a revision
never adds a violation, and after enough rounds there is none.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

from ppo_vs_dpo.preferences.constitution.endpoints import Answer, Request
from ppo_vs_dpo.preferences.constitution.principles import Principle, load_constitution
from ppo_vs_dpo.preferences.testbed.gold import LENGTH_FREE, gold_reward, words_of
from ppo_vs_dpo.preferences.testbed.grammar import ADJECTIVES, LEXICON, VERBS, spell


def dispraise(words: Sequence[str]) -> list[int]:
    """Positions of the words that dispraise: bad ones, and good ones after "not"."""
    return [
        number
        for number, word in enumerate(words)
        if word in LEXICON and (LEXICON[word] > 0) == (number > 0 and words[number - 1] == "not")
    ]


def repeated(words: Sequence[str]) -> list[int]:
    """Positions of lexicon words that were there before."""
    return [number for number, word in enumerate(words) if word in LEXICON and word in words[:number]]


def late_sentences(words: Sequence[str]) -> list[int]:
    """Positions where sentences start that end after the free length."""
    starts = [0, *(number + 1 for number, word in enumerate(words[:-1]) if word == ".")]
    ends = [*starts[1:], len(words)]
    return [start for start, end in zip(starts, ends, strict=True) if end > LENGTH_FREE and start > 0]


FINDERS = {"praise": dispraise, "variety": repeated, "brevity": late_sentences}


def violations(text: str) -> Counter[str]:
    """How often a review breaks each principle."""
    return Counter({name: len(found) for name, find in FINDERS.items() if (found := find(words_of(text)))})


def mend(text: str, principle: str) -> str:
    """A review with one violation of a principle less, and none more of any other; itself where it has none."""
    words = words_of(text)
    found = FINDERS[principle](words)
    if not found:
        return text
    if principle == "brevity":
        words = words[: found[-1]]
    else:
        place = found[0]
        replacement = _replacement(words, place, flip=principle == "praise")
        if replacement is None:
            return text
        words[place] = replacement
    return " " + spell(words)


def _replacement(words: Sequence[str], place: int, flip: bool) -> str | None:
    """Another word of the same kind and strength that the review does not have, of the other sign where ``flip``."""
    word = words[place]
    for table in (ADJECTIVES, VERBS):
        for weight, members in table.items():
            if word in members.split():
                wanted = -weight if flip else weight
                same_sign = [w for w, _ in table.items() if (w > 0) == (wanted > 0)]
                for candidate_weight in sorted(same_sign, key=lambda w: abs(w - wanted)):
                    for candidate in table[candidate_weight].split():
                        if candidate not in words:
                            return candidate
                return None
    # Verdicts: "avoid" has one counterpart, and no other word for variety.
    other = "recommend" if word == "avoid" else "avoid"
    return other if flip and other not in words else None


class Critic:
    """Answers the critique and revision requests of the testbed's constitution."""

    def __init__(self) -> None:
        self.principles: list[Principle] = load_constitution("testbed")

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """See `preferences.constitution.endpoints.Model.answer`."""
        for number, request in enumerate(requests):
            messages = request.conversation
            asked = messages[-1]["content"]
            by_critique = next((p for p in self.principles if p.critique == asked), None)
            if by_critique is not None:
                words = words_of(messages[-2]["content"])
                found = FINDERS[by_critique.id](words)
                yield number, Answer(", ".join(words[place] for place in found) or "nothing", True)
                continue
            by_revision = next(p for p in self.principles if p.revision == asked)
            # review, critique request, critique, revision request
            yield number, Answer(mend(messages[-4]["content"], by_revision.id), True)


class Judge:
    """Chooses by gold, with a liking for whatever stands at (A)."""

    def __init__(self, bias: float = 0.7):
        self.bias = bias

    @staticmethod
    def _shown(question: Request) -> tuple[str, list[str]]:
        """The prompt and the two reviews of a question."""
        content = question.conversation[0]["content"]
        _, prompt, _, first, second, _ = content.split("\n\n")
        return prompt, [" " + first.removeprefix("(A) "), " " + second.removeprefix("(B) ")]

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """The reasoning before the choice: what each review is worth."""
        for number, request in enumerate(requests):
            prompt, texts = self._shown(request)
            first, second = gold_reward([prompt] * 2, texts)
            yield number, Answer(f"(A) is worth {first:.2f}, (B) {second:.2f}.", True)

    def choose(self, questions: Sequence[Request]) -> Iterator[tuple[int, float]]:
        """See `preferences.constitution.endpoints.Model.choose`."""
        for number, question in enumerate(questions):
            prompt, texts = self._shown(question)
            better, worse = gold_reward([prompt] * 2, texts)
            yield number, better - worse + self.bias


def critic() -> Critic:
    """The critic, for ``critic: {kind: python, function: ppo_vs_dpo.preferences.testbed.reviewer:critic}``."""
    return Critic()


def judge() -> Judge:
    """The judge, for ``judge: {kind: python, function: ppo_vs_dpo.preferences.testbed.reviewer:judge}``."""
    return Judge()
