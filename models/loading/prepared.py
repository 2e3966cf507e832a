"""What is done to a loaded model: no dropout, what trains in fp32, what is frozen in half, a scalar head in fp32."""

from typing import Any

import torch
from transformers import PreTrainedModel

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.quantized import keep_differentiable


class ScalarHead(torch.nn.Linear):
    """A linear layer whose product is in fp32, whatever the rest of the model computes in.

    A score in bfloat16 has 8 bits: between 2 and 4 its steps are of 1/64, wider than many a preference.
    """

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Scores ``(..., 1)`` in fp32."""
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(states.device.type, enabled=False):
            return torch.nn.functional.linear(states.float(), self.weight.float(), bias)


def score_head(model: torch.nn.Module) -> torch.nn.Linear:
    """The scalar head of a sequence-classification model, whatever its architecture calls it."""
    for name in ("score", "classifier"):
        head = getattr(model, name, None)
        if isinstance(head, torch.nn.Linear):
            return head
    raise UserError(f"{type(model).__name__} has no scalar head named score or classifier; it cannot score or value.")


def prepare(model: PreTrainedModel, trainable: bool, quantization: Any = None) -> PreTrainedModel:
    """A loaded model, ready for a stage: dropout off, parameters that require gradients where it is ``trainable``."""
    model.requires_grad_(trainable and quantization is None)
    keep_differentiable(model)
    disable_dropout(model)
    return model.train(trainable)


def train_in_full(model: torch.nn.Module, sharded: bool) -> None:
    """Weights that train in fp32, whatever they were loaded in: in bfloat16 a step of 1e-6 is lost nearly always.

    Frozen weights stay as they are, 4-bit ones too (TRL casts adapters on these to bfloat16).

    Args:
        model: before its optimizer is made.
        sharded: DeepSpeed keeps an fp32 copy by itself, and wants the weights in the dtype that it computes in.
    """
    for parameter in model.parameters():
        if not sharded and parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def halve_frozen(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Hold the weights of frozen linear layers in the dtype that autocast would cast them to at every call.

    Bit for bit the same results under autocast, at half the memory and without the casts. Embeddings, norms and tied
    heads stay: autocast leaves them in fp32, and so does this.
    """
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for module in model.modules():
        # A scalar head is a class of its own, and stays.
        if type(module) is torch.nn.Linear and id(module.weight) not in embedded:
            for parameter in module.parameters(recurse=False):
                if parameter.dtype == torch.float32 and not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)


def is_halved(model: torch.nn.Module) -> bool:
    """Whether `halve_frozen` has been here: embeddings are in fp32, and frozen linear layers are not."""
    embedded = {m.weight.dtype for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    frozen = {m.weight.dtype for m in model.modules() if type(m) is torch.nn.Linear and not m.weight.requires_grad}
    return embedded == {torch.float32} and bool(frozen & {torch.bfloat16, torch.float16})


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout to 0: else PPO's ratio is not 1 on the first pass (Huang et al. 2024, detail 7).

    Modules (adapters' too), rates that a module keeps as a number and hands to a function (OPT's ``dropout`` and
    ``layerdrop``, attention's), and those in the configuration that a forward pass reads.
    """
    for module in model.modules():
        rates = vars(module)
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in rates.items():
            if _is_dropout(name, value):
                rates[name] = 0.0
    config = getattr(model, "config", None)
    for part in {id(one): one for one in (config, getattr(config, "get_text_config", lambda: None)()) if one}.values():
        for name, value in vars(part).items():
            if _is_dropout(name, value):
                setattr(part, name, 0.0)


def _is_dropout(name: str, value: Any) -> bool:
    # "jitter": the noise that some mixtures of experts train their routers with.
    return isinstance(value, float) and value > 0 and ("drop" in name or "jitter" in name)
