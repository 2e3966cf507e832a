"""Settings of the reward-model stage; every other key of its section is a field of ``trl.RewardConfig``."""

from dataclasses import dataclass

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.config import LoraSettings


@dataclass
class RewardModelStage:
    """The stage's own keys.

    Attributes:
        head_init: ``zero``, or ``normal`` for N(0, 1/sqrt(d+1)) (Huang et al. 2024, detail 11).
        use_margin: train with the pairs' ``margin`` in the loss, -log sigma(delta - margin) (Llama 2, eq. 2).
        use_soft_labels: where the pairs have ``soft_label``, the probability that chosen is better, train with the
            cross-entropy to it (Bai et al. 2022b); else every pair counts as certain.
        ensemble: so many reward models, of other seeds (data order, and the head where it is drawn); PPO's reward is
            what ``ppo.reward_ensemble`` makes of their scores.
        average_weights: the ensemble's weights are averaged into one model instead (WARM); all start from one head.
        path: a reward model that is trained already, a folder or a name on the Hub: it takes the place of training one
            (its scores are centred and judged on the run's held-out pairs like any other's).
        head: the name of that model's head, where another project made it (`models.loading.heads`).
        lora: train adapters (and the head) instead of all weights.
        merge_lora: save the merged model (and the adapter beside it); else the adapter alone.
        samples: SFT samples that the scores are centred on.
        sample_max_new_tokens: their budget, EOS included.
        scoring_batch_size: sequences scored at once.
        test_pairs: at most so many test pairs in the report, and as many training pairs; ``None`` takes all.
        label_noise: share of labels believed wrong, where no gold reward tells the ceiling (0.3 for HH).
    """

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
