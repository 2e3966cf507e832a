"""The stage ppo: from the run's SFT policy and reward model to a policy that PPO has trained.

Reads ``sft/model``, ``reward_model/model`` and ``data/prompts_train.parquet``; writes ``ppo/model``.
"""

import os
from typing import Any

import torch
from datasets import Dataset
from omegaconf import OmegaConf
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_parquet
from ppo_vs_dpo.artifacts.resources import part
from ppo_vs_dpo.artifacts.settings import split
from ppo_vs_dpo.artifacts.stage import StageContext
from ppo_vs_dpo.models.callbacks import RunCallback
from ppo_vs_dpo.models.loading.adapters import is_peft
from ppo_vs_dpo.models.loading.pretrained import load_tokenizer
from ppo_vs_dpo.models.resuming import readable, resume_point
from ppo_vs_dpo.models.sharding.deepspeed import tell_held_bytes, whole_state
from ppo_vs_dpo.models.training import check_ended, model_settings, training_arguments, write_model
from ppo_vs_dpo.ppo.config import PPOConfig
from ppo_vs_dpo.ppo.roles.judge import JudgeReward, judge_settings
from ppo_vs_dpo.ppo.stage.config import JUDGE, PPOStage
from ppo_vs_dpo.ppo.stage.loading import load_roles
from ppo_vs_dpo.ppo.trainer import PPOTrainer
from ppo_vs_dpo.preferences.judging.cache import Cache
from ppo_vs_dpo.preferences.judging.llm import LLMJudge
from ppo_vs_dpo.preferences.recipes.named import load_gold


def split_prompts(prompts: Dataset, validation: int, seed: int) -> tuple[Dataset, Dataset | None]:
    """Set a few training prompts aside for the evaluation during training.

    The prompts of the verdict (``data/prompts_heldout.parquet``) choose nothing here: neither weights nor checkpoints.
    The choice goes by prompt, so that a prompt that occurs twice is on one side only.

    Args:
        prompts: with a column ``prompt``, and ``prompt_id`` where there is one.
        validation: how many different prompts to set aside; 0 for none.

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


def settings_of(section: dict[str, Any]) -> tuple[PPOStage, dict[str, Any]]:
    """The stage's own keys, and arguments of `PPOConfig` with what follows from both.

    Raises:
        UserError: as `artifacts.settings.split`; or ``value_from`` is neither of the two.
    """
    own, passed = split(section, PPOStage, PPOConfig, where="ppo")
    if own.value_from not in ("reward_model", "policy"):
        raise UserError(f"ppo.value_from is {own.value_from!r}; it must be reward_model or policy.")
    if own.validation_prompts <= 0:
        passed["eval_strategy"] = "no"
    if passed.get("load_best_model_at_end") is None:
        passed["load_best_model_at_end"] = can_choose_best(passed)
    return own, passed


def can_choose_best(passed: dict[str, Any]) -> bool:
    """Whether the stage evaluates and keeps checkpoints, so that it can end with the best of them."""
    evaluates = passed.get("eval_strategy") not in (None, False, "no")
    return evaluates and passed.get("save_strategy") not in (False, "no") and not passed.get("save_only_model")


def reward_functions(context: StageContext, own: PPOStage) -> list:
    """The functions that the reward is made of: the gold reward of the data, or those of ``ppo.reward``.

    Raises:
        UserError: there is no gold reward, or a function cannot be imported.
    """
    if not own.gold_reward:
        return [_judge(context, own) if name == JUDGE else load_gold(name, "ppo.reward") for name in own.functions]
    name = OmegaConf.select(context.run.config, "data.gold")
    if not name:
        raise UserError("ppo.gold_reward is set, and the data of this run has no gold reward (data.gold).")
    return [load_gold(name)]


def _judge(context: StageContext, own: PPOStage) -> JudgeReward:
    """The judge of ``ppo.judge``; each rank keeps the replies that it paid for."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return JudgeReward(LLMJudge(judge_settings(own.judge), cache=Cache(context.dir / f"judge-{rank}.jsonl")), ranks)


def run_stage(context: StageContext) -> None:
    """Train, or go on from the last checkpoint, and leave ``model/`` and ``done.json`` behind."""
    own, passed = settings_of(context.config)
    config = model_settings(context)
    args = training_arguments(PPOConfig, context, passed)
    set_seed(context.seed)

    # 1. The models. The reference is made from the policy: a copy, or the policy without its adapters.
    roles = load_roles(context, own, config, args)
    roles["reward_funcs"] = reward_functions(context, own) or None
    tokenizer = load_tokenizer(context.run.path("sft", "model"), config)

    # 2. The prompts.
    prompts = read_parquet(context.run.path("data", "prompts_train.parquet"), columns=["prompt"])
    train, validation = split_prompts(prompts, own.validation_prompts, context.seed)

    # 3. Train and save.
    watching = RunCallback(context)
    trainer = PPOTrainer(
        **roles,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        callbacks=[watching],
    )
    # One line a log is in metrics.jsonl and on the progress bar: no second printout.
    trainer.remove_callback(PrinterCallback)
    checkpoint = resume_point(context, args.output_dir, trainer.is_deepspeed_enabled)
    with readable(checkpoint, context, lambda: watching.stepped):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    check_ended(context, trainer.loop.step, trainer.num_updates)
    if trainer.is_deepspeed_enabled:
        tell_held_bytes(args.process_index, trainer.roles.held_bytes())
    save_final(trainer, context)
    context.count(tokens_generated=trainer.state.num_input_tokens_seen)
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
        warnings=[f"{', '.join(said)}: log.txt says why, and what to try."]
        if (said := trainer.loop.diagnosis.said)
        else [],
    )


@part("saving")
def save_final(trainer: PPOTrainer, context: StageContext) -> None:
    """Write ``model/``: a plain folder for ``from_pretrained`` with the tokenizer; adapters are merged.

    With adapters, ``adapter/`` holds them too. All processes must call this.
    """
    policy, weights, is_main = trainer.policy, None, trainer.is_world_process_zero()
    if trainer.is_deepspeed_enabled:
        # A collective: one parameter at a time meets on the main process.
        weights = whole_state(policy, keep=is_main, trained_only=is_peft(policy))
    if is_main:
        # On a shared base the other roles' adapters are not the policy's to save.
        own = [policy.active_adapter] if is_peft(policy) else None
        write_model(policy, trainer.processing_class, context, weights, adapters=own)
    trainer.accelerator.wait_for_everyone()
