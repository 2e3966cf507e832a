"""``list`` and ``show``: the experiments, and a resolved configuration with every key's comment."""

from omegaconf import DictConfig, OmegaConf

from ppo_vs_dpo.papers.settings import commented, heading
from ppo_vs_dpo.pipeline.composing.compose import GROUPS, hydra_configs, load, prepare_overrides
from ppo_vs_dpo.pipeline.composing.schema import CONFIGS


def list_experiments() -> str:
    """A line for each experiment."""
    root = CONFIGS / "experiment"
    said = {path.relative_to(root).with_suffix("").as_posix(): heading(path) for path in sorted(root.rglob("*.yaml"))}
    width = max(map(len, said))
    return "".join(f"{name:<{width}}  {lines[0] if lines else ''}\n" for name, lines in said.items())


def comments(choices: dict[str, str | None]) -> dict[str, str]:
    """Comments of the files a configuration is composed of; the experiment's word on a key counts last."""
    found = {key: text for key, _, text in commented(CONFIGS / "config.yaml") if text}
    for group, choice in choices.items():
        if choice in (None, "null") or group not in GROUPS:
            continue
        path = CONFIGS / group / f"{choice}.yaml"
        if path.is_file():
            prefix = "" if group in ("experiment", "paper") else f"{group}."
            found |= {f"{prefix}{key}": text for key, _, text in commented(path) if text}
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
