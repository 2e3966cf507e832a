"""Prompts without responses: for PPO, for constitutional AI, for rejection sampling."""

from collections.abc import Iterator
from typing import Any

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.preferences.reading.mappings import UnmappableError, parse_dialogue, value_of
from ppo_vs_dpo.preferences.reading.mappings.general import CONVERSATIONS, part_of
from ppo_vs_dpo.preferences.reading.mappings.messages import is_messages, message, messages_of, parsed, user_turn
from ppo_vs_dpo.preferences.reading.readers import whole_rows
from ppo_vs_dpo.preferences.schema import Text, prompt_id, text_of

# Columns that hold a prompt, the first that a row has decides.
PROMPT_COLUMNS = ("prompt", *CONVERSATIONS, "query", "instruction", "question", "history", "chosen")


def prompt_of(row: dict[str, Any]) -> Text:
    """The prompt of a row: a text, messages up to the last user turn, or the opening of an HH dialogue.

    A ``system`` column goes in front as a message, an ``input`` column behind an instruction.

    Raises:
        UnmappableError: no such column, or not of that form.
    """
    column = next((name for name in PROMPT_COLUMNS if row.get(name) not in (None, "", [])), None)
    if column is None:
        raise UnmappableError(
            "missing_field", f"no prompt ({', '.join(PROMPT_COLUMNS)}); the row has {', '.join(map(str, row))}"
        )
    value = parsed(value_of(row, column, (str, list, dict)), column)
    if isinstance(value, dict):
        raise UnmappableError("wrong_type", f"{column} is an object and no message")
    if isinstance(value, list):
        prompt: Text = messages_of(value, column)
        while prompt and prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]
    elif column == "chosen":
        head, turn, _ = value.rpartition("\n\nAssistant:")
        if not turn:
            raise UnmappableError("missing_field", "no prompt, and chosen is not a dialogue")
        prompt = parse_dialogue(head)
    else:
        prompt = value.strip() if column == "query" else value
    more = row.get("input")
    if column == "instruction" and isinstance(more, str) and more.strip():
        prompt = f"{prompt}\n{more}"
    texts = (name for name, value in row.items() if isinstance(value, str) and value.strip())
    system = next((row[name] for name in texts if part_of(name) == "system"), None)
    if system is None or system in text_of(prompt):
        return prompt
    return [message("system", system), *(user_turn(prompt) if isinstance(prompt, str) else prompt)]


def read_prompts(
    path: str, split: str = "train", conversational: bool | None = None, limit: int | None = None
) -> Iterator[Text]:
    """Different prompts of a file, a folder or a Hub set.

    Raises:
        UserError: the first row that cannot be read or has no prompt; names its place.
    """
    seen: set[str] = set()
    for place, row in whole_rows(path, split):
        try:
            prompt = prompt_of(row)
        except UnmappableError as problem:
            raise UserError(f"{place}: {problem}.") from None
        if not prompt:
            raise UserError(f"{place}: the prompt is empty.")
        if conversational and isinstance(prompt, str):
            prompt = user_turn(prompt)
        if conversational is False and isinstance(prompt, list):
            raise UserError(f"{place}: a conversation, where the other prompts are plain text.")
        identity = prompt_id(prompt)
        if identity not in seen:
            seen.add(identity)
            yield prompt
        if limit is not None and len(seen) >= limit:
            return


def read_examples(path: str, split: str = "train", conversational: bool = False) -> Iterator[tuple[Text, Text]]:
    """SFT examples as (prompt, completion): of a file, a folder or a Hub set.

    Columns ``prompt`` and ``completion``, messages that end with an answer, Alpaca's ``instruction``, ``input`` and
    ``output``, or N+'s ``query`` and ``reference_response`` (without the end-of-text mark).

    Raises:
        UserError: the first row that cannot be read or lacks a column; names its place.
    """
    for place, row in whole_rows(path, split):
        try:
            prompt, completion = _example(row)
        except UnmappableError as problem:
            raise UserError(f"{place}: {problem} (data.sft_path).") from None
        if conversational and isinstance(prompt, str):
            prompt = user_turn(prompt)
        if conversational and isinstance(completion, str):
            completion = [message("assistant", completion.strip())]
        if not conversational and not (isinstance(prompt, str) and isinstance(completion, str)):
            raise UserError(f"{place}: a conversation, where the pairs are plain text (data.sft_path).")
        yield prompt, completion


def _example(row: dict[str, Any]) -> tuple[Text, Text]:
    """Prompt and completion of a row: TRL's two columns, N+'s, Alpaca's three, or messages that end with an answer."""
    if "reference_response" in row:
        answer = value_of(row, "reference_response").replace("<|endoftext|>", "").strip()
        return value_of(row, "query").strip(), f" {answer}"
    name = next((name for name in CONVERSATIONS if is_messages(parsed(row.get(name), name))), None)
    if "prompt" not in row and name is not None:
        messages = messages_of(parsed(row[name], name), name)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise UnmappableError("not_assistant", f"{name} does not end with the assistant's words")
        return messages[:-1], messages[-1:]
    answer_column = "output" if "instruction" in row and "output" in row else "completion"
    completion = parsed(value_of(row, answer_column, (str, list, dict)), answer_column)
    if isinstance(completion, list):
        completion = messages_of(completion, answer_column)
        if not completion or completion[0]["role"] != "assistant" or completion[-1]["role"] != "assistant":
            raise UnmappableError("not_assistant", "completion does not begin and end with the assistant's words")
    return prompt_of({**row, "prompt": row.get("prompt")}), completion
