"""The value head on the scale of the scores that PPO uses.

A value model that starts as a copy of the reward model answers as the reward model does, before the score bias
(N+ detail 15), the weight of a mix and ``score_bias`` are applied. Its values would then be off by a constant from the
first update on, and GAE with ``lam`` < 1 turns a constant error of the values into advantages that depend on the
position (papers.md 3.6.6).
"""

import torch

from ppo_vs_dpo.models.loading.prepared import score_head
from ppo_vs_dpo.models.passes.logprobs import base, score_head_of
from ppo_vs_dpo.models.sharding.deepspeed import whole
from ppo_vs_dpo.models.sharding.state import keep_written


def rescale_values(value_model: torch.nn.Module, weight: float, bias: float) -> None:
    """Let a value model answer ``weight * V - bias`` from now on; its head gets a bias if it has none.

    Call it before the model is wrapped (adapters, DeepSpeed).

    Args:
        value_model: a sequence-classification model with one label.
        weight: of the reward model in a mix of rewards.
        bias: subtracted from its scores.
    """
    head = score_head(value_model)
    with torch.no_grad(), whole(head.parameters()):
        if head.bias is None:
            head.bias = torch.nn.Parameter(head.weight.new_zeros(1), requires_grad=head.weight.requires_grad)
        head.weight.mul_(weight)
        head.bias.mul_(weight).sub_(bias)
    value_model.starts_as_scores = True


def shift_values(value_model: torch.nn.Module, bias: float, sharded: bool = False) -> None:
    """Subtract a bias that is known only now from the values of a model that `rescale_values` has prepared.

    Other value models stay as they are: nobody said that they answer on the scale of the scores.

    Args:
        value_model: prepared.
        bias: subtracted.
        sharded: DeepSpeed keeps fp32 copies of what it trains.
    """
    model = base(value_model)
    if not getattr(model, "starts_as_scores", False):
        return
    head = score_head_of(model)
    if hasattr(head, "modules_to_save"):  # PEFT trains a copy of the head
        head = head.modules_to_save[head.active_adapters[0]]
    with torch.no_grad(), whole([head.bias]):
        head.bias.sub_(bias)
    if sharded:
        keep_written(head.parameters())
