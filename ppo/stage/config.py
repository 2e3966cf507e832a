"""The stage's own keys. Apart from `ppo.config`, so that the pipeline can read them without importing transformers."""

from dataclasses import dataclass

from ppo_vs_dpo.models.loading.config import LoraSettings


@dataclass
class PPOStage:
    """Keys of the ``ppo`` section that belong to the stage, not to `ppo.config.PPOConfig`.

    Attributes:
        lora: train adapters instead of all weights (policy and value model); null trains everything.
        shared_base: with ``lora``: policy, value and reward model are adapters on one frozen base, the reference is
            that base; the reward model must have been trained as an adapter. One copy of the weights instead of four.
        validation_prompts: training prompts set aside for the evaluation during training; the held-out prompts of the
            verdict are never seen here.
        value_from: ``reward_model`` (N+ detail 22) or ``policy``: what the value model starts from.
        gold_reward: optimise the run's known gold reward (``data.gold``) instead of the reward model (DPO paper's
            PPO-GT).
    """

    lora: LoraSettings | None = None
    shared_base: bool = False
    validation_prompts: int = 128
    value_from: str = "reward_model"
    gold_reward: bool = False
