"""Step 7 of the loop, and what must hold of it: finite figures, a ratio of 1 on the first pass; what it cost."""

import torch

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.ppo.rollouts.collect import Clock
from ppo_vs_dpo.ppo.rollouts.rollout import Rollout
from ppo_vs_dpo.ppo.updates.update import NonFinite, Update, run_update
from ppo_vs_dpo.ppo.watching.cost import update_flops
from ppo_vs_dpo.ppo.watching.metrics import engine_metrics, rollout_metrics


class Optimization:
    """The part of `ppo.trainer.PPOTrainer` that trains on a rollout."""

    def _update(self, rollout: Rollout, update: int) -> Update:
        """Step 7, and the check that the ratio is 1 before the first optimizer step."""
        args = self.args
        value_only = update < args.value_warmup_updates
        if value_only:
            for group in self.optimizer.param_groups:
                if group.get("role") == "policy":
                    group["lr"] = 0.0
        try:
            done = run_update(
                self.model_wrapped,
                self.optimizer,
                self.accelerator,
                args,
                rollout,
                update=update,
                kl_coef=self.kl.coef,
                temperature=self.temperature,
                value_only=value_only,
                ptx=self.ptx,
            )
        except NonFinite as error:
            where = self.save_rollout(rollout, "nonfinite")
            kept = "The weights are those before it"
            if self.is_deepspeed_enabled and "gradient" in str(error):
                kept = "DeepSpeed's step has taken it into the weights (the last checkpoint is from before)"
            raise UserError(
                f"{error} is not finite. {kept}, and the rollout is in {where}. "
                f"Usual causes: a learning rate too high ({args.learning_rate:g}), fp16 overflow (use bf16), "
                f"rewards of huge size (score_clip)."
            ) from error
        if args.check_first_ratio and not value_only:
            self._check_first_ratio(done, rollout)
        return done

    def _check_first_ratio(self, done: Update, rollout: Rollout) -> None:
        """Stop when the policy that trains is not the policy that sampled (N+: ratio exactly 1 on the first pass)."""
        full = next(self.policy.parameters()).dtype == torch.float32 and self.args.mixed_precision == "no"
        seen, allowed = (done.first_deviation, 1e-3) if full else (done.first_deviation_mean, 0.1)
        if seen > allowed:
            where = self.save_rollout(rollout, "ratio")
            raise UserError(
                f"on the first pass over the rollout of update {self.state.global_step + 1} the log ratio is off by "
                f"{seen:.2g} (allowed {allowed:g}), and the ratio must be 1 there. The policy that trains is not the "
                f"one that sampled. Usual causes: dropout that is still on, a model that answers differently in "
                f"training and evaluation. The rollout is in {where}; check_first_ratio=false goes on regardless."
            )

    def _figures(self, rollout: Rollout, done: Update, clock: Clock) -> dict[str, float]:
        """Everything the log says about one update."""
        metrics = rollout_metrics(rollout, self.kl.coef)
        metrics.update(done.metrics)
        if self.engine.keeps_weights:
            metrics.update(engine_metrics(rollout, self.args.importance_sampling_cap))
        metrics["val/first_ratio_deviation"] = done.first_deviation
        metrics["policy/stopped_early"] = float(done.stopped_early)
        metrics["episode"] = (self.state.global_step + 1) * self.rollout_size
        lrs = {group.get("role", "policy"): group["lr"] for group in self.optimizer.param_groups}
        metrics["lr"], metrics["lr_value"] = lrs.get("policy", 0.0), lrs.get("value_model", 0.0)
        metrics.update(clock.seconds)
        return metrics

    def _count(self, rollout: Rollout, done: Update, update: int) -> None:
        """Add this update to the cost so far, in fields of the state that every checkpoint keeps."""
        tokens = int(rollout.mask.sum())
        passes = done.steps / self.args.num_mini_batches
        value_only = update < self.args.value_warmup_updates
        self.state.total_flos += update_flops(self.sizes, tokens + int(rollout.prompt_mask.sum()), passes, value_only)
        # Of PPO's own samples: it trains on what it generates.
        self.state.num_input_tokens_seen += tokens
