"""Steps 1 to 6 of an update: prompts, responses, scores, log-probabilities and values, rewards, advantages."""

import contextlib
import time
from typing import Any

import torch

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.sampling.engine import TransformersEngine
from ppo_vs_dpo.models.sampling.generation import Generated, row_seed
from ppo_vs_dpo.models.sharding.deepspeed import gathered
from ppo_vs_dpo.models.text.prompts import decode_completion
from ppo_vs_dpo.ppo.algorithm import gae, token_rewards, whiten
from ppo_vs_dpo.ppo.rollouts.engines import check_agreement
from ppo_vs_dpo.ppo.rollouts.prompts import PromptSet
from ppo_vs_dpo.ppo.rollouts.rewards import RewardError
from ppo_vs_dpo.ppo.rollouts.rollout import Rollout, extend_by_one
from ppo_vs_dpo.ppo.watching.metrics import any_rank


class Clock:
    """Seconds spent in named phases."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.now = "start"

    def __call__(self, name: str) -> "Phase":
        return Phase(self, name)


class Phase:
    """One phase of a `Clock`, as a context."""

    def __init__(self, clock: Clock, name: str):
        self.clock, self.name = clock, name

    def __enter__(self) -> None:
        self.started, self.clock.now = time.monotonic(), self.name.rpartition("/")[2]

    def __exit__(self, *error: Any) -> None:
        self.clock.seconds[self.name] = self.clock.seconds.get(self.name, 0.0) + time.monotonic() - self.started


class Collection:
    """The part of `ppo.trainer.PPOTrainer` that makes rollouts."""

    def collect(self, update: int, clock: "Clock | None" = None) -> Rollout:
        """Steps 1 to 6: a rollout with rewards, advantages and returns, gathered from all ranks.

        Args:
            update: its number, from 0; prompts and samples depend on it and the seed alone.
            clock: takes the time of each phase.
        """
        args, clock = self.args, clock or Clock()
        # 1. draw prompts: ranks take turns along one global list
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        drawn = self.prompts.drawn_for(update, self.rollout_size, args.seed)
        positions = range(rank, len(drawn), ranks)
        rows = [drawn[position] for position in positions]
        prompt_ids = [self.prompts.ids[row] for row in rows]

        # 2. sample responses: a seed for each place in the list, so that the number of ranks changes nothing
        with clock("time/generate"):
            seeds = [row_seed(args.seed, "rollout", update, position) for position in positions]
            generated = self.sample(prompt_ids, seeds)
        rollout = Rollout.empty(
            prompt_ids,
            [g.token_ids for g in generated],
            [g.finished for g in generated],
            self.processing_class.pad_token_id,
        )
        if self.conventions.score_after_last:
            rollout.value_mask = extend_by_one(rollout.mask)

        # 3. score them
        with clock("time/score"):
            rollout.scores = self.score(rows, generated, self.prompts, rollout)
            rollout.final_scores = self.final_scores(rollout.scores, rollout.finished)

        # 4. log-probabilities and values
        with clock("time/forward"):
            self._forward(rollout, generated)
        if self.engine.keeps_weights and args.check_first_ratio:
            check_agreement(self, rollout)

        # What follows may be summed over ranks, and some backends do so on the device only.
        rollout = rollout.to(self.accelerator.device)

        # 5. rewards: the score on the last token, the KL penalty on each
        rollout.rewards = token_rewards(
            rollout.final_scores,
            rollout.logprobs,
            rollout.ref_logprobs,
            rollout.mask,
            self.kl.coef if args.kl_in == "reward" else 0.0,
            args.kl_estimator,
            rollout.value_mask,
        )
        unbiased = self.conventions.unbiased
        if args.whiten_rewards:
            rollout.rewards = whiten(rollout.rewards, rollout.value_mask, shift_mean=False, unbiased=unbiased)

        # 6. advantages and returns
        rollout.advantages, rollout.returns = gae(
            rollout.rewards, rollout.values, rollout.value_mask, args.gamma, args.lam
        )
        if args.whiten_advantages:
            rollout.advantages = whiten(rollout.advantages, rollout.mask, unbiased=unbiased)
        return rollout.gather()

    def sample(self, prompt_ids: list[list[int]], seeds: list[int], reference: bool = False) -> list[Generated]:
        """Responses of the policy (or of the reference) to some prompts, one seed each.

        With ``logprobs_from_sampling`` the policy's come with their log-probabilities, where those are what a pass
        over the responses would give.
        """
        if reference:
            # Sampled once a run, unless it moves: not worth weights of its own in another engine.
            engine, model = TransformersEngine(self.eos_ids, self.processing_class), self.reference.module
        else:
            engine, model = self.engine, self.policy
        whole = contextlib.nullcontext()
        if self.is_deepspeed_enabled and self.args.ds3_gather_for_generation:
            # ZeRO-3: the weights are gathered once for the whole rollout.
            wrapped = self.model_wrapped
            whole = self.reference.generating(wrapped) if reference else gathered(wrapped, self.policy)
        with whole:
            # Each time: whatever moved the weights (an update, a resume, the best checkpoint), they are sampled from.
            engine.update_weights(model)
            return engine.generate(prompt_ids, self.sampling, seeds)

    def score(self, rows: list[int], generated: list[Generated], prompts: PromptSet, rollout: Rollout | None = None):
        """Scores ``(N,)`` of responses to the prompts ``rows``.

        Raises:
            RewardError: the reward gave something that cannot be used; the rollout is saved first.
        """
        finished = [g.finished for g in generated]
        error, scores = None, [0.0] * len(rows)
        try:
            scores = self.rewards(
                [prompts.prompts[row] for row in rows],
                [decode_completion(self.processing_class, g.token_ids) for g in generated],
                [prompts.ids[row] for row in rows],
                [g.token_ids for g in generated],
                finished,
                **prompts.columns_of(rows),
            )
        except RewardError as raised:
            error = raised
        # All ranks stop together, with the message of the one that failed.
        if any_rank(error is not None, self.accelerator.device):
            where = self.save_rollout(rollout, "reward") if rollout is not None else None
            note = f" The rollout is in {where}." if where else ""
            raise UserError(f"{error or 'the reward failed on another rank.'}{note}") from error
        return torch.tensor(scores, dtype=torch.float32)

    def final_scores(self, scores: torch.Tensor, finished: torch.Tensor) -> torch.Tensor:
        """Scores after bias (N+ detail 15), clip (Xu et al. 2024) and the penalty for a missing EOS (detail 23)."""
        args = self.args
        final = scores - (self.score_bias or 0.0)
        if args.score_clip is not None:
            final = final.clamp(-args.score_clip, args.score_clip)
        penalty = args.missing_eos_penalty
        if penalty is None:
            return final
        convention = self.conventions.missing_eos or args.missing_eos
        penalised = final - penalty if convention == "subtract" else torch.full_like(final, -penalty)
        return torch.where(finished, final, penalised)

    @torch.no_grad()
    def _forward(self, rollout: Rollout, generated: list[Generated]) -> None:
        """Fill in log-probabilities, entropies and values, in batches of similar length.

        What sampling has worked out already is not worked out again.
        """
        device = self.accelerator.device
        known = not self.engine.keeps_weights and all(g.logprobs is not None for g in generated)
        for row, one in enumerate(generated):
            if one.logprobs is not None:
                rollout.engine_logprobs[row, : len(one.logprobs)] = torch.tensor(one.logprobs)
            if known:
                rollout.entropy[row, : len(one.entropy)] = torch.tensor(one.entropy)
        if known:
            rollout.logprobs = rollout.engine_logprobs.clone()
        self.model_wrapped.train()
        tokens = self.args.micro_batch_tokens if self.accelerator.num_processes == 1 else None
        for rows in rollout.micro_batches(self.args.local_rollout_forward_batch_size, tokens):
            part = rollout.select(rows).to(device)
            batch = part.batch()
            out = self.model_wrapped(
                batch, self.temperature, value_mask=part.value_mask, with_policy=not known, with_entropy=not known
            )
            out["ref_logprobs"] = self.reference.logprobs(batch, self.temperature)
            width = part.mask.shape[1]
            for name, values in out.items():
                getattr(rollout, name)[rows, :width] = values.float().cpu()
        if not self.engine.keeps_weights:
            # Sampled by the model that trains: nothing to correct for.
            rollout.engine_logprobs = rollout.logprobs.clone()
