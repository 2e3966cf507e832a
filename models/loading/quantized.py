"""QLoRA (Dettmers et al. 2023): adapters on a frozen base whose linear layers are held in 4 bits."""

import importlib.util

import torch
from transformers import BitsAndBytesConfig

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.stage import StageContext
from ppo_vs_dpo.models.loading.config import LoraSettings, ModelConfig

# Layers that stay as they are: the output layer, and the scalar head of reward and value models.
WHOLE = ["lm_head", "embed_out", "score", "classifier"]


def quantization(lora: LoraSettings | None, config: ModelConfig, context: StageContext) -> BitsAndBytesConfig | None:
    """How a stage's base is loaded: ``None``, or in 4 bits where ``lora.load_in_4bit`` asks for it.

    NF4 with double quantisation (sections 3.1 and 3.2 of the paper); products are computed in ``model.dtype``, in
    bfloat16 where that is auto.

    Raises:
        UserError: bitsandbytes is not installed, or the run shards its models.
    """
    if lora is None or not lora.load_in_4bit:
        return None
    key = f"{context.stage}.lora.load_in_4bit"
    if context.run.config.get("deepspeed"):
        raise UserError(
            f"{key}: DeepSpeed cannot split a 4-bit base, and beside it there is little to split. Leave out deepspeed "
            f"(on several GPUs each then holds the 4-bit base), or set {key}=false."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"{key} needs bitsandbytes, which is not installed: pip install 'ppo-vs-dpo[qlora]', or set {key}=false."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype),
        llm_int8_skip_modules=WHOLE,
    )


def keep_differentiable(model: torch.nn.Module) -> None:
    """Keep 4-bit layers on a CPU in the layout that gradients pass through.

    Where the CPU knows bfloat16, bitsandbytes repacks a layer at its first call in evaluation mode, for good, and the
    repacked product has no gradient: after one generation everything below would train on the rest of the gradient,
    without a word. Its own switch keeps it from that.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def in_4bit(model: torch.nn.Module) -> bool:
    """Whether a model's base is held in 4 bits (through a PEFT wrapper, too)."""
    return bool(getattr(model, "is_loaded_in_4bit", False))
