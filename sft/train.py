"""Stage 0: the reference policy, by supervised fine-tuning (TRL's ``SFTTrainer``).

Reads ``data/sft_train.parquet``; writes ``sft/model``, where the reward model, PPO and DPO all start.
"""

import os
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import atomic_folder, read_json, read_parquet
from ppo_vs_dpo.artifacts.settings import split
from ppo_vs_dpo.artifacts.stage import StageContext
from ppo_vs_dpo.models.loading.config import LoraSettings, ModelConfig
from ppo_vs_dpo.models.loading.prepared import train_in_full
from ppo_vs_dpo.models.loading.pretrained import build_policy, context_length, is_adapter, load_policy, load_tokenizer
from ppo_vs_dpo.models.loading.quantized import quantization
from ppo_vs_dpo.models.passes.answers import check_language_model
from ppo_vs_dpo.models.passes.unpadded import skip_padding
from ppo_vs_dpo.models.sharding.deepspeed import unsharded_loading
from ppo_vs_dpo.models.text.encoding import left_out
from ppo_vs_dpo.models.training import (
    callbacks,
    model_settings,
    parameter_counts,
    save_model,
    train,
    training_arguments,
)
from ppo_vs_dpo.sft.config import SFTStage
from ppo_vs_dpo.sft.data import sft_dataset


def initial_policy(
    context: StageContext, config: ModelConfig, trainable: bool = True, base: Any = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that the run starts from and its tokenizer: ``model.path``, or the architecture with new weights.

    Raises:
        UserError: new weights are to be quantised (``base``, from `models.loading.quantized`) and frozen.
    """
    if config.path is None and base is not None:
        raise UserError("sft.lora.load_in_4bit freezes the model it starts from, and model.path names none.")
    if config.path is None:
        tokenizer = load_tokenizer(context.run.path("data", "tokenizer"), config)
        set_seed(context.seed)
        with unsharded_loading():
            return build_policy(config, tokenizer), tokenizer
    return load_policy(config.path, config, trainable, base), load_tokenizer(config.path, config)


def save_unchanged(model: PreTrainedModel, config: ModelConfig, folder: Path) -> None:
    """Save a model that was only loaded: its weights are linked to where they lie, if they lie on the same disk.

    A linked file is the same bytes under two names; deleting one leaves the other.
    """
    files = weight_files(config)
    try:
        for file in files:
            os.link(file.resolve(), folder / file.name)
    except OSError:  # another disk, or one without links
        files = []
        for file in folder.iterdir():
            file.unlink()
    if not files:
        model.save_pretrained(folder)
        return
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def weight_files(config: ModelConfig) -> list[Path]:
    """The safetensors files of the model that a run starts from, and their index; none where it has another form."""
    source = Path(str(config.path))
    if not source.is_dir():
        try:
            source = Path(snapshot_download(str(config.path), revision=config.revision, local_files_only=True))
        except (OSError, ValueError):  # not in the cache under this name
            return []
    whole, index = source / "model.safetensors", source / "model.safetensors.index.json"
    if is_adapter(source):
        return []
    if whole.is_file():
        return [whole]
    if not index.is_file():
        return []
    names = sorted(set(read_json(index)["weight_map"].values()))
    return [index, *(source / name for name in names)] if all((source / n).is_file() for n in names) else []


def build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    args: SFTConfig,
    lora: LoraSettings | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> SFTTrainer:
    """TRL's trainer on a data set from `sft.data.sft_dataset`; padding is skipped where the model allows it.

    Raises:
        UserError: the model is no causal language model, or none of this tokenizer.
    """
    check_language_model(model, tokenizer, "the model")
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=lora.peft_config("CAUSAL_LM") if lora else None,
        callbacks=callbacks,
    )
    if not trainer.padding_free:
        skip_padding(trainer.model)
    train_in_full(trainer.model, trainer.is_deepspeed_enabled)
    return trainer


def run_stage(context: StageContext) -> None:
    """Run the stage."""
    settings, passed = split(context.config, SFTStage, SFTConfig, where="sft")
    model_config = model_settings(context)
    args = training_arguments(SFTConfig, context, passed)

    # 1. Where it starts.
    if settings.skip_training and model_config.path is None:
        raise UserError("sft.skip_training needs a trained model in model.path; there is only an architecture.")
    base = None if settings.skip_training else quantization(settings.lora, model_config, context)
    model, tokenizer = initial_policy(context, model_config, not settings.skip_training, base)
    if settings.skip_training:
        if context.is_main_process:
            with atomic_folder(context.dir / "model") as folder:
                save_unchanged(model, model_config, folder)
                tokenizer.save_pretrained(folder)
        context.finish(trained=False, parameters=model.num_parameters())
        return

    # 2. What it learns from.
    examples = read_parquet(context.run.path("data", "sft_train.parquet"))
    dataset = sft_dataset(examples, tokenizer, args.completion_only_loss, args.max_length, context_length(model))

    # 3. Train and save.
    trainer = build_trainer(model, tokenizer, dataset, args, settings.lora, callbacks(context))
    summary = train(trainer, context)
    parameters = parameter_counts(trainer)
    save_model(trainer, context, tokenizer, settings.merge_lora)
    context.finish(
        trained=True,
        examples=len(dataset),
        left_out=len(examples) - len(dataset),
        warnings=left_out(len(examples), len(dataset), "sft", args.max_length),
        steps=trainer.state.global_step,
        train_loss=summary["train_loss"],
        **parameters,
    )
