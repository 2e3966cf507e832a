"""What an update costs in floating-point operations, counted as the other stages are (`models.callbacks`).

A forward pass takes 2 N a token and a backward pass 4 N, N the parameters without embeddings (Kaplan et al. 2020,
section 2.1); only real tokens count. So PPO's figure and DPO's can be compared.
"""

from dataclasses import dataclass

from torch import nn
from transformers import TrainerState

from ppo_vs_dpo.artifacts.resources import parameters_without_embeddings
from ppo_vs_dpo.ppo.roles.roles import Roles
from ppo_vs_dpo.ppo.roles.shared import SharedRole
from ppo_vs_dpo.ppo.rollouts.rollout import Rollout

FORWARD, TRAINING = 2, 6


@dataclass(frozen=True)
class Sizes:
    """Parameters of the four roles, embeddings left out; 0 for a role that is no model."""

    policy: int
    value: int
    reference: int
    reward: int

    @classmethod
    def of(cls, roles: Roles) -> "Sizes":
        """Those of a run's roles."""
        return cls(
            policy=size_of(roles.policy),
            value=size_of(roles.value),
            reference=size_of(roles.reference.module),
            reward=sum(size_of(part.model) for part in roles.rewards.models()),
        )


def size_of(model: nn.Module | None) -> int:
    """Parameters without embeddings, 0 for no model; on a shared base those that the role's tokens go through."""
    if isinstance(model, SharedRole):
        model = model.shared.model
    return 0 if model is None else parameters_without_embeddings(model)


def update_flops(sizes: Sizes, tokens: int, passes: float, value_only: bool = False) -> float:
    """Floating-point operations of one update.

    ``tokens`` are the rollout's real ones, prompts and responses; ``passes`` those over it that trained (fewer
    than planned after an early stop).
    """
    rollout = sizes.policy + sizes.reward  # sampling (one forward pass, with a cache) and scoring
    forward = sizes.policy + sizes.value + sizes.reference  # log-probabilities and values
    trained = sizes.value + (0 if value_only else sizes.policy)
    return tokens * (FORWARD * (rollout + forward) + TRAINING * trained * passes)


def count_update(
    progress: TrainerState, sizes: Sizes, rollout: Rollout, passes: float, value_only: bool = False
) -> None:
    """Add an update to the cost so far, in fields of the progress that every checkpoint keeps."""
    tokens = int(rollout.mask.sum())
    progress.total_flos += update_flops(sizes, tokens + int(rollout.prompt_mask.sum()), passes, value_only)
    # Of PPO's own samples: it trains on what it generates.
    progress.num_input_tokens_seen += tokens
