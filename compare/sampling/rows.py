"""Completions made elsewhere, matched with prompts however those are written down. Reads without torch."""

import json
from pathlib import Path
from typing import Any

from ppo_vs_dpo.artifacts.errors import UserError, short
from ppo_vs_dpo.artifacts.files import read_json
from ppo_vs_dpo.preferences.reading.readers import Broken, read_files
from ppo_vs_dpo.preferences.schema import Text, prompt_id, text_of

# Columns a completion is read from, the first that a row has; AlpacaEval's files say instruction and output.
COMPLETION_COLUMNS = ("completion", "output", "response")
PROMPT_COLUMNS = ("prompt", "instruction")


def names_of(prompt: Text) -> list[str]:
    """The fingerprints that a prompt may be found under: as it is, and as plain text where it is one user's turn."""
    found = [prompt_id(prompt)]
    if isinstance(prompt, str):
        found += [prompt_id(prompt.strip()), prompt_id([{"role": "user", "content": prompt.strip()}])]
    else:
        found.append(prompt_id(text_of(prompt)))
        users = [message for message in prompt if message["role"] != "system"]
        if len(users) == 1:
            found += [prompt_id(users[0]["content"].strip()), prompt_id([users[0]])]
    return list(dict.fromkeys(found))


def read_completions(path: str | Path, where: str) -> list[tuple[Text | None, str | None, str, bool]]:
    """Every row of a file of completions as ``(prompt, prompt_id, completion, finished)``.

    Args:
        path: JSON, JSON lines, CSV or Parquet, also ``.gz``.

    Raises:
        UserError: a row that cannot be read, without a text, or without a prompt; names file and line.
    """
    found = []
    for place, row in read_files(str(path)):
        if isinstance(row, Broken):
            raise UserError(f"{where}: {place}: {row.detail}.")
        text = next((row[name] for name in COMPLETION_COLUMNS if row.get(name) is not None), None)
        if isinstance(text, list) and len(text) == 1 and isinstance(text[0], dict):
            text = text[0].get("content")  # one assistant message
        if not isinstance(text, str):
            raise UserError(f"{where}: {place}: completion is missing or is not a text; the row has {', '.join(row)}.")
        prompt = next((row[name] for name in PROMPT_COLUMNS if row.get(name) is not None), None)
        if prompt is None and row.get("prompt_id") is None:
            raise UserError(f"{where}: {place}: neither prompt nor prompt_id; the row has {', '.join(row)}.")
        found.append((_plain(prompt), row.get("prompt_id"), text, bool(row.get("finished", True))))
    if not found:
        raise UserError(f"{where}: the file holds no completion.")
    return found


def match(path: str | Path, prompts: list[Text], ids: list[str], samples: int, where: str) -> list[list[tuple]]:
    """The completions ``(text, finished)`` of every prompt, at least ``samples`` each.

    Raises:
        UserError: as `read_completions`; or a prompt has too few, with the texts of one of each side.
    """
    by_name: dict[str, list[tuple[str, bool]]] = {}
    first_there = None
    for prompt, identity, text, finished in read_completions(path, where):
        if first_there is None:
            first_there = identity if prompt is None else text_of(prompt)
        names = [str(identity)] if identity is not None else names_of(prompt)
        for name in names:
            by_name.setdefault(name, []).append((text, finished))

    found, lacking = [], []
    for row, prompt in enumerate(prompts):
        names = [ids[row], *names_of(prompt)]
        mine = next((by_name[name] for name in names if name in by_name), [])
        found.append(mine)
        lacking += [row] if len(mine) < samples else []
    if lacking:
        theirs, there = short(text_of(prompts[lacking[0]]), 90), short(first_there, 90)
        number = "no completion" if samples == 1 else f"fewer than {samples} completions"
        raise UserError(
            f"{where} has {number} for {len(lacking)} of {len(prompts)} prompts. The first of them is "
            f"{ids[lacking[0]]}, {theirs}; the file's own first is {there}. "
            f"Each row needs the prompt as it stands in the prompts' file (a text, or a list of messages), or its "
            f"prompt_id, and completion."
        )
    return found


def has_template(model: str) -> bool | None:
    """Whether a model in a folder has a chat template; ``None`` where that is not known without the Hub."""
    folder = Path(model)
    if not folder.is_dir():
        return None
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and bool(read_json(config).get("chat_template"))


def fitting(prompts: list[Text], models: list[str]) -> tuple[list[Text], str]:
    """Prompts as the models read them, and what was done to them: plain text for chat models becomes a user's turn.

    Raises:
        UserError: conversations for a model without a chat template, or models of both kinds.
    """
    known = {model: has_template(model) for model in models if model}
    chat, plain = ([m for m, has in known.items() if has is wanted] for wanted in (True, False))
    texts = sum(isinstance(prompt, str) for prompt in prompts)
    if 0 < texts < len(prompts):
        raise UserError(
            f"{texts} of {len(prompts)} prompts are plain text and the others conversations: give one kind."
        )
    if not texts and plain:
        raise UserError(f"the prompts are conversations, and {plain[0]} has no chat template: give plain text.")
    if texts and chat and plain:
        raise UserError(
            f"{chat[0]} is a chat model and {plain[0]} is not: no prompt means the same to both. Let each make its "
            f"completions as it should, and give the files: --policy NAME=outputs.jsonl."
        )
    if texts and chat:
        turns = [[{"role": "user", "content": prompt.strip()}] for prompt in prompts]
        return (
            turns,
            f"{len(prompts)} prompts of plain text are asked as a user's turn each: {chat[0]} is a chat model.",
        )
    return prompts, ""


def _plain(prompt: Any) -> Any:
    """A conversation that was written as JSON text is a conversation; extra keys of messages are dropped."""
    if isinstance(prompt, str) and prompt.lstrip().startswith('[{"'):
        try:
            prompt = json.loads(prompt)
        except json.JSONDecodeError:
            return prompt
    if isinstance(prompt, list):
        return [{"role": str(one.get("role")), "content": str(one.get("content"))} for one in prompt]
    return prompt
