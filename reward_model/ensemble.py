"""Several reward models of one pair set: seeds beside each other (Coste et al. 2023), or their average (WARM).

Member 0 is trained as a single reward model is, and stands where one stands, in ``reward_model/model``; the others in
``reward_model/members/1/model`` and so on. With averaged weights ``model`` is the average, and member 0 is in
``members/0``.
"""

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from ppo_vs_dpo.artifacts.files import atomic_folder
from ppo_vs_dpo.artifacts.stage import StageContext
from ppo_vs_dpo.models.loading.config import ModelConfig
from ppo_vs_dpo.models.loading.heads import load_reward

MEMBERS = "members"


def member_context(context: StageContext, number: int) -> StageContext:
    """The stage as member ``number`` sees it: a folder and a seed of its own; what it counts is the stage's."""
    member = copy.copy(context)
    member.dir = context.dir / MEMBERS / str(number)
    member.dir.mkdir(parents=True, exist_ok=True)
    member.seed = context.seed + 1000 * number
    return member


def members_of(stage: str | Path) -> list[Path]:
    """The folders whose models score together: one, unless the stage trained an ensemble that is not averaged."""
    others = sorted((Path(stage) / MEMBERS).glob("*/model"), key=lambda folder: int(folder.parent.name))
    averaged = any(folder.parent.name == "0" for folder in others)
    return [Path(stage) / "model", *([] if averaged else others)]


def average(folders: Sequence[Path], target: Path, config: ModelConfig | None = None) -> None:
    """Write the mean of several models' weights (WARM: Ramé et al. 2024, 2401.12187) as one model.

    They must come from one start (an SFT policy and one head), or their mean means nothing.

    Configuration and tokenizer are the first one's; ``target`` is replaced.
    """
    model = load_reward(folders[0], config)
    total = {name: tensor.double() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for folder in folders[1:]:
        state = load_reward(folder, config).state_dict()
        for name in total:
            total[name] += state[name].double()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in total:
                tensor.copy_(total[name] / len(folders))
    with atomic_folder(target) as folder:
        for file in folders[0].iterdir():
            if file.is_file() and file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
                shutil.copy2(file, folder / file.name)
        model.save_pretrained(folder)
