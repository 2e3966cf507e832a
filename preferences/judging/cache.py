"""Replies that were paid for, kept by content."""

import json
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ppo_vs_dpo.artifacts.files import append_jsonl
from ppo_vs_dpo.models.sampling.chat import Reply


class Cache:
    """Replies by content, a line each in a file: what was paid for survives any crash.

    A line that cannot be read (a torn write, a spoiled disk) costs its own reply and no other.

    Args:
        path: the file; ``None`` keeps replies in memory.

    Attributes:
        unreadable: how many lines were passed over.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.unreadable = 0
        self._lock = threading.Lock()
        self._known: dict[str, Reply] = {}
        if path is not None and path.is_file():
            for line in path.read_bytes().split(b"\n"):
                if line.strip():
                    self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            key, reply = _read(json.loads(line.decode("utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError):
            self.unreadable += 1
        else:
            self._known[key] = reply

    def get(self, key: str) -> Reply | None:
        """The reply under a key."""
        return self._known.get(key)

    def paid(self) -> tuple[int, int]:
        """Tokens of all replies that are kept: of prompts, of replies."""
        kept = self._known.values()
        return sum(one.prompt_tokens for one in kept), sum(one.completion_tokens for one in kept)

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply, on disk before this returns."""
        with self._lock:
            self._known[key] = reply
            if self.path is not None:
                append_jsonl(self.path, {"key": key, **asdict(reply)})


def _read(row: dict[str, Any]) -> tuple[str, Reply]:
    """A line of the file.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is none.
    """
    text, key = row["text"], row["key"]
    if not (isinstance(text, str) and isinstance(key, str)):
        raise ValueError("text and key must be texts")
    tokens = [{str(token): float(value) for token, value in top.items() if value is not None} for top in row["tokens"]]
    reply = Reply(text, tokens, int(row["prompt_tokens"]), int(row["completion_tokens"]), str(row.get("finish", "")))
    return key, reply
