"""The steps of constitutional AI, each written to a log as it is finished: answers, critiques, revisions, choices.

Every step of every prompt has a key (what, round); a killed run asks only for the keys that the log lacks.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppo_vs_dpo.models.sampling.chat import Refused
from ppo_vs_dpo.models.sampling.generation import row_seed
from ppo_vs_dpo.preferences.constitution.endpoints import Answer, Model, Request
from ppo_vs_dpo.preferences.constitution.principles import Principle
from ppo_vs_dpo.preferences.reading.mappings.messages import message
from ppo_vs_dpo.preferences.recipes.steplog import StepLog
from ppo_vs_dpo.preferences.schema import Text, text_of

Key = tuple[str, int]

# How a judge is asked to choose, and to reason before it chooses (Kojima et al. 2022).
CHOOSE = "Answer with (A) or (B) and nothing else."
THINK = "Compare the two in a few sentences. Let's think step by step."


@dataclass
class Item:
    """A prompt and what has been done with it: (what, round) -> the logged step."""

    prompt: Text
    prompt_id: str
    steps: dict[Key, dict[str, Any]]

    @property
    def refused(self) -> bool:
        """Whether a model refused one of its steps: nothing more is asked about it."""
        return any("refused" in step for step in self.steps.values())

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
        drawn: Callable[[Item], Principle] | None = None,
    ) -> None:
        """Do one step for all items that lack it.

        ``ask`` is `Model.answer` or `Model.choose`; the principle that was ``drawn`` for an item is logged,
        too.
        """
        what, round = key
        todo = [item for item in items if key not in item.steps and not item.refused]
        self._tell(len(items) - len(todo), what)
        for start in range(0, len(todo), self.batch):
            some = todo[start : start + self.batch]
            requests = [Request(conversation(item), row_seed(self.seed, item.prompt_id, what, round)) for item in some]
            for number, result in ask(requests):
                item = some[number]
                under = {"principle": drawn(item).id} if drawn is not None else {}
                step = {"prompt_id": item.prompt_id, "what": what, "round": round, **_as_fields(result), **under}
                self.log.append([step])
                item.steps[key] = step
                self._tell(1, what)
            self.log.sync()

    def _tell(self, count: int, what: str) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done, what)


def _as_fields(result: Answer | float | Refused) -> dict[str, Any]:
    if isinstance(result, Refused):
        return {"refused": str(result)}
    if isinstance(result, Answer):
        return {"text": result.text, "finished": result.finished}
    return {"log_odds": result}


def _opened(prompt: Text, system: str | None) -> Text:
    """The prompt, after the system message where there is one."""
    return prompt if system is None else [message("system", system), *_messages(prompt)]


def _messages(prompt: Text) -> list[dict[str, str]]:
    return [message("user", prompt)] if isinstance(prompt, str) else list(prompt)


def critique_and_revise(
    items: Sequence[Item],
    runner: Runner,
    helper: Model,
    critic: Model,
    principles: Sequence[Principle],
    rounds: int,
    few_shot: Sequence[dict[str, str]] = (),
    system: str | None = None,
) -> None:
    """Answer, then ``rounds`` times criticise under a principle drawn at random and revise (Bai et al. 2022b, 3.1).

    The revision takes the answer's place in the next round.
    """
    runner.run(items, ("answer", 0), helper.answer, lambda item: _opened(item.prompt, system))
    for round in range(1, rounds + 1):
        current = ("answer", 0) if round == 1 else ("revision", round - 1)

        def drawn(item: Item, round: int = round) -> Principle:
            return draw_principle(principles, runner.seed, item.prompt_id, "critique", round)

        def to_criticise(item: Item, current=current, drawn=drawn) -> Text:
            before = _opened([*few_shot, *_messages(item.prompt)], system)
            return [*before, message("assistant", item.text(*current)), message("user", drawn(item).critique)]

        def to_revise(item: Item, drawn=drawn, to_criticise=to_criticise, round: int = round) -> Text:
            return [
                *to_criticise(item),
                message("assistant", item.text("critique", round)),
                message("user", drawn(item).revision),
            ]

        runner.run(items, ("critique", round), critic.answer, to_criticise, drawn)
        runner.run(items, ("revision", round), critic.answer, to_revise, drawn)


def question(prompt: Text, principle: Principle, first: str, second: str, closing: str = CHOOSE) -> Text:
    """The multiple-choice question of the AI-feedback stage (Bai et al. 2022b, section 4.1)."""
    asked = text_of(prompt) if isinstance(prompt, str) else "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)
    return [
        message(
            "user",
            f"Here is a conversation, and two answers to it.\n\n{asked}\n\n{principle.choice}\n\n"
            f"(A) {first.strip()}\n\n(B) {second.strip()}\n\n{closing}",
        )
    ]


def compare_samples(
    items: Sequence[Item],
    runner: Runner,
    helper: Model,
    judge: Model,
    principles: Sequence[Principle],
    chain_of_thought: bool = False,
    system: str | None = None,
) -> None:
    """Two samples of each prompt, judged under one principle in both orders.

    With ``chain_of_thought`` the judge first reasons in its own words and then chooses, with its reasoning before it.
    """
    for draw in (0, 1):
        runner.run(items, ("sample", draw), helper.answer, lambda item: _opened(item.prompt, system))
    sampled = [item for item in items if not item.refused]
    different = [item for item in sampled if item.text("sample", 0) != item.text("sample", 1)]

    def drawn(item: Item) -> Principle:
        return draw_principle(principles, runner.seed, item.prompt_id, "choice", 0)

    for order in (0, 1):

        def ask(item: Item, closing: str, order: int = order) -> Text:
            first, second = (item.text("sample", draw) for draw in ((0, 1), (1, 0))[order])
            return question(item.prompt, drawn(item), first, second, closing)

        def to_reason(item: Item, ask=ask) -> Text:
            return ask(item, THINK)

        def to_choose(item: Item, ask=ask, order: int = order) -> Text:
            if not chain_of_thought:
                return ask(item, CHOOSE)
            return [*ask(item, THINK), message("assistant", item.text("reasoning", order)), message("user", CHOOSE)]

        if chain_of_thought:
            runner.run(different, ("reasoning", order), judge.answer, to_reason, drawn)
        runner.run(different, ("choice", order), judge.choose, to_choose, drawn)


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


def soft_label(log_odds: float, limit: float = 1.0) -> float:
    """Probability of the preferred side: at least 1/2, at most ``limit``.

    A judge that has reasoned is nearly always sure, rightly or not; Bai et al. 2022b (section 4.1) clamp its
    probabilities to 40-60 %, ``limit`` 0.6. The two orders are averaged first: clamped log-odds would not cancel a
    position bias.
    """
    return min(1 / (1 + math.exp(-abs(log_odds))), limit)


def all_steps(mode: str, rounds: int, chain_of_thought: bool = False) -> list[Key]:
    """Keys of everything that is done with one prompt, for the progress."""
    revision = [("answer", 0), *itertools.product(("critique", "revision"), range(1, rounds + 1))]
    judged = ("reasoning", "choice") if chain_of_thought else ("choice",)
    feedback = [("sample", 0), ("sample", 1), *itertools.product(judged, (0, 1))]
    return {"revision": revision, "feedback": feedback, "both": revision + feedback}[mode]
