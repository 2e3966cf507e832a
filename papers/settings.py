"""A paper's configuration files: where each number comes from, and which numbers nobody published.

Every key of ``configs/paper/NAME/SETTING.yaml`` has a comment above it that ends with its source in brackets:

    [P: place]      read in the paper
    [C: place]      read in released code or its documentation
    [S: place]      read in somebody else's note about the paper; re-check before you quote it
    [ours: why]     the paper says nothing, or the setting does not change the result
    [unknown]       nobody published it; the value is ???, and the command asks for it
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs" / "paper"
MINIATURE = "mini"
KINDS = {"P": "the paper", "C": "released code", "S": "a note about the paper", "ours": "ours", "unknown": "unknown"}
_KEY = re.compile(r"^(\s*)([A-Za-z_][\w.]*):(.*)$")
_SOURCE = re.compile(r"\[(P|C|S|ours|unknown)(?::\s*([^\]]*))?\]\s*$")


@dataclass(frozen=True)
class Setting:
    """One key of a full configuration.

    Attributes:
        key: dotted.
        value: as the file has it.
        comment: what stands above it, without the source.
        kind: one of `KINDS`; empty where the comment names no source.
        place: where in that source.
    """

    key: str
    value: str
    comment: str
    kind: str
    place: str


def full_settings(name: str) -> list[str]:
    """Names of a paper's full configurations, sorted."""
    return sorted(path.stem for path in (CONFIGS / name).glob("*.yaml") if path.stem != MINIATURE)


def all_settings() -> list[str]:
    """``NAME/SETTING`` of every full configuration, sorted."""
    return sorted(f"{path.parent.name}/{path.stem}" for path in CONFIGS.glob("*/*.yaml") if path.stem != MINIATURE)


def file_of(name: str, setting: str) -> Path:
    """A configuration file of a paper.

    Raises:
        UserError: there is none of that name.
    """
    path = CONFIGS / name / f"{setting}.yaml"
    if not path.is_file():
        known = ", ".join(full_settings(name)) or "none"
        raise UserError(f"{name} has no full configuration {setting!r}; it has {known}.")
    return path


def settings_of(path: Path) -> list[Setting]:
    """Every key with a value of its own in a configuration file, with its source; Hydra's ``defaults`` left out."""
    found: list[Setting] = []
    for key, value, comment in commented(path):
        if value and not key.startswith("defaults"):
            source = _SOURCE.search(comment)
            kind, place = (source.group(1), source.group(2) or "") if source else ("", "")
            found.append(Setting(key, value, _SOURCE.sub("", comment).strip(), kind, place))
    return found


def unknown(path: Path) -> dict[str, str]:
    """Key -> what the comment says, for every key that the file leaves open with ``???``."""
    notes = {one.key: one.comment for one in settings_of(path)}
    missing = OmegaConf.missing_keys(OmegaConf.load(path))
    return {key: notes.get(key, "") for key in sorted(missing)}


def commented(path: Path) -> Iterator[tuple[str, str, str]]:
    """(dotted key, value as the file has it, comment above it) of every key of a YAML file."""
    stack: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        stripped, match = line.strip(), _KEY.match(line)
        if stripped.startswith("#"):
            comment.append(stripped.lstrip("# "))
            continue
        if match:
            indent = len(match.group(1))
            while stack and stack[-1][0] >= indent:
                stack.pop()
            stack.append((indent, match.group(2)))
            yield ".".join(name for _, name in stack), match.group(3).strip(), " ".join(comment)
        comment = []


def heading(path: Path) -> list[str]:
    """The comment at the head of a file, Hydra's directive left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line.lstrip("# ").strip())
    return lines
