"""The data room's two steps: ``python -m ppo_vs_dpo.preferences RUN --step data`` and ``--step pairs``.

``data`` writes prompts (and SFT examples, and the testbed's tokenizer); ``pairs`` writes the pair set that the reward
model and DPO both train on.
"""

import importlib

from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.resources import libraries
from ppo_vs_dpo.artifacts.stage import StageContext, stage_main
from ppo_vs_dpo.preferences.config import data_settings, step_module


def _run(context: StageContext, step: str) -> None:
    section = context.run.config.get("data")
    settings = data_settings({} if section is None else OmegaConf.to_container(section, resolve=True))
    # Imported late: the step loads what its source needs and no more.
    with libraries():
        module = importlib.import_module(step_module(settings.source, step))
    getattr(module, f"{step}_step")(context, settings)


def run_data(context: StageContext) -> None:
    """Step ``data``."""
    _run(context, "data")


def run_pairs(context: StageContext) -> None:
    """Step ``pairs``."""
    _run(context, "pairs")


if __name__ == "__main__":
    stage_main("preferences", run_data, choices={"data": run_data, "pairs": run_pairs})
