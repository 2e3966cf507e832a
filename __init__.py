"""PPO from human feedback that can be trusted, and the fair comparison with DPO.

Every name here is loaded when it is first used, so that ``import ppo_vs_dpo`` costs next to nothing::

    from ppo_vs_dpo import PPOConfig, PPOTrainer

The rooms are packages below this one (docs/architecture.md); ``ppo-vs-dpo --help`` is the same from a shell.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppo_vs_dpo.artifacts.errors import UserError
    from ppo_vs_dpo.artifacts.run import RunFolder
    from ppo_vs_dpo.compare.estimates.metrics import load_metric
    from ppo_vs_dpo.models.loading.pretrained import load_policy, load_tokenizer, load_value_or_reward
    from ppo_vs_dpo.models.passes.logprobs import response_logprobs
    from ppo_vs_dpo.models.sampling.generation import Generated, SamplingConfig, generate
    from ppo_vs_dpo.ppo.config import PPOConfig
    from ppo_vs_dpo.ppo.rollouts.rollout import Rollout
    from ppo_vs_dpo.ppo.trainer import PPOTrainer
    from ppo_vs_dpo.reward_model.scorer import RewardScorer

__all__ = [
    "Generated",
    "PPOConfig",
    "PPOTrainer",
    "RewardScorer",
    "Rollout",
    "RunFolder",
    "SamplingConfig",
    "UserError",
    "generate",
    "load_metric",
    "load_policy",
    "load_tokenizer",
    "load_value_or_reward",
    "response_logprobs",
]

_MODULES = {
    "Generated": "models.sampling.generation",
    "PPOConfig": "ppo.config",
    "PPOTrainer": "ppo.trainer",
    "RewardScorer": "reward_model.scorer",
    "Rollout": "ppo.rollouts.rollout",
    "RunFolder": "artifacts.run",
    "SamplingConfig": "models.sampling.generation",
    "UserError": "artifacts.errors",
    "generate": "models.sampling.generation",
    "load_metric": "compare.estimates.metrics",
    "load_policy": "models.loading.pretrained",
    "load_tokenizer": "models.loading.pretrained",
    "load_value_or_reward": "models.loading.pretrained",
    "response_logprobs": "models.passes.logprobs",
}


if not TYPE_CHECKING:  # an editor that sees this function takes every name for one that is there

    def __getattr__(name: str) -> Any:
        """A public name, from the room it lives in."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
