"""What the device of this process can do, and the arithmetic that follows where the user says nothing."""

from typing import Any

import torch

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.config import ModelConfig


def has_bf16() -> bool:
    """Whether the accelerator computes in bfloat16 itself (NVIDIA: from Ampere on; a V100 only pretends to)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.accelerator.is_available()


def has_tf32() -> bool:
    """Whether fp32 products may run on tensor cores (NVIDIA, from Ampere on)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def has_flash(device: torch.device) -> bool:
    """Whether torch's flash attention runs on a device (NVIDIA, from Ampere on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def computes_in_tf32() -> bool:
    """Whether fp32 products run on tensor cores, with 11 bits.

    From torch 2.9 on transformers says so by a setting that forbids to read the old one (``allow_tf32`` raises then).
    """
    if not torch.cuda.is_available():
        return False
    if hasattr(torch.backends, "fp32_precision"):
        return torch.backends.cuda.matmul.fp32_precision == "tf32"
    return torch.backends.cuda.matmul.allow_tf32


def arithmetic(model: ModelConfig, passed: dict[str, Any], accelerator: bool) -> dict[str, bool]:
    """``bf16``, ``tf32`` and ``gradient_checkpointing`` of a stage: its own keys, else the model's, else the device's.

    On an accelerator half precision and checkpointing where nobody says otherwise; on a CPU neither, unless the model
    is loaded in bfloat16.

    Args:
        model: the run's ``model`` section.
        passed: the stage's keys; ``None`` leaves one open.
        accelerator: whether the stage runs on one.
    """

    def chosen(name: str, otherwise: bool) -> bool:
        said = [value for value in (passed.get(name), getattr(model, name, None)) if value is not None]
        return bool(said[0]) if said else otherwise

    half = has_bf16() if accelerator else model.dtype == "bfloat16"
    found = {
        "bf16": chosen("bf16", half and not passed.get("fp16")),
        "gradient_checkpointing": chosen("gradient_checkpointing", accelerator),
    }
    if passed.get("tf32") is not None or (accelerator and has_tf32()):
        found["tf32"] = chosen("tf32", True)
    return found


def not_finite(model: torch.nn.Module, does: str) -> UserError:
    """The error of a model that ``does`` something ("gives ordinary tokens scores") with NaN or infinity."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return UserError(
        f"{type(model).__name__} {does} that are not finite: its weights hold NaN or infinity, or its numbers "
        f"overflow in {dtype}. Get the weights again, or load them in another dtype (model.dtype)."
    )
