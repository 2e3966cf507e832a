"""Steps 1 to 6 of an update: prompts, responses, scores, log-probabilities and values, rewards, advantages."""

from accelerate import Accelerator

from ppo_vs_dpo.models.sampling.generation import row_seed
from ppo_vs_dpo.ppo.algorithm import token_rewards, whiten
from ppo_vs_dpo.ppo.config import PPOConfig
from ppo_vs_dpo.ppo.roles.roles import Roles
from ppo_vs_dpo.ppo.rollouts.advantages import estimate, extend_by_one
from ppo_vs_dpo.ppo.rollouts.checks import check_agreement, check_first_kl
from ppo_vs_dpo.ppo.rollouts.clock import Clock
from ppo_vs_dpo.ppo.rollouts.engines import compute_dtype
from ppo_vs_dpo.ppo.rollouts.prompts import PromptSet
from ppo_vs_dpo.ppo.rollouts.responses import forward, sample, score_rollout
from ppo_vs_dpo.ppo.rollouts.rollout import Rollout


def collect(
    roles: Roles,
    prompts: PromptSet,
    args: PPOConfig,
    accelerator: Accelerator,
    *,
    number: int,
    size: int,
    kl_coef: float,
    score_bias: float,
    clock: Clock | None = None,
) -> Rollout:
    """Steps 1 to 6: a rollout with rewards, advantages and returns, gathered from all ranks.

    Args:
        roles: who samples, scores and is compared with.
        number: of the update, from 0; prompts and samples depend on it and the seed alone.
        size: responses, over all ranks.
        kl_coef: weight of the KL penalty in the rewards, where ``kl_in`` is ``"reward"``.
        score_bias: subtracted from scores.

    Raises:
        Unusable: a reward cannot be used, or an engine samples from another policy than the one that trains.
    """
    clock = clock or Clock()
    # 1. draw prompts: ranks take turns along one global list
    k = args.samples_per_prompt
    drawn = [row for row in prompts.drawn_for(number, size // k, args.seed) for _ in range(k)]
    positions = range(accelerator.process_index, len(drawn), accelerator.num_processes)
    rows = [drawn[position] for position in positions]
    prompt_ids = [prompts.ids[row] for row in rows]

    # 2. sample responses: a seed for each place in the list, so that the number of ranks changes nothing
    with clock("time/generate"):
        seeds = [row_seed(args.seed, "rollout", number, position) for position in positions]
        generated = sample(roles, prompt_ids, seeds, args)
    tokens, finished = [g.token_ids for g in generated], [g.finished for g in generated]
    rollout = Rollout.empty(prompt_ids, tokens, finished, roles.tokenizer.pad_token_id)
    if args.conventions.score_after_last:
        rollout.value_mask = extend_by_one(rollout.mask)

    # 3. score them
    with clock("time/score"):
        score_rollout(roles, prompts, rows, generated, accelerator, rollout, args, score_bias)

    # 4. log-probabilities and values
    with clock("time/forward"):
        forward(roles, rollout, generated, args, accelerator)
    if roles.engine.keeps_weights and args.check_first_ratio:
        check_agreement(rollout, number + 1, compute_dtype(roles.policy, args), accelerator.device)

    # What follows may be summed over ranks, and some backends do so on the device only.
    rollout = rollout.to(accelerator.device)

    # 5. rewards: the score on the last token (less what is dense), the KL penalty on each
    rollout.rewards = rollout.dense_rewards + token_rewards(
        rollout.final_scores - rollout.dense_rewards.sum(1),
        rollout.logprobs,
        rollout.ref_logprobs,
        rollout.mask,
        kl_coef if args.penalty_in_reward else 0.0,
        args.kl_estimator,
        rollout.value_mask,
    )
    if args.whiten_rewards:
        unbiased = args.conventions.unbiased
        rollout.rewards = whiten(rollout.rewards, rollout.value_mask, shift_mean=False, unbiased=unbiased)

    # 6. advantages and returns
    rollout = estimate(rollout, args)
    if number == 0 and args.check_first_ratio:
        check_first_kl(rollout, compute_dtype(roles.policy, args), roles.reference.is_start)
    return rollout
