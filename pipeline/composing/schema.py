"""The typed root of the configuration, and which classes the stages' sections are made of."""

import ast
import dataclasses
import functools
import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ppo_vs_dpo.artifacts.guards.fingerprints import point_text, source_of
from ppo_vs_dpo.artifacts.run import STAGES
from ppo_vs_dpo.artifacts.settings import field_names, nearest
from ppo_vs_dpo.artifacts.stage import parse_point
from ppo_vs_dpo.models.loading.config import ModelConfig

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclass
class LaunchConfig:
    """How stages are started; see configs/config.yaml for each key."""

    workers: int = 2
    processes: int | str = 1
    hostfile: str | None = None
    nodes: int = 1
    rendezvous: str | None = None
    threads: int = 1
    fork: bool = True
    stalled_after: float | None = None
    accept_version: bool = False
    profile: bool = False
    expected_seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Config:
    """The root. Sections of stages are open here: `compose.problems_in` holds them to their own classes."""

    name: str | None = None
    output_dir: str = "runs"
    seed: int = 1
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: dict[str, Any] = field(default_factory=dict)
    sft: dict[str, Any] = field(default_factory=dict)
    reward_model: dict[str, Any] = field(default_factory=dict)
    dpo: dict[str, Any] = field(default_factory=dict)
    ppo: dict[str, Any] = field(default_factory=dict)
    compare: dict[str, Any] = field(default_factory=dict)
    deepspeed: dict[str, Any] = field(default_factory=dict)


ConfigStore.instance().store(name="schema", node=Config)

# Section -> (the stage's own keys, the argument class that its other keys belong to).
SECTIONS: dict[str, tuple[str, str | None]] = {
    "data": ("ppo_vs_dpo.preferences.config:DataConfig", None),
    "sft": ("ppo_vs_dpo.sft.config:SFTStage", "trl.trainer.sft_config:SFTConfig"),
    "reward_model": ("ppo_vs_dpo.reward_model.config:RewardModelStage", "trl.trainer.reward_config:RewardConfig"),
    "dpo": ("ppo_vs_dpo.dpo.config:DPOStage", "trl.trainer.dpo_config:DPOConfig"),
    "ppo": ("ppo_vs_dpo.ppo.stage.config:PPOStage", "ppo_vs_dpo.ppo.config:PPOConfig"),
    "compare": ("ppo_vs_dpo.compare.config:CompareStage", None),
}
# Keys that the pipeline itself reads from a section.
PIPELINE_KEYS = ("sweep",)


def load_class(spec: str) -> type:
    """``"package.module:Class"`` -> the class."""
    module, name = spec.split(":")
    return getattr(importlib.import_module(module), name)


def fields_from_source(module: str, name: str) -> set[str]:
    """Field names of a dataclass, its bases included, read from its source.

    Importing TRL's argument classes takes seven seconds, more than everything else the command does before it starts
    the first stage; their source takes a few milliseconds.

    Raises:
        LookupError: the class or one of its bases was not found that way.
    """
    path = source_of(module)
    if path is None:
        raise LookupError(module)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = (module if path.name == "__init__.py" else module.rpartition(".")[0]).split(".")
    imported = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            base = ".".join(package[: len(package) - node.level + 1])
            source = f"{base}.{node.module}" if node.level else node.module
            imported.update({alias.asname or alias.name: (source, alias.name) for alias in node.names})
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            names = {
                item.target.id
                for item in node.body
                if isinstance(item, ast.AnnAssign)
                and isinstance(item.target, ast.Name)
                and not ast.unparse(item.annotation).startswith("ClassVar")
                and "init=False" not in ast.unparse(item)
            }
            for parent in node.bases:
                parent_name = ast.unparse(parent)
                if parent_name in ("object", "Generic"):
                    continue
                names |= fields_from_source(*_resolve(module, parent_name, imported))
            return names
    if name in imported:  # re-exported
        return fields_from_source(*imported[name])
    raise LookupError(f"{module}.{name}")


def _resolve(module: str, name: str, imported: dict[str, tuple[str, str]]) -> tuple[str, str]:
    source, original = imported.get(name, (module, name))
    if (source, original) == ("transformers", "TrainingArguments"):  # a lazy re-export
        return "transformers.training_args", "TrainingArguments"
    return source, original


@functools.cache
def section_keys(section: str) -> list[str]:
    """Every valid key of a section, sorted."""
    own, arguments = SECTIONS[section]
    keys = {*field_names(load_class(own)), *PIPELINE_KEYS}
    if arguments:
        module, name = arguments.split(":")
        try:
            keys |= fields_from_source(module, name)
        except (LookupError, SyntaxError, OSError):
            keys |= set(field_names(load_class(arguments)))
    return sorted(keys)


def root_keys() -> list[str]:
    """Keys of the root, and those of its typed sections with their dots."""
    keys = [item.name for item in dataclasses.fields(Config)]
    keys += [f"launch.{item.name}" for item in dataclasses.fields(LaunchConfig)]
    return keys + [f"model.{item.name}" for item in dataclasses.fields(ModelConfig)]


def sweep_problems(section: str, sweep: Any, valid: list[str]) -> Iterator[str]:
    """A sentence for each key of a sweep that there is not, and each that has no list of values."""
    several = OmegaConf.is_list(sweep) or isinstance(sweep, list)
    for number, grid in enumerate(sweep if several else [sweep or {}]):
        where = f"{section}.sweep[{number}]" if several else f"{section}.sweep"
        if not isinstance(grid, dict | DictConfig):
            yield f"{where} is {grid!r}; a grid is a mapping of keys to lists, {{kl_coef: [0.1, 0.3]}}."
            continue
        for key, points in grid.items():
            if key not in valid or key in PIPELINE_KEYS:
                yield f"{where}.{key}: no such key.{nearest(key, valid)}"
            elif not OmegaConf.is_list(points) and not isinstance(points, list):
                yield f"{where}.{key}: a list of values is needed."
            else:
                plain = OmegaConf.to_container(points, resolve=False) if OmegaConf.is_list(points) else points
                odd = [value for value in plain if not _reads_back(key, value)]
                if odd:
                    yield (
                        f"{where}.{key}: {odd[0]!r} cannot be part of a point's name, which reads as KEY=VALUE,...; "
                        f"give it to a run of its own (name=...)."
                    )


def _reads_back(key: str, value: Any) -> bool:
    """Whether the process of a sweep's point gets this value, which goes to it as text."""
    try:
        return (isinstance(value, str) and "${" in value) or parse_point(point_text({key: value})) == {key: value}
    except (YAMLError, OmegaConfBaseException):
        return False
