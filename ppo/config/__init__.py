"""Settings of PPO: the fields, what they choose from, and what is refused."""

from ppo_vs_dpo.ppo.config.config import PPOConfig
from ppo_vs_dpo.ppo.config.tables import CONVENTIONS, ESTIMATORS, UNUSED

__all__ = ["CONVENTIONS", "ESTIMATORS", "UNUSED", "PPOConfig"]
