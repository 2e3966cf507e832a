"""Settings of the SFT stage; every other key of its section is a field of ``trl.SFTConfig``."""

from dataclasses import dataclass

from ppo_vs_dpo.models.loading.config import LoraSettings


@dataclass
class SFTStage:
    """The stage's own keys; each has its comment in ``configs/sft/default.yaml``."""

    skip_training: bool = False
    lora: LoraSettings | None = None
    merge_lora: bool = True
