"""The steps of constitutional AI, each written to a log as it is finished: answers, critiques, revisions, choices.

Every step of every prompt has a key (what, round); a killed run asks only for the keys that the log lacks.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.generation import row_seed
from preferences.constitution.endpoints import Answer, Model, Request
from preferences.constitution.principles import Principle
from preferences.schema import Text, text_of
from preferences.steplog import StepLog

Key = tuple[str, int]


@dataclass
class Item:
    """A prompt and what has been done with it: (what, round) -> the logged step."""

    prompt: Text
    prompt_id: str
    steps: dict[Key, dict[str, Any]]

    def text(self, what: str, round: int) -> str:
        """The text of a finished step."""
        return self.steps[what, round]["text"]


def load_items(prompts: Iterable[dict[str, Any]], log: StepLog) -> list[Item]:
    """Prompts with the steps that the log has."""
    items = {row["prompt_id"]: Item(row["prompt"], row["prompt_id"], {}) for row in prompts}
    for step in log:
        if step["prompt_id"] in items:
            items[step["prompt_id"]].steps[step["what"], step["round"]] = step
    return list(items.values())


def draw_principle(principles: Sequence[Principle], seed: int, prompt_id: str, what: str, round: int) -> Principle:
    """One principle, each equally likely, named by prompt and round: a resumed run draws the same."""
    stream = np.random.default_rng(row_seed(seed, "principle", prompt_id, what, round))
    return principles[int(stream.integers(len(principles)))]


class Runner:
    """Does steps in batches and logs each one as it comes back."""

    def __init__(
        self, log: StepLog, seed: int, batch: int, progress: Callable[[int, str], None] | None = None, done: int = 0
    ):
        self.log, self.seed, self.batch, self.progress, self.done = log, seed, batch, progress, done

    def run(
        self,
        items: Sequence[Item],
        key: Key,
        ask: Callable[[Sequence[Request]], Iterator[tuple[int, Any]]],
        conversation: Callable[[Item], Text],
        more: Callable[[Item], dict[str, Any]] = lambda item: {},
    ) -> None:
        """Do one step for all items that lack it.

        Args:
            items: prompts.
            key: (what, round) of the step.
            ask: `Model.answer` or `Model.choose`.
            conversation: what the model is given.
            more: what is logged besides the result.
        """
        what, round = key
        todo = [item for item in items if key not in item.steps]
        self._tell(len(items) - len(todo), what)
        for start in range(0, len(todo), self.batch):
            some = todo[start : start + self.batch]
            requests = [Request(conversation(item), row_seed(self.seed, item.prompt_id, what, round)) for item in some]
            for number, result in ask(requests):
                item = some[number]
                step = {"prompt_id": item.prompt_id, "what": what, "round": round, **_as_fields(result), **more(item)}
                self.log.append([step])
                item.steps[key] = step
                self._tell(1, what)
            self.log.sync()

    def _tell(self, count: int, what: str) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done, what)


def _as_fields(result: Answer | float) -> dict[str, Any]:
    if isinstance(result, Answer):
        return {"text": result.text, "finished": result.finished}
    return {"log_odds": result}


def _messages(prompt: Text) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def critique_and_revise(
    items: Sequence[Item],
    runner: Runner,
    helper: Model,
    critic: Model,
    principles: Sequence[Principle],
    rounds: int,
    few_shot: Sequence[dict[str, str]] = (),
) -> None:
    """Answer, then ``rounds`` times criticise under a principle drawn at random and revise (Bai et al. 2022b, 3.1).

    The revision takes the answer's place in the next round.
    """
    runner.run(items, ("answer", 0), helper.answer, lambda item: item.prompt)
    for round in range(1, rounds + 1):

        def current(item: Item, round: int = round) -> str:
            return item.text("answer", 0) if round == 1 else item.text("revision", round - 1)

        def drawn(item: Item, round: int = round) -> Principle:
            return draw_principle(principles, runner.seed, item.prompt_id, "critique", round)

        def to_criticise(item: Item, current=current, drawn=drawn) -> Text:
            return [*few_shot, *_messages(item.prompt), _assistant(current(item)), _user(drawn(item).critique)]

        def to_revise(item: Item, drawn=drawn, to_criticise=to_criticise, round: int = round) -> Text:
            return [*to_criticise(item), _assistant(item.text("critique", round)), _user(drawn(item).revision)]

        def principle(item: Item, drawn=drawn) -> dict[str, str]:
            return {"principle": drawn(item).id}

        runner.run(items, ("critique", round), critic.answer, to_criticise, principle)
        runner.run(items, ("revision", round), critic.answer, to_revise, principle)


def question(prompt: Text, principle: Principle, first: str, second: str) -> Text:
    """The multiple-choice question of the AI-feedback stage (Bai et al. 2022b, section 4.1)."""
    asked = text_of(prompt) if isinstance(prompt, str) else "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)
    return [
        _user(
            f"Here is a conversation, and two answers to it.\n\n{asked}\n\n{principle.choice}\n\n"
            f"(A) {first.strip()}\n\n(B) {second.strip()}\n\nAnswer with (A) or (B) and nothing else."
        )
    ]


def compare_samples(
    items: Sequence[Item], runner: Runner, helper: Model, judge: Model, principles: Sequence[Principle]
) -> None:
    """Two samples of each prompt, judged under one principle in both orders."""
    for draw in (0, 1):
        runner.run(items, ("sample", draw), helper.answer, lambda item: item.prompt)
    different = [item for item in items if item.text("sample", 0) != item.text("sample", 1)]

    def drawn(item: Item) -> Principle:
        return draw_principle(principles, runner.seed, item.prompt_id, "choice", 0)

    for order in (0, 1):

        def ask(item: Item, order: int = order) -> Text:
            first, second = (item.text("sample", draw) for draw in ((0, 1), (1, 0))[order])
            return question(item.prompt, drawn(item), first, second)

        runner.run(different, ("choice", order), judge.choose, ask, lambda item: {"principle": drawn(item).id})


def preference_log_odds(first_shown: float, second_shown: float) -> float:
    """Log-odds that the first answer is better, from both orders, averaged in logit space.

    A position bias b adds to both: l_1 = s + b and l_2 = -s + b, so (l_1 - l_2) / 2 = s exactly. Averaging the two
    probabilities does not cancel it.

    Args:
        first_shown: log-odds of (A) against (B) with the first answer as (A).
        second_shown: the same with the first answer as (B).
    """
    return (first_shown - second_shown) / 2


def position_bias(first_shown: float, second_shown: float) -> float:
    """Log-odds that the judge gives to (A) whatever stands there: (l_1 + l_2) / 2."""
    return (first_shown + second_shown) / 2


def soft_label(log_odds: float) -> float:
    """Probability of the preferred side: at least 1/2."""
    return 1 / (1 + math.exp(-abs(log_odds)))


def all_steps(mode: str, rounds: int) -> list[Key]:
    """Keys of everything that is done with one prompt, for the progress."""
    revision = [("answer", 0), *itertools.product(("critique", "revision"), range(1, rounds + 1))]
    feedback = [("sample", 0), ("sample", 1), ("choice", 0), ("choice", 1)]
    return {"revision": revision, "feedback": feedback, "both": revision + feedback}[mode]
