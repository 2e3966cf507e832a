"""The ``model`` section of the configuration."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModelConfig:
    """Which model the run starts from.

    Attributes:
        path: a Hub name or a local folder; ``None`` builds ``architecture`` from scratch.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run code that comes with the model (off: never unless asked).
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto`` (as saved), of frozen weights; what trains is in
            fp32 (or DeepSpeed keeps an fp32 copy).
        bf16: bfloat16 arithmetic in every stage; ``None`` leaves it to the device (`models.devices`).
        gradient_checkpointing: activations are computed again in the backward pass; ``None`` as above.
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``; ``None`` leaves the choice to transformers.
        chat_template: a Jinja template, or the path of a file with one, for a tokenizer that has none.
        architecture: keyword arguments of ``transformers.AutoConfig.for_model`` (``model_type`` among them).
    """

    path: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: str = "float32"
    bf16: bool | None = None
    gradient_checkpointing: bool | None = None
    attn_implementation: str | None = None
    chat_template: str | None = None
    architecture: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16", "float16", "auto"):
            from ppo_vs_dpo.artifacts.errors import UserError

            raise UserError(f"model.dtype is {self.dtype!r}; it must be float32, bfloat16, float16 or auto.")


@dataclass
class LoraSettings:
    """Low-rank adapters (Hu et al. 2021); passed to ``peft.LoraConfig``.

    Attributes:
        r: rank.
        alpha: scale; the update is ``alpha / r * B A``.
        dropout: on the adapter's input; PPO needs 0 (a ratio of 1 on the first pass).
        target_modules: names of the layers, e.g. ``[q_proj, v_proj]``; empty lets peft choose by architecture.
        load_in_4bit: hold the frozen base in 4 bits while training (QLoRA, Dettmers et al. 2023); needs bitsandbytes.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=list)
    load_in_4bit: bool = False

    def peft_config(self, task_type: str):
        """The ``peft.LoraConfig`` for ``task_type`` (``"CAUSAL_LM"`` or ``"SEQ_CLS"``)."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(self.target_modules) or None,
            task_type=task_type,
        )
