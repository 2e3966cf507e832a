"""Prompts without responses: for PPO, for constitutional AI, for rejection sampling."""

from collections.abc import Iterator
from typing import Any

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.preferences.reading.mappings import UnmappableError, parse_dialogue, value_of
from ppo_vs_dpo.preferences.reading.readers import Broken, is_local, read_files, read_hub
from ppo_vs_dpo.preferences.schema import Text, prompt_id

# Columns that hold a prompt, the first that a row has decides.
PROMPT_COLUMNS = ("prompt", "messages", "query", "instruction", "history", "chosen")


def prompt_of(row: dict[str, Any]) -> Text:
    """The prompt of a row: a text, messages up to the last user turn, or the opening of an HH dialogue.

    Raises:
        UnmappableError: no such column, or not of that form.
    """
    column = next((name for name in PROMPT_COLUMNS if row.get(name) is not None), None)
    if column is None:
        raise UnmappableError(
            "missing_field", f"no prompt ({', '.join(PROMPT_COLUMNS)}); the row has {', '.join(row)}"
        )
    value = value_of(row, column, (str, list))
    if isinstance(value, list):
        while value and value[-1].get("role") == "assistant":
            value = value[:-1]
        return [{"role": message["role"], "content": message["content"]} for message in value]
    if column == "chosen":
        head, turn, _ = value.rpartition("\n\nAssistant:")
        if not turn:
            raise UnmappableError("missing_field", "no prompt, and chosen is not a dialogue")
        return parse_dialogue(head)
    return value.strip() if column == "query" else value


def read_prompts(
    path: str, split: str = "train", conversational: bool | None = None, limit: int | None = None
) -> Iterator[Text]:
    """Different prompts of a file, a folder or a Hub set.

    Args:
        path: where they are.
        split: the Hub's split.
        conversational: make messages of texts; ``None``: as they are.
        limit: at most so many.

    Raises:
        UserError: the first row that cannot be read or has no prompt; names its place.
    """
    seen: set[str] = set()
    for place, row in read_files(path) if is_local(path) else read_hub(path, split):
        if limit is not None and len(seen) >= limit:
            return
        if isinstance(row, Broken):
            raise UserError(f"{place}: {row.detail}.")
        try:
            prompt = prompt_of(row)
        except UnmappableError as problem:
            raise UserError(f"{place}: {problem}.") from None
        if not prompt:
            raise UserError(f"{place}: the prompt is empty.")
        if conversational and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt.strip()}]
        if conversational is False and isinstance(prompt, list):
            raise UserError(f"{place}: a conversation, where the other prompts are plain text.")
        identity = prompt_id(prompt)
        if identity not in seen:
            seen.add(identity)
            yield prompt


def read_examples(path: str, split: str = "train", conversational: bool = False) -> Iterator[tuple[Text, Text]]:
    """SFT examples as (prompt, completion): of a file, a folder or a Hub set.

    Columns ``prompt`` and ``completion``, or N+'s ``query`` and ``reference_response`` (without the end-of-text mark).

    Raises:
        UserError: the first row that cannot be read or lacks a column; names its place.
    """
    for place, row in read_files(path) if is_local(path) else read_hub(path, split):
        if isinstance(row, Broken):
            raise UserError(f"{place}: {row.detail}.")
        try:
            if "reference_response" in row:
                prompt: Text = value_of(row, "query").strip()
                completion: Text = " " + value_of(row, "reference_response").replace("<|endoftext|>", "").strip()
            else:
                prompt, completion = (value_of(row, name, (str, list)) for name in ("prompt", "completion"))
        except UnmappableError as problem:
            raise UserError(f"{place}: {problem} (data.sft_path).") from None
        if conversational and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt.strip()}]
            completion = [{"role": "assistant", "content": str(completion).strip()}]
        if not conversational and isinstance(prompt, list):
            raise UserError(f"{place}: a conversation, where the pairs are plain text (data.sft_path).")
        yield prompt, completion
