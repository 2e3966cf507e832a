"""Settings of the reward-model stage; every other key of its section is a field of ``trl.RewardConfig``."""

from dataclasses import dataclass

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.config import LoraSettings


@dataclass
class RewardModelStage:
    """The stage's own keys; each has its comment in ``configs/reward_model/default.yaml``."""

    path: str | None = None
    head: str | None = None
    head_init: str = "zero"
    use_margin: bool = False
    use_soft_labels: bool = True
    lora: LoraSettings | None = None
    merge_lora: bool = True
    samples: int = 512
    sample_max_new_tokens: int = 64
    scoring_batch_size: int = 128
    test_pairs: int | None = None
    label_noise: float | None = None
    ensemble: int = 1
    average_weights: bool = False

    def __post_init__(self):
        if self.head_init not in ("zero", "normal"):
            raise UserError(f"reward_model.head_init is {self.head_init!r}; it must be zero or normal.")
        if self.average_weights and self.ensemble < 2:
            raise UserError(
                "reward_model.average_weights averages an ensemble: set reward_model.ensemble to 2 or more."
            )
        if self.ensemble > 1 and self.path is not None:
            raise UserError("reward_model.ensemble trains several, and reward_model.path takes one that is trained.")
        if self.ensemble > 1 and self.lora and not self.merge_lora:
            raise UserError("reward_model.ensemble with adapters needs them merged: set reward_model.merge_lora=true.")
        if self.head and not self.path:
            raise UserError("reward_model.head names the head of reward_model.path, and that is not set. Remove it.")
