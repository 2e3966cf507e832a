"""The one schema: what a prompt, a pair and a pair set are, and how each is identified.

A pair is TRL's explicit-prompt preference format: ``prompt``, ``chosen``, ``rejected``, all strings (standard) or all
lists of ``{"role", "content"}`` messages (conversational), with ``prompt_id`` and ``pair_id`` and, where the source
has them, ``margin``, ``chosen_score``, ``rejected_score`` and ``soft_label`` (probability that chosen is better).
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

Text = str | list[dict[str, str]]

OPTIONAL_NUMBERS = ("margin", "chosen_score", "rejected_score", "soft_label")
# Who labelled and who wrote, where a source says it: figures may be asked for by them.
OPTIONAL_TEXTS = ("batch", "chosen_policy", "rejected_policy")
OPTIONAL = (*OPTIONAL_NUMBERS, *OPTIONAL_TEXTS)


def _digest(value: Any) -> str:
    """`artifacts.files.sha256_of` for texts and messages, without its care for numbers (a third of an import)."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def prompt_id(prompt: Text) -> str:
    """SHA-256 of a prompt's canonical JSON, 16 hex digits."""
    return _digest(prompt)[:16]


def pair_id(prompt: Text, chosen: Text, rejected: Text) -> str:
    """SHA-256 of a pair's canonical JSON, 16 hex digits. The order of the two sides matters."""
    return _digest([prompt, chosen, rejected])[:16]


def text_of(value: Text) -> str:
    """The text of a prompt or response; messages are joined by blank lines."""
    return value if isinstance(value, str) else "\n\n".join(message["content"] for message in value)


def pair_set_hash(pair_ids: dict[str, Iterable[str]]) -> str:
    """Identity of a pair set: SHA-256 over its (split, pair) entries, whatever their order.

    Args:
        pair_ids: split name -> pair ids; `pair_id` covers prompt, chosen and rejected.
    """
    entries = sorted(f"{split}:{identity}" for split, ids in pair_ids.items() for identity in ids)
    return hashlib.sha256("\n".join(entries).encode()).hexdigest()


def pair_set(pair_ids: dict[str, list[str]]) -> dict[str, Any]:
    """What ``done.json`` says of a pair set: its identity and sizes."""
    sizes = {f"n_{split}": len(pair_ids.get(split, ())) for split in ("train", "test")}
    return {"hash": pair_set_hash(pair_ids), **sizes}


def as_answer(prompt: Text, text: str) -> Text:
    """A completion in the form of its prompt: text, or a message of the assistant."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def make_pair(prompt: Text, chosen: Text, rejected: Text, **extra: Any) -> dict[str, Any]:
    """A row of the schema, ids filled in; ``extra`` are further columns."""
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "prompt_id": prompt_id(prompt),
        "pair_id": pair_id(prompt, chosen, rejected),
        **extra,
    }
