"""What a model would make of pairs: text or conversation, marks that are there, words that a template drops."""

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ppo_vs_dpo.models.text.chat_template import disagreement, is_rendered, left_out, marks_inside, marks_of
from ppo_vs_dpo.models.text.prompts import require_chat_template
from ppo_vs_dpo.preferences.reading.validation import Checker, Report
from ppo_vs_dpo.preferences.schema import Text

SIDES = ("chosen", "rejected")


def glued(prompt: str, answer: str) -> str:
    """The place where a text prompt and its answer meet, as a model reads it."""
    return f"{'…' if len(prompt) > 30 else ''}{prompt[-30:]}{answer[:30]}{'…' if len(answer) > 30 else ''}"


def text_for_a_chat_model(tokenizer: PreTrainedTokenizerBase, prompt: Text, answer: str = "") -> str | None:
    """Why a text prompt is not what a chat model expects, and both remedies; ``None`` where it is fine.

    Fine is a conversation, a model without a chat template, and a text that the template rendered already.
    """
    if not isinstance(prompt, str) or not tokenizer.chat_template or is_rendered(tokenizer, prompt):
        return None
    return (
        f"plain text, and {tokenizer.name_or_path} is a chat model (it has a chat template): as it is, it would read "
        f"{glued(prompt, answer)!r}, with no turn between question and answer. Say data.conversational=true to make "
        f"messages of the texts, or data.conversational=false to use them as they are."
    )


class AsRead:
    """Checks pairs by the tokenizer of the model that reads them; without one, none of it.

    Args:
        tokenizer: of the model.
        checker: counts the problems.
        conversational: what the data section says: with ``None``, plain text for a chat model is refused (by
            `Report.raise_errors`, beside the other problems).
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, checker: Checker, conversational: bool | None = None
    ):
        self.tokenizer, self.checker, self.conversational = tokenizer, checker, conversational
        self.marks = marks_of(tokenizer) if tokenizer is not None else frozenset()
        # Roles of a conversation -> what the template does to one of that kind.
        self._known: dict[tuple[str, ...], str | None] = {}
        self.said: list[str] = []
        self._first = True

    def keeps(self, place: str, row: dict[str, Any]) -> bool:
        """Whether a pair stays.

        Raises:
            UserError: conversations for a tokenizer without a chat template.
        """
        if self.tokenizer is None:
            return True
        if self._first:
            self._start(place, row)
        inside = {
            name: found
            for name in ("prompt", *SIDES)
            if (found := marks_inside(self.marks, row[name], answer=name != "prompt"))
        }
        if inside:
            detail = "; ".join(f"{', '.join(found)} in {name}" for name, found in inside.items())
            if self.checker.drops("marks", place, detail):
                return False
        if isinstance(row["prompt"], list):
            refused = next(filter(None, (self._template(row["prompt"], row[side]) for side in SIDES)), None)
            if refused is not None and self.checker.drops("template", place, refused):
                return False
        if self._first:
            self._first = False
            found = disagreement(self.tokenizer, row["prompt"], row["chosen"])
            if found is not None:
                self.said.append(f"{place}: {found}")
        return True

    def _start(self, place: str, row: dict[str, Any]) -> None:
        """What the first pair shows of them all."""
        if isinstance(row["prompt"], list):
            require_chat_template(self.tokenizer)
        elif self.conversational is None:
            why = text_for_a_chat_model(self.tokenizer, row["prompt"], row["chosen"])
            if why is not None:
                self.checker.report.refused.append(f"{place}: {why}")

    def _template(self, prompt: list[dict[str, str]], answer: list[dict[str, str]]) -> str | None:
        before = [*prompt, *answer[:-1]]
        roles = tuple(message["role"] for message in before)
        if roles not in self._known:
            try:
                missing = left_out(self.tokenizer, before)
            except TemplateError as error:
                self._known[roles] = f"the chat template refuses {', '.join(roles)} ({error})"
            else:
                self._known[roles] = f"it leaves out what {', '.join(missing)} says" if missing else None
        return self._known[roles]


def said_of(report: Report) -> list[str]:
    """Sentences for the console: what was left out, and what was kept although something is the matter with it."""
    found = []
    for kind, problem in report.problems.items():
        if problem.count and problem.policy != "error":
            does = {"drop": "left out", "keep": "kept"}[problem.policy]
            found.append(
                f"{problem.count} of {report.rows} rows {does}: {kind} (first: {problem.examples[0]['place']}, "
                f"{problem.examples[0]['detail']})"
            )
    found += [f"{count} of {report.rows} rows left out: {reason}" for reason, count in report.filtered.items()]
    return found
