"""The stage ppo: from the run's SFT policy and reward model to a policy that PPO has trained.

Reads ``sft/model``, ``reward_model/model`` and ``data/prompts_train.parquet``; writes ``ppo/model``.
"""

import importlib
import shutil

import torch
from datasets import Dataset
from omegaconf import OmegaConf
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback

from artifacts.callbacks import RunCallback
from artifacts.errors import UserError
from artifacts.files import atomic_folder, read_parquet
from artifacts.settings import split
from artifacts.stage import StageContext
from models.loading import load_policy, load_tokenizer, load_value_or_reward
from models.training import model_settings, training_arguments
from ppo.checkpoint import last_checkpoint
from ppo.config import PPOConfig
from ppo.roles import is_peft
from ppo.stage import PPOStage
from ppo.trainer import PPOTrainer
from reward_model.scorer import RewardScorer


def split_prompts(prompts: Dataset, validation: int, seed: int) -> tuple[Dataset, Dataset | None]:
    """Set a few training prompts aside for the evaluation during training.

    The prompts of the verdict (``data/prompts_heldout.parquet``) choose nothing here: neither weights nor checkpoints.
    The choice goes by prompt, so that a prompt that occurs twice is on one side only.

    Args:
        prompts: with a column ``prompt``, and ``prompt_id`` where there is one.
        validation: how many different prompts to set aside; 0 for none.
        seed: of the choice.

    Returns:
        ``(training prompts, validation prompts or None)``.

    Raises:
        UserError: there are no more prompts than that.
    """
    if validation <= 0:
        return prompts, None
    column = "prompt_id" if "prompt_id" in prompts.column_names else "prompt"
    ids = [str(value) for value in prompts[column]]
    unique = sorted(set(ids))
    if len(unique) <= validation:
        raise UserError(
            f"ppo.validation_prompts is {validation}, and there are {len(unique)} different training prompts: none "
            f"would be left to train on. Lower it."
        )
    order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed))
    chosen = {unique[i] for i in order[:validation].tolist()}
    first: dict[str, int] = {}
    for row, prompt in enumerate(ids):
        if prompt in chosen:
            first.setdefault(prompt, row)
    train = [row for row, prompt in enumerate(ids) if prompt not in chosen]
    return prompts.select(train), prompts.select(sorted(first.values()))


def gold_reward(context: StageContext):
    """The run's known gold reward, a function named in ``data.gold``.

    Raises:
        UserError: there is none, or it cannot be imported.
    """
    name = OmegaConf.select(context.run.config, "data.gold")
    if not name:
        raise UserError("ppo.gold_reward is set, and the data of this run has no gold reward (data.gold).")
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"data.gold is {name!r}, which cannot be imported: {error}") from error


def run_stage(context: StageContext) -> None:
    """Train, or go on from the last checkpoint, and leave ``model/`` and ``done.json`` behind."""
    own, passed = split(context.config, PPOStage, PPOConfig, where="ppo")
    if own.value_from not in ("reward_model", "policy"):
        raise UserError(f"ppo.value_from is {own.value_from!r}; it must be reward_model or policy.")
    config = model_settings(context)
    args = training_arguments(PPOConfig, context, passed)
    set_seed(context.seed)

    # 1. The models. The reference is made from the policy: a copy, or the policy without its adapters.
    context.run.require("sft")
    sft = context.run.path("sft", "model")
    tokenizer = load_tokenizer(sft, config)
    policy = load_policy(sft, config, trainable=True)
    reward, function, value_model = None, None, None
    if own.gold_reward:
        function = gold_reward(context)
    else:
        context.run.require("reward_model")
        folder = context.run.path("reward_model", "model")
        reward = RewardScorer.load(folder, config, batch_size=args.local_rollout_forward_batch_size)
        if own.value_from == "reward_model":
            value_model = load_value_or_reward(folder, config, trainable=True)

    # 2. The prompts.
    prompts = read_parquet(context.run.path("data", "prompts_train.parquet"), columns=["prompt"])
    train, validation = split_prompts(prompts, own.validation_prompts, context.seed)

    # 3. Train and save.
    trainer = PPOTrainer(
        model=policy,
        reward_model=reward,
        reward_funcs=function,
        value_model=value_model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        peft_config=own.lora.peft_config("CAUSAL_LM") if own.lora is not None else None,
        callbacks=[RunCallback(context)],
    )
    # One line a log is in metrics.jsonl and on the progress bar: no second printout.
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))
    save_final(trainer, context)
    history = trainer.state.log_history
    last = next((row for row in reversed(history) if "objective/kl" in row), {})
    evaluation = next((row for row in reversed(history) if "eval_objective" in row), {})
    context.finish(
        updates=trainer.state.global_step,
        episodes=trainer.state.global_step * trainer.rollout_size,
        kl_coef=args.kl_coef,
        kl_estimator=args.kl_estimator,
        kl_in=args.kl_in,
        temperature=args.temperature,
        train_kl=last.get("objective/kl"),
        train_score=last.get("objective/scores"),
        evaluation={k: v for k, v in evaluation.items() if k.startswith("eval_")},
        best_step=trainer.state.best_global_step if args.load_best_model_at_end else None,
    )


def save_final(trainer: PPOTrainer, context: StageContext) -> None:
    """Write ``model/``: a plain folder for ``from_pretrained`` with the tokenizer; adapters are merged.

    With adapters, ``adapter/`` holds them too. All processes must call this.
    """
    target = context.dir / "model"
    if trainer.is_deepspeed_enabled:
        # A collective: the shards meet on the main process.
        temporary = context.dir / ".model.tmp"
        trainer.save_model(str(temporary), _internal_call=True)
        if trainer.is_world_process_zero():
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
    elif trainer.is_world_process_zero():
        policy = trainer.policy
        if is_peft(policy):
            with atomic_folder(context.dir / "adapter") as folder:
                policy.save_pretrained(folder)
            policy = policy.merge_and_unload()
        with atomic_folder(target) as folder:
            policy.save_pretrained(folder)
            trainer.processing_class.save_pretrained(folder)
    trainer.accelerator.wait_for_everyone()
