"""PPO for language models: the loop, in the numbered steps of the papers.

1. draw prompts                      Huang et al. 2024 (N+), detail 21
2. sample responses                  detail 23
3. score them                        details 12, 15, 23
4. log-probabilities and values      detail 22
5. rewards = score - beta KL         Ziegler et al. 2019, eq. 2
6. advantages by GAE, whitened       Schulman et al. 2016; detail 25
7. update in epochs and minibatches  Schulman et al. 2017, eq. 7
8. KL coefficient and reference      Ziegler et al. 2019, section 2.2; Xu et al. 2024
9. log, evaluate, save

`collect` does 1 to 6, `update` does 7, `Checkpoints` keeps the run and goes on from it: each takes what it needs. This
file calls them in order, with transformers' Trainer for everything around.
"""

import math
import time
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.resources import part
from ppo_vs_dpo.artifacts.settings import removed
from ppo_vs_dpo.artifacts.settings.removed import refuse_removed
from ppo_vs_dpo.models.loading.pretrained import let_pad, load_tokenizer
from ppo_vs_dpo.models.sharding.collectives import gradients_in_buckets
from ppo_vs_dpo.models.sharding.deepspeed import named_step
from ppo_vs_dpo.ppo.checkpoints.identity import identity
from ppo_vs_dpo.ppo.checkpoints.loop import LoopState
from ppo_vs_dpo.ppo.checkpoints.saving import Checkpoints, save_policy
from ppo_vs_dpo.ppo.config import PPOConfig
from ppo_vs_dpo.ppo.roles.rewards import RewardFunction
from ppo_vs_dpo.ppo.roles.roles import make_roles
from ppo_vs_dpo.ppo.roles.trained import optimizer_groups, settle_deepspeed
from ppo_vs_dpo.ppo.roles.value_head import shift_values
from ppo_vs_dpo.ppo.rollouts.checks import Unusable, check_first_ratio, rounding
from ppo_vs_dpo.ppo.rollouts.clock import Clock
from ppo_vs_dpo.ppo.rollouts.collect import collect
from ppo_vs_dpo.ppo.rollouts.engines import compute_dtype, make_engine
from ppo_vs_dpo.ppo.rollouts.prompts import PromptSet, as_dataset, prompt_sets
from ppo_vs_dpo.ppo.rollouts.rollout import Rollout
from ppo_vs_dpo.ppo.updates.pretraining import PretrainingText
from ppo_vs_dpo.ppo.updates.update import Update, update
from ppo_vs_dpo.ppo.watching.evaluation import Evaluator, print_rows
from ppo_vs_dpo.ppo.watching.flops import Sizes, count_update
from ppo_vs_dpo.ppo.watching.metrics import update_metrics

logger = logging.get_logger(__name__)


class PPOTrainer(Trainer):
    """Trains a policy against a reward, held to a reference by a KL penalty.

    Example::

        from datasets import Dataset
        from ppo_vs_dpo import PPOConfig, PPOTrainer

        def likes_good(prompts, completions, **columns):
            return [float(text.count("good")) for text in completions]

        args = PPOConfig(output_dir="out", max_steps=2, rollout_batch_size=8, response_length=8, report_to="none")
        prompts = Dataset.from_dict({"prompt": ["the film", "a story"]})
        trainer = PPOTrainer("my_model", reward_funcs=likes_good, args=args, train_dataset=prompts)
        trainer.train()
        trainer.save_model("my_policy")

    Args:
        model: the policy: a causal language model or its name.
        reward_model: a sequence-classification model with one label, its name, or an object with
            ``score(prompts, completions, finished) -> list[float]``.
        ref_model: the reference; by default a copy of the policy, or the policy without its adapters.
        value_model: a sequence-classification model with one label; by default a copy of the reward model (N+ detail
            22), or without one the policy's backbone with a head of zeros.
        args: the settings.
        train_dataset: prompts in a column ``prompt``, as text or conversations; other columns go to reward functions.
        eval_dataset: prompts for the evaluation during training.
        processing_class: the policy's tokenizer.
        reward_funcs: functions ``f(prompts, completions, **columns) -> list[float]``; mixed with the reward model by
            ``args.reward_weights``.
        reward_processing_class: the reward model's tokenizer; by default the one that lies where the reward model was
            loaded from, else the policy's.
        ptx_dataset: texts for the pretraining mix (``args.ptx_coef``).
        peft_config: train adapters on policy and value model.
        callbacks: as for any Trainer.
        optimizers: an optimizer and a scheduler instead of the default ones.
        gone: nothing; an argument of TRL's that is not there any more is refused with what replaced it.

    Attributes:
        roles: who takes part (`ppo.roles.roles.Roles`).
        loop: what changes from update to update, and a checkpoint holds (`ppo.checkpoints.loop.LoopState`).

    Raises:
        UserError: anything in the arguments that cannot work; names what and where.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | None = None,
        reward_model: Any = None,
        ref_model: PreTrainedModel | str | None = None,
        value_model: PreTrainedModel | str | None = None,
        args: PPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_funcs: RewardFunction | list[RewardFunction] | None = None,
        reward_processing_class: PreTrainedTokenizerBase | None = None,
        ptx_dataset: Dataset | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        **gone: Any,
    ):
        refuse_removed("PPOTrainer", gone, removed.TRAINER, signature(PPOTrainer.__init__).parameters)
        if model is None:  # after the names of earlier releases: policy=
            raise UserError("PPOTrainer needs the policy to train: model=, a model, its folder or name on the Hub.")
        args = args if args is not None else PPOConfig(output_dir="ppo_output")
        tokenizer = processing_class or load_tokenizer(model if isinstance(model, str) else model.name_or_path)
        let_pad(tokenizer, "processing_class")
        self.loop = LoopState.start(args)
        given = (reward_funcs, reward_processing_class, peft_config)
        self.roles = roles = make_roles(model, reward_model, ref_model, value_model, args, tokenizer, *given)

        train_dataset = as_dataset(train_dataset, "train_dataset")
        eval_dataset = as_dataset(eval_dataset, "eval_dataset")
        self.prompts, self.eval_prompts = prompt_sets(train_dataset, eval_dataset, roles, args)
        self.ptx = PretrainingText.of(args, ptx_dataset, tokenizer)
        if args.ddp_find_unused_parameters is None:
            # Every trained tensor takes part in every backward pass, but for the policy while the values warm up.
            args.ddp_find_unused_parameters = args.value_warmup_updates > 0
        super().__init__(
            model=roles.trained,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.rollout_size = args.rollout_size(self.accelerator.num_processes)
        self.num_updates = args.num_updates(len(self.prompts), self.rollout_size)
        if self.is_deepspeed_enabled:
            settle_deepspeed(args, self.accelerator, self.model, self.num_updates)
        elif args.coalesce_grad_reduction:
            raise UserError(
                "ppo.coalesce_grad_reduction is of DeepSpeed: without it ranks exchange gradients once a step anyway. "
                "Leave it out."
            )
        roles.place(self.accelerator, args.sync_ref_model)
        longest = max(prompts.longest for prompts in (self.prompts, self.eval_prompts) if prompts is not None)
        roles.engine = make_engine(roles.policy, tokenizer, args, self.accelerator, longest)
        self.evaluator = Evaluator(roles, args, self.accelerator)
        settings = identity(args, self.rollout_size, self.num_updates, self.prompts.ids)
        self.checkpoints = Checkpoints(roles, self.loop, args, self.accelerator, settings)
        self.sizes = Sizes.of(roles)
        self._prepared = False

    @property
    def state(self) -> TrainerState:
        """Step, epoch, log and best so far: a part of the loop's state."""
        return self.loop.progress

    @state.setter
    def state(self, progress: TrainerState) -> None:
        self.loop.progress = progress

    @property
    def policy(self) -> PreTrainedModel:
        """The policy, unwrapped."""
        return self.roles.policy

    @property
    def value_model(self) -> PreTrainedModel | None:
        """The value model, unwrapped; ``None`` without a critic."""
        return self.roles.value

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """One optimizer of ``args.optim``; policy and value model in groups with learning rates of their own."""
        if self.optimizer is None:
            groups = optimizer_groups(self.model, set(self.get_decay_parameter_names(self.model)), self.args)
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = cls(groups, **kwargs)
        return self.optimizer

    def prepare(self) -> None:
        """Optimizer, wrapping (DDP, DeepSpeed, mixed precision) and schedule, once."""
        if self._prepared:
            return
        # The name before transformers 5.20, to which vLLM holds, is gradient_checkpointing.
        kind = "activation" if hasattr(self.args, "activation_checkpointing") else "gradient"
        if getattr(self.args, f"{kind}_checkpointing"):
            self.model.gradient_checkpointing_enable(getattr(self.args, f"{kind}_checkpointing_kwargs"))
        self.create_optimizer()
        gradients_in_buckets(self.accelerator)
        self.model_wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.roles.trained = self.model_wrapped
        if self.is_deepspeed_enabled:
            self.deepspeed = self.model_wrapped
        self.create_scheduler(self.num_updates)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self._prepared = True

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Run all updates.

        Args:
            resume_from_checkpoint: a checkpoint folder; True for the newest in ``output_dir`` (none: starts afresh).

        Raises:
            UserError: a reward, loss or gradient that is not finite (the rollout is saved first), a ratio that is not
                1 on the first pass, a checkpoint of another run.
        """
        args, loop, tokenizer = self.args, self.loop, self.processing_class
        self._begin(resume_from_checkpoint)
        metrics: dict[str, float] = {}
        started = time.monotonic()
        while loop.step < self.num_updates:
            number, clock = loop.step, Clock()
            self.control = self.callback_handler.on_step_begin(args, self.state, self.control)
            try:
                with named_step(lambda n=number + 1, clock=clock: f"ppo, update {n}, {clock.now}", args.ddp_timeout):
                    rollout = self.collect(number, clock)  # steps 1 to 6
                    with clock("time/train"):
                        done = self.update(rollout, number)  # step 7
            except Unusable as problem:
                said = problem.keep(Path(args.output_dir), number + 1, tokenizer, self.is_world_process_zero())
                raise UserError(said) from (problem.__cause__ or problem)
            rates = {group.get("role", "policy"): group["lr"] for group in self.optimizer.param_groups}
            metrics = update_metrics(rollout, done, args, loop.kl.coef, rates, self.roles.engine.keeps_weights)
            metrics = {**metrics, "episode": (number + 1) * self.rollout_size, **clock.seconds}
            passes = done.share * done.steps / args.num_mini_batches
            count_update(loop.progress, self.sizes, rollout, passes, done.value_only)

            # 8. KL coefficient and reference
            loop.kl.update(metrics["objective/kl"], len(rollout))
            if args.sync_ref_model and (number + 1) % args.ref_model_sync_steps == 0:
                self.roles.reference.follow(self.policy, args.ref_model_mixup_alpha)
            self.lr_scheduler.step()

            # 9. log, evaluate, save
            self.state.global_step += 1
            passes = self.state.epoch or 0
            self.state.epoch = loop.step * self.rollout_size / (len(self.prompts) * args.samples_per_prompt)
            self.control = self.callback_handler.on_step_end(args, self.state, self.control)
            if int(self.state.epoch) > int(passes) or loop.step == self.num_updates:
                # The prompts have been drawn once more: what is to happen each epoch does (logging, saving ...).
                self.control = self.callback_handler.on_epoch_end(args, self.state, self.control)
            with named_step(lambda n=number + 1: f"ppo, evaluating and saving after update {n}", args.ddp_timeout):
                self._log_evaluate_save(metrics, done)
            if self.control.should_training_stop:
                break

        self.is_in_train = False
        if args.load_best_model_at_end:
            self.checkpoints.read_best()
        metrics["train_runtime"] = time.monotonic() - started
        self.control = self.callback_handler.on_train_end(args, self.state, self.control)
        return TrainOutput(loop.step, metrics.get("loss/policy_avg", 0.0), metrics)

    def collect(self, number: int, clock: Clock | None = None) -> Rollout:
        """The rollout of one update, numbered from 0: steps 1 to 6."""
        return collect(
            self.roles, self.prompts, self.args, self.accelerator, number=number, size=self.rollout_size,
            kl_coef=self.loop.kl.coef, score_bias=self.loop.score_bias or 0.0, clock=clock,
        )  # fmt: skip

    def update(self, rollout: Rollout, number: int) -> Update:
        """Step 7, and the check that the ratio is 1 before the first optimizer step."""
        self.roles.version += 1
        done = update(
            self.model_wrapped, self.optimizer, rollout, self.args, self.accelerator, number=number,
            kl_coef=self.loop.kl.coef, ptx=self.ptx,
        )  # fmt: skip
        if self.args.check_first_ratio and not done.value_only:
            check_first_ratio(rollout, done.deviation, number + 1, compute_dtype(self.policy, self.args))
        return done

    def _begin(self, resume_from_checkpoint: str | bool | None) -> None:
        """Everything before the first update."""
        args = self.args
        self.prepare()
        self.state = TrainerState(stateful_callbacks=self._stateful())
        self.state.compute_steps(args, self.num_updates)
        self.state.train_batch_size = args.per_device_train_batch_size
        folder = self.checkpoints.find(resume_from_checkpoint)
        if folder is not None:
            self.checkpoints.read(folder, self.optimizer, self.lr_scheduler)
            self.state.compute_steps(args, self.num_updates)
            self._load_callback_state()
        epochs = math.ceil(self.num_updates * self.rollout_size / (len(self.prompts) * args.samples_per_prompt))
        self.state.init_training_references(self, self.num_updates, epochs, None)
        self._initial_num_input_tokens_seen = self.state.num_input_tokens_seen
        self.is_in_train = True
        self.control = self.callback_handler.on_train_begin(args, self.state, self.control)
        if self.loop.score_bias is None:
            self.loop.score_bias = self.evaluator.mean_reference_score(self.prompts, args.score_bias_samples)
            if self.value_model is not None:
                shift_values(self.value_model, self.loop.score_bias, self.is_deepspeed_enabled)
        if args.eval_on_start and self.loop.step == 0 and self.eval_prompts is not None:
            self.evaluate()

    def _log_evaluate_save(self, metrics: dict[str, float], done: Update) -> None:
        args = self.args
        if args.diagnose:
            allowed = rounding(compute_dtype(self.policy, args))
            noted = {"first_ratio/mean": done.deviation.get("mean", 0.0), "first_ratio/allowed": allowed}
            for finding in self.loop.diagnosis.observe(self.loop.step, {**metrics, **noted}):
                logger.warning(finding)
        if self.control.should_log:
            self.log(metrics)
            self.control.should_log = False
        if args.load_best_model_at_end and self.loop.step == self.num_updates:
            # Wherever eval_steps fall: the end of the run may be the best there is.
            self.control.should_evaluate = True
        if (
            self.control.should_evaluate
            and self.eval_prompts is not None
            and self._determine_best_metric(self.evaluate(), trial=None)
            and args.save_strategy != "no"
        ):
            # The best policy so far is kept whether or not a checkpoint is due.
            self.control.should_save = True
        self.control.should_evaluate = False
        if self.control.should_save:
            self._save_checkpoint(self.model_wrapped, trial=None)
            self.control = self.callback_handler.on_save(args, self.state, self.control)
            self.checkpoints.rotate()

    def evaluate(self, eval_dataset: Dataset | None = None, ignore_keys=None, metric_key_prefix: str = "eval"):
        """Sample on the evaluation prompts; log reward, KL with standard error, length, EOS rate and the objective."""
        prompts = self.eval_prompts
        if eval_dataset is not None:
            prompts = PromptSet(eval_dataset, self.processing_class, None, False, "eval_dataset")
        if prompts is None:
            raise UserError("there is no eval_dataset to evaluate on.")
        self.prepare()
        metrics = self.evaluator.run(prompts, metric_key_prefix, self.loop.step, self.loop.score_bias or 0.0)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def generate_completions(self, sampling: bool = False, limit: int = 20) -> list[dict[str, Any]]:
        """One response to every evaluation prompt with its score, as TRL's method of this name.

        Args:
            sampling: the first ``limit`` prompts only, as a look while training.
            limit: how many are printed.

        Returns:
            Rows with ``prompt``, ``completion``, ``score`` and ``finished``; the first are printed as a table.

        Raises:
            UserError: there is no ``eval_dataset``.
        """
        if self.eval_prompts is None:
            raise UserError("generate_completions answers the prompts of eval_dataset, and there is none.")
        self.prepare()
        rows = self.evaluator.completions(self.eval_prompts, limit if sampling else None)
        if self.is_world_process_zero():
            print_rows(rows[:limit])
        return rows

    def _stateful(self) -> list[ExportableState]:
        return [one for one in [*self.callback_handler.callbacks, self.control] if isinstance(one, ExportableState)]

    @part("saving")
    def _save_checkpoint(self, model: torch.nn.Module, trial: Any = None) -> None:
        target = self.checkpoints.write(self.optimizer, self.lr_scheduler, self._stateful())
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the policy (its adapters, where it has some) and the tokenizer as a Hub folder."""
        folder = output_dir or self.args.output_dir
        save_policy(folder, self.policy, self.processing_class, self.is_deepspeed_enabled, self.args.should_save)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
