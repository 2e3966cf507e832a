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
"""

import math
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.pretrained import eos_token_ids, load_tokenizer
from ppo_vs_dpo.models.passes.logprobs import base, score_head_of
from ppo_vs_dpo.models.sharding.deepspeed import named_step
from ppo_vs_dpo.models.sharding.state import keep_written
from ppo_vs_dpo.ppo.algorithm import AdaptiveKL, FixedKL
from ppo_vs_dpo.ppo.checkpoints.persistence import Persistence
from ppo_vs_dpo.ppo.config import CONVENTIONS, PPOConfig
from ppo_vs_dpo.ppo.roles.roles import (
    PolicyAndValue,
    Reference,
    add_adapters,
    as_policy,
    as_value_or_reward,
    optimizer_groups,
    prepare_frozen,
    value_model_from,
)
from ppo_vs_dpo.ppo.roles.sharded import Sharded
from ppo_vs_dpo.ppo.roles.value_head import rescale_values, shift_values
from ppo_vs_dpo.ppo.rollouts.collect import Clock, Collection
from ppo_vs_dpo.ppo.rollouts.engines import make_engine
from ppo_vs_dpo.ppo.rollouts.prompts import PromptSet, allowed_prompt_length
from ppo_vs_dpo.ppo.rollouts.rewards import RewardFunction, make_rewards
from ppo_vs_dpo.ppo.updates.optimization import Optimization
from ppo_vs_dpo.ppo.updates.pretraining import PretrainingText
from ppo_vs_dpo.ppo.watching.cost import Sizes, size_of
from ppo_vs_dpo.ppo.watching.diagnosis import Diagnosis
from ppo_vs_dpo.ppo.watching.evaluation import Evaluator

logger = logging.get_logger(__name__)


class PPOTrainer(Collection, Optimization, Persistence, Sharded, Trainer):
    """Trains a policy against a reward, held to a reference by a KL penalty.

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
        reward_processing_class: the reward model's tokenizer, where it is not the policy's.
        ptx_dataset: texts for the pretraining mix (``args.ptx_coef``).
        peft_config: train adapters on policy and value model.
        callbacks: as for any Trainer.
        optimizers: an optimizer and a scheduler instead of the default ones.

    Raises:
        UserError: anything in the arguments that cannot work; names what and where.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
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
    ):
        args = args if args is not None else PPOConfig(output_dir="ppo_output")
        if processing_class is None:
            processing_class = load_tokenizer(model if isinstance(model, str) else model.name_or_path)
        policy = as_policy(model)
        self.conventions = CONVENTIONS[args.parity]
        self.sampling = args.sampling()
        self.temperature = self.sampling.temperature + self.conventions.temperature_offset
        if self.sampling.changes_distribution:
            logger.warning(
                "top_k or top_p make the sampled policy another one than the model: the KL figures are then no longer "
                "estimates of KL(policy || reference)."
            )

        # The four roles: reward, value, policy, reference.
        self.rewards = make_rewards(
            reward_model,
            reward_funcs,
            processing_class,
            reward_processing_class,
            args.reward_weights,
            args.local_rollout_forward_batch_size,
        )
        if value_model is None:
            shared, weight, bias = self.rewards.shared() or (None, 1.0, 0.0)
            value_model = value_model_from(shared, policy)
            if shared is not None:
                rescale_values(value_model, weight, weight * bias + args.fixed_score_bias)
        value_model = as_value_or_reward(value_model, trainable=True)
        if value_model is reward_model or value_model is policy:
            raise UserError("value_model must be a model of its own: it is trained. Pass a copy, or nothing.")
        reference = as_policy(ref_model) if ref_model is not None else None
        if peft_config is not None:
            policy, value_model = add_adapters(policy, value_model, peft_config)
        self.reference = Reference(reference, policy)

        max_length = allowed_prompt_length(policy, self.sampling.max_new_tokens, args.max_prompt_length)
        self.prompts = PromptSet(train_dataset, processing_class, max_length, args.truncate_prompts)
        self.eval_prompts = (
            PromptSet(eval_dataset, processing_class, max_length, args.truncate_prompts, "eval_dataset")
            if eval_dataset is not None
            else None
        )
        if args.eval_strategy != "no" and eval_dataset is None:
            raise UserError(
                f"ppo.eval_strategy is {args.eval_strategy.value} and there is no eval_dataset: pass prompts to "
                f"evaluate on, or eval_strategy=no."
            )
        if args.ptx_coef and ptx_dataset is None:
            raise UserError("ppo.ptx_coef is set and there is no ptx_dataset: pass pretraining texts, or ptx_coef=0.")
        self.ptx = None
        if args.ptx_coef:
            self.ptx = PretrainingText(
                ptx_dataset, processing_class, args.ptx_max_length, args.ptx_batch_size, args.seed
            )

        if args.ddp_find_unused_parameters is None:
            # Every trained tensor takes part in every backward pass, but for the policy while the values warm up.
            args.ddp_find_unused_parameters = args.value_warmup_updates > 0
        super().__init__(
            model=PolicyAndValue(policy, value_model),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.eos_ids = eos_token_ids(policy, processing_class)
        self.rollout_size, self.num_updates = self._plan()
        if self.is_deepspeed_enabled:
            self.settle_deepspeed()
        self.reference.prepare(self.accelerator)
        for part in self.rewards.parts:
            if hasattr(part, "model"):
                part.model = prepare_frozen(part.model, self.accelerator)
        adaptive = args.kl_controller == "adaptive"
        self.kl = AdaptiveKL(args.kl_coef, args.kl_target, args.kl_horizon) if adaptive else FixedKL(args.kl_coef)
        self.score_bias: float | None = None if args.score_bias == "auto" else float(args.score_bias)
        self.diagnosis = Diagnosis()
        self.evaluator = Evaluator(self)
        self.sizes = Sizes(
            policy=size_of(self.policy),
            value=size_of(self.value_model),
            reference=size_of(self.reference.module),
            reward=sum(size_of(part.model) for part in self.rewards.parts if hasattr(part, "model")),
        )
        self._prepared = False
        self.engine = make_engine(self)

    # ------------------------------------------------------------------------------------------------ the plan

    def _plan(self) -> tuple[int, int]:
        """Responses per update and number of updates.

        Raises:
            UserError: the rollout cannot be cut into equal minibatches and shares.
        """
        args, ranks = self.args, self.accelerator.num_processes
        size = args.rollout_batch_size
        if size is None:
            size = args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks
        if size % (args.num_mini_batches * ranks):
            raise UserError(
                f"a rollout of {size} responses (ppo.rollout_batch_size) cannot be cut into {args.num_mini_batches} "
                f"equal minibatches on {ranks} ranks. Make it a multiple of {args.num_mini_batches * ranks}."
            )
        if args.max_steps > 0:
            return size, args.max_steps
        episodes = args.total_episodes or args.num_train_epochs * len(self.prompts)
        return size, max(1, math.ceil(episodes / size))

    @property
    def policy(self) -> PreTrainedModel:
        """The policy, unwrapped."""
        return self.model.policy

    @property
    def value_model(self) -> PreTrainedModel:
        """The value model, unwrapped."""
        return self.model.value_model

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """One optimizer of ``args.optim``; policy and value model in groups with learning rates of their own."""
        if self.optimizer is None:
            args = self.args
            value_lr = args.learning_rate if args.value_learning_rate is None else args.value_learning_rate
            decay = set(self.get_decay_parameter_names(self.model))
            groups = optimizer_groups(self.model, decay, args.weight_decay, args.learning_rate, value_lr)
            cls, kwargs = self.get_optimizer_cls_and_kwargs(args, self.model)
            self.optimizer = cls(groups, **kwargs)
        return self.optimizer

    def _prepare_once(self) -> None:
        """Optimizer, wrapping (DDP, DeepSpeed, mixed precision) and schedule."""
        if self._prepared:
            return
        # The name before transformers 5.20, to which vLLM holds, is gradient_checkpointing.
        kind = "activation" if hasattr(self.args, "activation_checkpointing") else "gradient"
        if getattr(self.args, f"{kind}_checkpointing"):
            self.model.gradient_checkpointing_enable(getattr(self.args, f"{kind}_checkpointing_kwargs"))
        self.create_optimizer()
        self.model_wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        if self.is_deepspeed_enabled:
            self.deepspeed = self.model_wrapped
        self.create_scheduler(self.num_updates)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self._prepared = True

    # ------------------------------------------------------------------------------------------------ the loop

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Run all updates.

        Args:
            resume_from_checkpoint: a checkpoint folder; True for the newest in ``output_dir`` (none: starts afresh).

        Raises:
            UserError: a reward, loss or gradient that is not finite (the rollout is saved first), a ratio that is not
                1 on the first pass, a checkpoint of another run.
        """
        args = self.args
        self._prepare_once()
        self.state = TrainerState(
            stateful_callbacks=[
                cb for cb in [*self.callback_handler.callbacks, self.control] if isinstance(cb, ExportableState)
            ]
        )
        self.state.compute_steps(args, self.num_updates)
        self.state.train_batch_size = args.per_device_train_batch_size
        self.resume(resume_from_checkpoint)
        epochs = math.ceil(self.num_updates * self.rollout_size / len(self.prompts))
        self.state.init_training_references(self, self.num_updates, epochs, None)
        self._initial_num_input_tokens_seen = self.state.num_input_tokens_seen
        self.is_in_train = True
        self.control = self.callback_handler.on_train_begin(args, self.state, self.control)
        if self.score_bias is None:
            self.score_bias = self.evaluator.mean_reference_score(args.score_bias_samples)
            shift_values(self.value_model, self.score_bias)
            if self.is_deepspeed_enabled:
                keep_written(score_head_of(base(self.value_model)).parameters())
        if args.eval_on_start and self.state.global_step == 0 and self.eval_prompts is not None:
            self.evaluate()
        metrics: dict[str, float] = {}
        started = time.monotonic()

        while self.state.global_step < self.num_updates:
            update = self.state.global_step
            self.control = self.callback_handler.on_step_begin(args, self.state, self.control)
            clock = Clock()
            with named_step(lambda n=update + 1, clock=clock: f"ppo, update {n}, {clock.now}"):
                rollout = self.collect(update, clock)  # steps 1 to 6
                with clock("time/train"):
                    done = self._update(rollout, update)  # step 7
            metrics = self._figures(rollout, done, clock)
            self._count(rollout, done, update)

            # 8. KL coefficient and reference
            self.kl.update(metrics["objective/kl"], len(rollout))
            if args.sync_ref_model and (update + 1) % args.ref_model_sync_steps == 0:
                self.reference.follow(self.policy, args.ref_model_mixup_alpha)
            self.lr_scheduler.step()

            # 9. log, evaluate, save
            self.state.global_step += 1
            self.state.epoch = self.state.global_step * self.rollout_size / len(self.prompts)
            self.control = self.callback_handler.on_step_end(args, self.state, self.control)
            with named_step(lambda n=update + 1: f"ppo, evaluating and saving after update {n}"):
                self._log_evaluate_save(metrics)
            if self.control.should_training_stop:
                break

        self.is_in_train = False
        if args.load_best_model_at_end:
            self.load_best()
        seconds = time.monotonic() - started
        self.control = self.callback_handler.on_train_end(args, self.state, self.control)
        return TrainOutput(
            self.state.global_step, metrics.get("loss/policy_avg", 0.0), {**metrics, "train_runtime": seconds}
        )

    def _log_evaluate_save(self, metrics: dict[str, float]) -> None:
        args = self.args
        if args.diagnose:
            for finding in self.diagnosis.observe(self.state.global_step, metrics):
                logger.warning(finding)
        if self.control.should_log:
            self.log(metrics)
            self.control.should_log = False
        if args.load_best_model_at_end and self.state.global_step == self.num_updates:
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

    def evaluate(self, eval_dataset: Dataset | None = None, ignore_keys=None, metric_key_prefix: str = "eval"):
        """Sample on the evaluation prompts; log reward, KL with standard error, length, EOS rate and the objective.

        Args:
            eval_dataset: other prompts than those of the constructor.
            metric_key_prefix: of the names.
        """
        prompts = self.eval_prompts
        if eval_dataset is not None:
            prompts = PromptSet(eval_dataset, self.processing_class, None, False, "eval_dataset")
        if prompts is None:
            raise UserError("there is no eval_dataset to evaluate on.")
        self._prepare_once()
        metrics = self.evaluator.run(prompts, metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
