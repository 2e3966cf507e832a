"""Conversations written out by the model's chat template, so that what messages of text cannot hold comes along.

Tool calls, the tools themselves and reasoning beside an answer are given to the template, and what it writes is looked
through for each of them: a template that drops one is said by name, never trained on.
"""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ppo_vs_dpo.models.text.prompts import encode_prompt, require_chat_template, without_eos_text
from ppo_vs_dpo.preferences.reading.mappings.base import UnmappableError

SIDES = ("chosen", "rejected")
Messages = list[dict[str, Any]]


class Renderer:
    """From a pair of messages to a pair of texts, as the chat template writes them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        require_chat_template(tokenizer)
        self.tokenizer = tokenizer

    def __call__(self, pair: dict[str, Any]) -> dict[str, Any]:
        """The pair as text: the prompt up to where the answer begins, each answer without its EOS.

        Raises:
            UnmappableError: the template refuses the conversation or leaves something out of it; an answer of several
                turns, of which a text would not say whose words are whose.
        """
        tools = pair.get("tools")
        prompt = self._written(pair["prompt"], tools, add_generation_prompt=True)
        self._check(prompt, "the prompt", [*_parts_of(pair["prompt"]), *_names_of(tools)])
        ids = self.tokenizer.apply_chat_template(
            pair["prompt"], tools=tools, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        if encode_prompt(self.tokenizer, prompt) != list(ids):
            raise UnmappableError(
                "template", "as a text, the rendered prompt has other tokens than the template gives"
            )
        found = {name: value for name, value in pair.items() if name not in ("tools", "prompt", *SIDES)}
        return {"prompt": prompt, **{side: self._answer(pair, side, prompt) for side in SIDES}, **found}

    def _answer(self, pair: dict[str, Any], side: str, prompt: str) -> str:
        turns = pair[side]
        if len(turns) != 1:
            raise UnmappableError(
                "not_text", f"{side} has {len(turns)} messages: written out, all would be trained on"
            )
        whole = self._written([*pair["prompt"], *turns], pair.get("tools"))
        if not whole.startswith(prompt):
            raise UnmappableError("template", "the template writes the prompt otherwise once it is answered")
        # What the template puts behind EOS is no part of an answer.
        text, mark, _ = whole[len(prompt) :].rpartition(self.tokenizer.eos_token)
        text = text if mark else whole[len(prompt) :]
        self._check(text, side, list(_parts_of(turns)))
        return without_eos_text(self.tokenizer, text)

    def _written(self, messages: Messages, tools: Any, add_generation_prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise UnmappableError("template", f"the chat template refuses it ({error})") from None

    def _check(self, text: str, where: str, parts: list[tuple[str, str]]) -> None:
        written = _squeezed(text)
        # As often as it is said: the name of a tool stands in its description and in each call.
        wanted = Counter(_squeezed(said) for _, said in parts)
        for what, said in parts:
            if written.count(_squeezed(said)) < wanted[_squeezed(said)]:
                raise UnmappableError("template", f"the chat template leaves {what} of {where} out ({said[:40]!r})")


def _parts_of(messages: Messages) -> Iterator[tuple[str, str]]:
    """What a template must write of messages: ``(what it is, a text that must be there)``."""
    for message in messages:
        yield f"what {message['role']} says", message["content"].rpartition("</think>")[2]
        if message.get("reasoning_content"):
            yield "the reasoning", message["reasoning_content"]
        for call in message.get("tool_calls") or []:
            function = call.get("function", call)
            yield "a tool call", str(function.get("name", ""))
            for name, value in (function.get("arguments") or {}).items():
                yield "a tool call's argument", name
                # As JSON has it, without the quotes, which some templates write otherwise.
                yield "a tool call's argument", value if isinstance(value, str) else json.dumps(value)


def _names_of(tools: Any) -> Iterator[tuple[str, str]]:
    for tool in tools or []:
        yield "a tool", str(tool.get("function", tool).get("name", "")) if isinstance(tool, dict) else str(tool)


def _squeezed(text: str) -> str:
    """Without what templates and JSON change around and inside of values: space and escapes."""
    return "".join(text.replace("\\n", "").replace("\\", "").split())
