"""Words as people type them: an experiment's bare name, one key for every stage, the nearest of a list."""

import importlib.util
from pathlib import Path
from typing import Any

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.run import TRAINED
from ppo_vs_dpo.artifacts.settings import nearest
from ppo_vs_dpo.pipeline.composing.schema import CONFIGS

# Keys without a section that mean the same key of every stage that trains.
EVERYWHERE = ("report_to",)
# Tracker -> the module transformers needs for it. The others transformers knows are looked at when they start.
TRACKERS = {
    "wandb": "wandb", "tensorboard": "tensorboard", "mlflow": "mlflow", "trackio": "trackio", "clearml": "clearml",
    "comet_ml": "comet_ml", "swanlab": "swanlab", "neptune": "neptune", "dvclive": "dvclive",
}  # fmt: skip


def experiments(*folders: str | Path) -> list[str]:
    """Names of the experiments in configs/experiment, and in ``experiment/`` of further folders, sorted."""
    roots = [Path(folder) / "experiment" for folder in (CONFIGS, *folders)]
    return sorted(
        {path.relative_to(root).with_suffix("").as_posix() for root in roots for path in root.rglob("*.yaml")}
    )


def folders_of(overrides: list[str]) -> list[str]:
    """The folders that a command line adds to Hydra's search path."""
    places = [one for one in overrides if one.startswith("hydra.searchpath=[")]
    return [
        place.strip().removeprefix("file://")
        for one in places
        for place in one.partition("[")[2].rstrip("]").split(",")
        if place.strip().startswith("file://")
    ]


def with_experiment(arguments: list[str], commands: tuple[str, ...] = ()) -> list[str]:
    """``quickstart seed=2`` -> ``experiment=quickstart seed=2``: a bare first word is an experiment's name.

    Args:
        commands: words that would also have been understood, for the message.

    Raises:
        UserError: it is no experiment's; lists them and the nearest word.
    """
    if not arguments or "=" in arguments[0] or arguments[0].startswith(("-", "~", "+")):
        return arguments
    word, rest = arguments[0], arguments[1:]
    known = experiments(*folders_of(rest))
    if word in known:
        return [f"experiment={word}", *rest]
    what = "command or experiment" if commands else "experiment"
    lists = f"\n  experiments: {', '.join(known)}" + (f"\n  commands: {', '.join(commands)}" if commands else "")
    raise UserError(f"{word}: there is no such {what}.{nearest(word, [*known, *commands])}{lists}")


def everywhere(overrides: list[str]) -> list[str]:
    """``report_to=wandb`` -> ``sft.report_to=wandb reward_model.report_to=wandb ...``."""
    found = []
    for one in overrides:
        key, sign, value = one.partition("=")
        name = key.lstrip("+")
        found += [f"{stage}.{name}={value}" for stage in TRAINED] if sign and name in EVERYWHERE else [one]
    return found


def no_such_choice(wanted: str, options: list[str]) -> str:
    """One line for a file that a group does not have: ``("experiment/quickstrat", [...])``, ``"paper:a/b"``."""
    group, _, name = wanted.partition(":") if ":" in wanted else wanted.rpartition("/")
    return (
        f"{group}={name}: there is no such {group or 'file'}.{nearest(name, options)} There are: {', '.join(options)}."
    )


def tracker_problems(section: str, values: Any) -> list[str]:
    """Trackers that are asked for and not installed, a sentence each."""
    asked = values.get("report_to") if hasattr(values, "get") else None
    names = [asked] if isinstance(asked, str) else list(asked or [])
    return [
        f"{section}.report_to={name}: {TRACKERS[name]} is not installed. pip install {TRACKERS[name]}, or "
        f"report_to=tensorboard."
        for name in names
        if name in TRACKERS and importlib.util.find_spec(TRACKERS[name]) is None
    ]
