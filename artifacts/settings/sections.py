"""A stage's section of the configuration: its own keys, and the fields of the argument class it passes through to."""

import dataclasses
import difflib
import re
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ppo_vs_dpo.artifacts.errors import Complaint
from ppo_vs_dpo.artifacts.settings.rules import refused_keys
from ppo_vs_dpo.artifacts.settings.values import out_of_range

Own = TypeVar("Own")


def field_names(cls: type) -> list[str]:
    """Names of a dataclass's fields that its constructor takes."""
    return [field.name for field in dataclasses.fields(cls) if field.init]


# Keys of a section that are listed where none of them is near the one that was given.
LISTED = 30


def nearest(name: str, valid: list[str]) -> str:
    """``" Did you mean x?"``, or nothing where no valid name is near."""
    matches = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    return f" Did you mean {matches[0]}?" if matches else ""


def unknown_keys(section: dict[str, Any], own: type, args: type | None, where: str) -> list[str]:
    """One sentence for each key of ``section`` that neither class has; the keys of a small section are listed."""
    valid = [*field_names(own), *(field_names(args) if args else [])]
    all_of_them = f" There are: {', '.join(valid)}." if len(valid) <= LISTED else ""
    return [f"{where}.{key}: no such key.{nearest(key, valid) or all_of_them}" for key in section if key not in valid]


def key_of(line: str, section: str) -> str:
    """The key of a section that a sentence begins with: ``"sft.lora.r is 0; ..."`` -> ``"lora"``."""
    return re.split(r"[ .:=\[]", line.removeprefix(f"{section}."), maxsplit=1)[0] if line.startswith(section) else ""


def split(
    section: dict[str, Any], own: type[Own], args: type | None = None, where: str = "", kind: str = ""
) -> tuple[Own, dict]:
    """Split a stage's section into its own settings and keyword arguments for the argument class.

    Args:
        own: a dataclass with the stage's own keys; values are checked against its types.
        args: the argument class the other keys belong to (``trl.SFTConfig`` and the like).
        kind: see `out_of_range`.

    Returns:
        An instance of ``own``, and the remaining keys as a dict.

    Raises:
        UserError: unknown keys (all of them, each with the nearest valid name), missing values, wrong types, numbers
            that cannot be meant.
    """
    where = where or own.__name__
    problems = unknown_keys(section, own, args, where)
    mine = {key: value for key, value in section.items() if key in field_names(own)}
    passed = {key: value for key, value in section.items() if key not in mine}
    problems += [*refused_keys(passed, where), *out_of_range(mine, where, kind)]
    try:
        settings = OmegaConf.merge(OmegaConf.structured(own), mine)
        missing = sorted(OmegaConf.missing_keys(settings))
        problems += [f"{where}.{key}: required, and not set." for key in missing]
        if not problems:
            return OmegaConf.to_object(settings), passed
    except OmegaConfBaseException as error:
        problems.append(f"{where}.{error.full_key or ''}: {error.msg or error}".splitlines()[0])
    raise Complaint(problems)
