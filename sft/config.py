"""Settings of the SFT stage; every other key of its section is a field of ``trl.SFTConfig``."""

from dataclasses import dataclass

from ppo_vs_dpo.models.loading.config import LoraSettings


@dataclass
class SFTStage:
    """The stage's own keys.

    Attributes:
        skip_training: take the model of ``model.path`` as the SFT policy as it is.
        lora: train adapters instead of all weights.
        merge_lora: save the merged model (and the adapter beside it); else the adapter alone.
    """

    skip_training: bool = False
    lora: LoraSettings | None = None
    merge_lora: bool = True
