"""``list`` and ``show``: the experiments, and a resolved configuration with every key's comment."""

import re
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ppo_vs_dpo.pipeline.composing.compose import GROUPS, hydra_configs, load, prepare_overrides
from ppo_vs_dpo.pipeline.composing.schema import CONFIGS

KEY = re.compile(r"^(\s*)([A-Za-z_][\w.]*):")


def first_comment(path: Path) -> str:
    """The first comment line of a YAML file that is not a directive."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ").strip()
    return ""


def list_experiments() -> str:
    """A line for each experiment."""
    root = CONFIGS / "experiment"
    paths = sorted(root.rglob("*.yaml"))
    names = [path.relative_to(root).with_suffix("").as_posix() for path in paths]
    width = max(map(len, names))
    return "".join(f"{name:<{width}}  {first_comment(path)}\n" for name, path in zip(names, paths, strict=True))


def comments_of(path: Path) -> dict[str, str]:
    """Dotted key -> the comment above it, for every key of a YAML file."""
    found: dict[str, str] = {}
    stack: list[tuple[int, str]] = []
    pending: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        stripped = line.strip()
        match = KEY.match(line)
        if stripped.startswith("#"):
            pending.append(stripped.lstrip("# "))
        elif match:
            indent = len(match.group(1))
            while stack and stack[-1][0] >= indent:
                stack.pop()
            stack.append((indent, match.group(2)))
            if pending:
                found[".".join(name for _, name in stack)] = " ".join(pending)
            pending = []
        else:
            pending = []
    return found


def comments(choices: dict[str, str | None]) -> dict[str, str]:
    """Comments of the files a configuration is composed of; the experiment's word on a key counts last."""
    found = comments_of(CONFIGS / "config.yaml")
    for group, choice in choices.items():
        if choice in (None, "null") or group not in GROUPS:
            continue
        path = CONFIGS / group / f"{choice}.yaml"
        if path.is_file():
            prefix = "" if group in ("experiment", "paper") else f"{group}."
            found.update({f"{prefix}{key}": text for key, text in comments_of(path).items()})
    return found


def show(overrides: list[str]) -> str:
    """The resolved configuration as YAML, a comment above every key that has one."""
    config = load(overrides, check_missing=False)
    with hydra_configs():
        from hydra import compose

        composed = compose(config_name="config", overrides=prepare_overrides(overrides), return_hydra_config=True)
        known = comments(dict(composed.hydra.runtime.choices))
    return "\n".join(_lines(config, known, "", 0)) + "\n"


def _lines(node: DictConfig, known: dict[str, str], prefix: str, depth: int) -> list[str]:
    lines = []
    pad = "  " * depth
    for key in node:
        path = f"{prefix}{key}"
        if path in known:
            lines += [f"{pad}# {known[path]}"]
        value = node._get_node(key)
        if isinstance(value, DictConfig) and not value._is_none() and not value._is_missing() and len(value):
            lines += [f"{pad}{key}:", *_lines(value, known, f"{path}.", depth + 1)]
        else:
            text = OmegaConf.to_yaml(OmegaConf.create({key: value})).rstrip("\n")
            lines += [pad + line for line in text.splitlines()]
    return lines
