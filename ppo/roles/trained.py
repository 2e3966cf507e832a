"""What is trained: policy and value model in one module, and how an optimizer sees them."""

import dataclasses

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.passes.logprobs import Batch, response_logprobs, response_values
from ppo_vs_dpo.models.sharding.deepspeed import check_settings
from ppo_vs_dpo.ppo.config import PPOConfig
from ppo_vs_dpo.ppo.roles.shared import VALUE


class PolicyAndValue(nn.Module):
    """Policy and value model in one module: one optimizer with two groups, one DDP wrapper or DeepSpeed engine.

    Everything that needs gradients goes through one `forward` a backward pass, as data-parallel wrappers require.
    """

    def __init__(self, policy: PreTrainedModel, value_model: PreTrainedModel | None):
        super().__init__()
        self.policy = policy
        self.value_model = value_model
        # What integrations (DeepSpeed's auto values, trackers, the Hub) read.
        self.config = policy.config

    def forward(
        self,
        batch: Batch,
        temperature: float,
        value_mask: torch.Tensor | None = None,
        with_policy: bool = True,
        with_entropy: bool = False,
        ptx: Batch | None = None,
    ) -> dict[str, torch.Tensor]:
        """Log-probabilities, entropies and values of the response tokens.

        Args:
            value_mask: ``(B, R)``, where values count; the response mask by default.
            with_policy: False computes values only (warm-up of the value model).
            with_entropy: also the entropies, with gradients.
            ptx: pretraining texts, as a batch whose "response" is the text after its first token.

        Returns:
            ``values`` ``(B, R)`` where there is a value model; as asked for, ``logprobs`` and ``entropy`` ``(B, R)``,
            ``ptx_logprobs``.
        """
        value_batch = batch
        if value_mask is not None:
            # A parity convention: one value more, of the state after the last token. It attends to what is before it.
            prompt_mask = batch.attention_mask[:, : batch.prompt_length]
            attention_mask = torch.cat([prompt_mask, value_mask.to(prompt_mask.dtype)], dim=1)
            value_batch = dataclasses.replace(
                batch, response_mask=value_mask, attention_mask=attention_mask, on_host=None
            )
        out = {} if self.value_model is None else {"values": response_values(self.value_model, value_batch)}
        if with_policy:
            out["logprobs"], entropy = response_logprobs(self.policy, batch, temperature, with_entropy)
            if entropy is not None:
                out["entropy"] = entropy
        if ptx is not None:
            out["ptx_logprobs"] = response_logprobs(self.policy, ptx)[0]
        return out

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed; generation switches that off for its time."""
        name = "activation" if hasattr(type(self.policy), "is_activation_checkpointing") else "gradient"
        return bool(getattr(self.policy, f"is_{name}_checkpointing", False))

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """Trade compute for memory in both models."""
        shared = getattr(self.policy, "shared", None)
        if shared is not None:
            gradient_checkpointing_kwargs = {
                **(gradient_checkpointing_kwargs or {}),
                "use_reentrant": False,
                "context_fn": shared.checkpoint_contexts,
            }
        for model in filter(None, (self.policy, self.value_model)):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations."""
        for model in filter(None, (self.policy, self.value_model)):
            model.gradient_checkpointing_disable()


def optimizer_groups(model: PolicyAndValue, decay: set[str], args: PPOConfig) -> list[dict]:
    """Parameter groups: policy and value, each with and without weight decay, each role with its learning rate.

    ``decay``: names of parameters that decay (the Trainer's own rule: no biases, no norms).
    """
    value_lr = args.learning_rate if args.value_learning_rate is None else args.value_learning_rate
    groups = []
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]

    def role_of(name: str) -> str:
        # On a shared base the value model's adapter is among the policy's modules.
        return "value_model" if name.startswith("value_model.") or f".{VALUE}." in name else "policy"

    for role, lr in (("policy", args.learning_rate), ("value_model", value_lr)):
        named = [(n, p) for n, p in trained if role_of(n) == role]
        for decays in (True, False):
            params = [p for n, p in named if (n in decay) == decays]
            if params:
                groups.append(
                    {"params": params, "lr": lr, "weight_decay": args.weight_decay if decays else 0.0, "role": role}
                )
    return groups


def settle_deepspeed(args: PPOConfig, accelerator: Accelerator, model: PolicyAndValue, updates: int) -> None:
    """Fill in what the DeepSpeed configuration leaves to the Trainer (``auto``), before any engine is made.

    Raises:
        UserError: it contradicts the settings, or asks for what cannot work.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin.zero_stage < 1:
        raise UserError("deepspeed.zero_optimization.stage=0 shards nothing: leave out deepspeed for plain DDP.")
    if plugin.zero_stage == 3 and not args.ds3_gather_for_generation:
        raise UserError(
            "ppo.ds3_gather_for_generation=false cannot work under ZeRO-3: ranks whose responses end early would "
            "leave the others waiting for their part of the weights. Set it to true."
        )
    check_settings(args, "ppo")
    plugin.hf_ds_config.trainer_config_finalize(args, model, updates)
