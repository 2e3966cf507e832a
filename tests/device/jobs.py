"""The trainers that are run on a device, pretended or real: small, with everything a run does."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)

from ppo_vs_dpo.models.loading.config import LoraSettings
from ppo_vs_dpo.models.sampling.engine import TransformersEngine
from ppo_vs_dpo.ppo.config import PPOConfig
from ppo_vs_dpo.ppo.trainer import PPOTrainer
from tests.conftest import build_word_tokenizer

TOKENIZER = build_word_tokenizer()
PROMPTS = ["the film", "a story was", "very", "the plot was", "the cast", "a bad film", "not", "a bright plot and"]
LORA = LoraSettings(r=2, alpha=4, target_modules=["q_proj", "v_proj"])
MICRO = 4
COMMON = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}


def llama(scalar: bool = False, layers: int = 4, vocabulary: int | None = None, seed: int = 0, **more: Any):
    """A Llama with grouped queries, of a few thousand weights."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": vocabulary or len(TOKENIZER), "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0, "num_labels": 1,
    }  # fmt: skip
    config = LlamaConfig(**{**sizes, **more})
    return (LlamaForSequenceClassification if scalar else LlamaForCausalLM)(config).eval()


class Copied(TransformersEngine):
    """An engine with weights of its own (vLLM's place): a copy, and the log-probabilities it sampled with."""

    keeps_weights = True

    def update_weights(self, model, version=None):
        super().update_weights(model)
        self.with_logprobs = True


def ppo(folder: Path, **settings: Any) -> PPOTrainer:
    """A PPO trainer: a reward model, 16 responses, two minibatches of two micro-batches."""
    kind, data = settings.pop("kind", "full"), Dataset.from_dict({"prompt": PROMPTS * 4})
    policy = llama()
    with torch.no_grad():  # likelier to end: responses of different lengths
        policy.lm_head.weight[2] += 2 * policy.lm_head.weight[10]
    parts: dict[str, Any] = {"model": policy, "reward_model": llama(True, seed=1)}
    if kind == "lora":
        parts["peft_config"] = LORA.peft_config("CAUSAL_LM")
    elif kind == "one base":
        parts = on_one_base(folder, policy)
    fixed = {"output_dir": str(folder / "out"), "per_device_train_batch_size": MICRO, "rollout_batch_size": 16,
             "max_steps": 1, "num_ppo_epochs": 1, "num_mini_batches": 2, "response_length": 12, "learning_rate": 1e-3,
             "diagnose": False, "seed": 7, "local_rollout_forward_batch_size": 8}  # fmt: skip
    trainer = PPOTrainer(
        train_dataset=data, eval_dataset=data.select(range(8)), processing_class=TOKENIZER,
        args=PPOConfig(**{**COMMON, **fixed, **settings}), **parts,
    )  # fmt: skip
    if kind == "engine":
        trainer.roles.engine = Copied(trainer.roles.eos_ids, TOKENIZER)
    return trainer


def on_one_base(folder: Path, policy: LlamaForCausalLM) -> dict[str, Any]:
    """The four roles as adapters on one base."""
    from ppo_vs_dpo.models.loading.pretrained import load_policy
    from ppo_vs_dpo.ppo.roles.shared import share_base
    from tests.ppo.roles.test_shared import save_reward_adapter

    policy.save_pretrained(folder / "base")
    TOKENIZER.save_pretrained(folder / "base")
    save_reward_adapter(folder / "base", folder / "reward")
    roles = share_base(load_policy(folder / "base"), LORA, folder / "reward", "reward_model")
    return dict(zip(("model", "value_model", "reward_model"), roles, strict=True))


ROWS = [{"prompt": prompt, "chosen": " very good film", "rejected": " bad"} for prompt in PROMPTS * 4]


def trained(
    folder: Path,
    stage: str,
    plain: bool = False,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase = TOKENIZER,
    rows: list[dict[str, str]] = ROWS,
    **more: Any,
) -> Trainer:
    """The trainer of SFT, reward model or DPO, two steps of eight rows; ``plain``: TRL's as it is.

    Args:
        more: of its arguments.
    """
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    import ppo_vs_dpo.dpo.train as dpo
    import ppo_vs_dpo.reward_model.train as reward_model
    import ppo_vs_dpo.sft.train as sft
    from ppo_vs_dpo.dpo.config import smoothed_loss
    from ppo_vs_dpo.dpo.data import dpo_dataset
    from ppo_vs_dpo.reward_model.data import reward_dataset
    from ppo_vs_dpo.sft.data import sft_dataset

    fixed = {**COMMON, "bf16": True, "gradient_checkpointing": False, "per_device_train_batch_size": 8,
             "max_steps": 2, "logging_steps": 1, **more}  # fmt: skip
    texts = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    args = {"sft": SFTConfig, "reward_model": RewardConfig, "dpo": DPOConfig}[stage](
        str(folder), **fixed, **(smoothed_loss({}) if stage == "dpo" else {})
    )
    model = (llama(stage == "reward_model") if model is None else model).train()
    if plain:
        cls = {"sft": SFTTrainer, "reward_model": RewardTrainer, "dpo": DPOTrainer}[stage]
        if stage == "dpo":
            model.save_pretrained(folder / "policy")
            model, args.precompute_ref_log_probs = str(folder / "policy"), True
        data = Dataset.from_list(texts if stage == "sft" else rows)
        trainer = cls(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    elif stage == "dpo":
        trainer = dpo.build_trainer(model, tokenizer, dpo_dataset(Dataset.from_list(rows), tokenizer), args)
    elif stage == "reward_model":
        data = reward_dataset(Dataset.from_list(rows), tokenizer)
        trainer = reward_model.build_trainer(model, tokenizer, data, args)
    else:
        data = sft_dataset(Dataset.from_list(texts), tokenizer, True, None, None)
        trainer = sft.build_trainer(model, tokenizer, data, args)
    return trainer
