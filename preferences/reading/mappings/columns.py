"""Which columns of a source may be the prompt and the answers, by their names; tried on a row before it is said."""

import itertools
import re
from typing import Any

from ppo_vs_dpo.preferences.reading.mappings.base import PARTS, FilteredError, MappingOptions, UnmappableError
from ppo_vs_dpo.preferences.reading.mappings.general import CONVERSATIONS, SCORES, pairs, part_of

_REJECTED = ("rejected", "reject", "dispreferred", "nonpreferred", "unpreferred", "worse", "worst", "bad", "negative")
_REJECTED += ("neg", "loser", "losing", "lose", "lost", "incorrect", "wrong")
_CHOSEN = ("chosen", "preferred", "accepted", "better", "best", "good", "positive", "pos", "winner", "winning", "win")
_CHOSEN += ("correct", "right")
_PROMPT = ("prompt", "question", "instruction", "query", "problem", "request", "input", "user", "context", "post")
_PROMPT += ("text",)


def propose(row: dict[str, Any]) -> dict[str, str]:
    """``{"prompt": ..., "chosen": ..., "rejected": ...}`` (and ``system``) for ``columns``; empty where none fits."""
    free = {name: _words(name) for name, value in row.items() if isinstance(value, str | list | dict) and value}
    found: dict[str, str] = {}
    for part, words in (("rejected", _REJECTED), ("chosen", _CHOSEN), ("prompt", _PROMPT)):
        for word in words:
            name = next((name for name, its in free.items() if word in its and name not in found.values()), None)
            if name is not None:
                found[part] = name
                break
    if not {"chosen", "rejected"} <= set(found):
        return {}
    texts = [name for name, value in row.items() if isinstance(value, str) and value.strip()]
    system = next((name for name in texts if part_of(name) == "system"), None)
    if system is not None:
        found["system"] = system
    order = ("prompt", "chosen", "rejected", "system")
    found = {part: found[part] for part in order if part in found and (found[part] != part or part == "system")}
    try:
        pairs(row, MappingOptions(columns=found))
    except (UnmappableError, FilteredError):
        return {}
    return found


def _words(name: str) -> list[str]:
    """``badAnswer_2`` -> bad, answer, 2; ``non_preferred`` -> non, preferred, nonpreferred."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)]
    joined = ["".join(pair) for pair in itertools.pairwise(words)]
    negated = {n + 1 for n, word in enumerate(words) if word in ("non", "not", "un", "dis")}
    return [*joined, *(word for n, word in enumerate(words) if n not in negated)]


def not_read(columns: list[str], named: dict[str, str]) -> list[str]:
    """Columns of ordinary pairs that no part of a pair is read from."""
    scores = {name for names in SCORES.values() for name in names}
    parts = {*PARTS, *CONVERSATIONS, *scores} - {"input", "system"}
    return [name for name in columns if name not in parts and name not in named.values()]


def as_option(columns: dict[str, str]) -> str:
    """``prompt=question,chosen=better,rejected=worse``."""
    return ",".join(f"{part}={name}" for part, name in columns.items())


def as_setting(columns: dict[str, str]) -> str:
    """``'data.columns={prompt: question, chosen: better, rejected: worse}'``."""
    return "'data.columns={" + ", ".join(f"{part}: {name or repr('')}" for part, name in columns.items()) + "}'"
