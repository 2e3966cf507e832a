"""Constitutions: lists of principles in YAML, or the paper's own JSON."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ppo_vs_dpo.artifacts.errors import UserError, first_sentence
from ppo_vs_dpo.artifacts.files import read_json
from ppo_vs_dpo.preferences.reading.mappings import UnmappableError, parse_dialogue

CONFIGS = Path(__file__).parents[2] / "configs" / "constitution"
_KEYS = ("id", "critique", "revision", "choice")


@dataclass(frozen=True)
class Principle:
    """One principle: what to look for, what to change, and which of two answers to prefer."""

    id: str
    critique: str
    revision: str
    choice: str


def load_constitution(name: str) -> list[Principle]:
    """The principles of a file.

    Args:
        name: a YAML or JSON file, or a name in configs/constitution.

    Raises:
        UserError: not found, or a principle lacks a request; names the entry.
    """
    path = Path(name)
    if not path.suffix:
        path = CONFIGS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(item.stem for item in CONFIGS.glob("*.yaml")))
        raise UserError(f"data.constitution={name}: {path} does not exist. Give a file, or one of {known}.")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"data.constitution={name}: {path} cannot be read ({first_sentence(error)}).") from error
    if isinstance(content, dict):
        principles = [_from_paper(path, key, entry) for key, entry in content.items()]
    elif isinstance(content, list):
        principles = [_from_yaml(path, number, entry) for number, entry in enumerate(content, start=1)]
    else:
        raise UserError(f"data.constitution={name}: {path} must hold a list of principles.")
    if not principles:
        raise UserError(f"data.constitution={name}: {path} holds no principle.")
    ids = [principle.id for principle in principles]
    if len(set(ids)) < len(ids):
        twice = sorted({identity for identity in ids if ids.count(identity) > 1})
        raise UserError(f"data.constitution={name}: {path} has the id {', '.join(twice)} twice.")
    return principles


def _from_yaml(path: Path, number: int, entry: Any) -> Principle:
    missing = [key for key in _KEYS if not isinstance(entry, dict) or not str(entry.get(key) or "").strip()]
    if missing:
        raise UserError(f"{path}, principle {number}: no {', '.join(missing)}. Each needs {', '.join(_KEYS)}.")
    return Principle(**{key: str(entry[key]).strip() for key in _KEYS})


def _from_paper(path: Path, key: str, entry: Any) -> Principle:
    """``{"harmful0": {"prompt": ["\\n\\nCritiqueRequest: ..."], "edit_request": "\\n\\nRevisionRequest: ..."}}``."""
    try:
        critique, revision = "".join(entry["prompt"]), entry["edit_request"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}, {key}: needs prompt and edit_request, as in the paper's files.") from error
    critique, revision = (
        re.sub(r"\n\n(Critique|Revision):$", "", re.sub(r"^\s*(Critique|Revision)Request:\s*", "", text)).strip()
        for text in (critique, revision)
    )
    choice = f"Which answer would this criticism fit less? The criticism: {critique}"
    return Principle(key, critique, revision, choice)


_TURNS = {
    "Human": "user",
    "Assistant": "assistant",
    "CritiqueRequest": "user",
    "Critique": "assistant",
    "RevisionRequest": "user",
    "Revision": "assistant",
}


def load_few_shot(path: str | None) -> list[dict[str, str]]:
    """Worked examples as messages: the paper's JSON list of transcripts, one after the other.

    Raises:
        UserError: not found, or not of that form.
    """
    if path is None:
        return []
    try:
        transcripts = read_json(path)
    except UserError as error:
        raise UserError(f"data.few_shot: {error}") from None
    if not isinstance(transcripts, list) or not all(isinstance(text, str) for text in transcripts):
        raise UserError(f"data.few_shot: {path} must hold a list of transcripts.")
    # The paper's transcripts end with the header of the next question.
    texts = [re.sub(r"\s*Human:\s*$", "", text) for text in transcripts]
    for number, text in enumerate(texts, start=1):
        try:
            parse_dialogue(text, _TURNS)
        except UnmappableError:
            raise UserError(rf"data.few_shot: {path}, transcript {number} does not start with \n\nHuman:.") from None
    messages = parse_dialogue("".join(texts), _TURNS) if texts else []
    if messages and messages[-1]["role"] == "user":
        raise UserError(f"data.few_shot: {path} ends with a question; each example must end with its answer.")
    return messages
