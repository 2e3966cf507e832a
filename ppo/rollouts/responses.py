"""Responses, their scores, and what the models say of them: what a rollout and an evaluation have in common."""

import contextlib

import torch
from accelerate import Accelerator

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.sampling.engine import TransformersEngine
from ppo_vs_dpo.models.sampling.generation import Generated, row_seed
from ppo_vs_dpo.models.sharding.collectives import any_rank, barrier, global_max, several
from ppo_vs_dpo.models.sharding.deepspeed import gathered
from ppo_vs_dpo.models.text.prompts import decode_completions
from ppo_vs_dpo.ppo.config import PPOConfig
from ppo_vs_dpo.ppo.roles.rewards import RewardError, Scored
from ppo_vs_dpo.ppo.roles.roles import Roles
from ppo_vs_dpo.ppo.roles.shaping import normalised_apart, par
from ppo_vs_dpo.ppo.rollouts.checks import Unusable
from ppo_vs_dpo.ppo.rollouts.cutting import micro_batches
from ppo_vs_dpo.ppo.rollouts.prompts import PromptSet
from ppo_vs_dpo.ppo.rollouts.rollout import Rollout


def sample(
    roles: Roles, prompt_ids: list[list[int]], seeds: list[int], args: PPOConfig, reference: bool = False
) -> list[Generated]:
    """Responses of the policy (or of the reference) to some prompts, one seed each.

    With ``logprobs_from_sampling`` the policy's come with their log-probabilities, where those are what a pass over
    the responses would give.
    """
    engine, model, within = roles.engine, roles.policy, contextlib.nullcontext()
    version = ("policy", roles.version)
    streams = getattr(engine, "streams", False)
    if reference:
        model, version = roles.reference.module, ("reference", roles.reference.version)
        if not streams:
            # Sampled once a run, unless it moves: not worth weights of its own in another engine.
            engine = TransformersEngine(roles.eos_ids, roles.tokenizer)
    if args.ds3_gather_for_generation and not streams:
        # ZeRO-3: the weights are gathered once for the whole rollout. Elsewhere nothing is in pieces.
        within = roles.reference.generating(roles.trained) if reference else gathered(roles.trained, model)
    # Another engine has an arithmetic of its own.
    with within, contextlib.nullcontext() if engine.keeps_weights else roles.computing():
        # Whatever moved the weights (an update, a resume, the best checkpoint), they are sampled from; an engine with
        # a copy of its own has them already where nothing did.
        if not engine.keeps_weights or roles.sent != version or getattr(engine, "forgets", False):
            engine.update_weights(model)
        if engine.keeps_weights:
            roles.sent = version
        return engine.generate(prompt_ids, args.sampling(), seeds)


def score(
    roles: Roles,
    prompts: PromptSet,
    rows: list[int],
    generated: list[Generated],
    accelerator: Accelerator,
    args: PPOConfig,
    rollout: Rollout | None = None,
) -> Scored:
    """What the rewards say of responses to the prompts ``rows``.

    Raises:
        UserError: the reward gave something that cannot be used.
        Unusable: the same, for the responses of a rollout.
    """
    error, found, columns = None, None, prompts.columns_of(rows)
    if roles.rewards.wants_references:
        columns["reference_answers"] = reference_answers(roles, prompts, rows, accelerator, args)
    try:
        roles.check_known([g.token_ids for g in generated])
    except RewardError as raised:
        error = raised
    # Before the passes that all ranks make together where models are in pieces.
    stop_together(error, accelerator, rollout)
    try:
        found = roles.rewards(
            [prompts.prompts[row] for row in rows],
            decode_completions(roles.tokenizer, [g.token_ids for g in generated]),
            [prompts.ids[row] for row in rows],
            [g.token_ids for g in generated],
            [g.finished for g in generated],
            **columns,
        )
    except RewardError as raised:
        error = raised
    if roles.rewards.wants_references:
        barrier()  # a judge may take one rank longer than a collective is waited for
    stop_together(error, accelerator, rollout)
    return found


def stop_together(error: RewardError | None, accelerator: Accelerator, rollout: Rollout | None) -> None:
    """All ranks stop with the message of the one that failed, where one did; see `score`."""
    if any_rank(error is not None, accelerator.device) if several() else error is not None:
        message = str(error or "the reward failed on another rank.")
        if rollout is None:
            raise UserError(message) from error
        raise Unusable(rollout, "reward", lambda where: f"{message} The rollout is in {where}.") from error


def score_rollout(
    roles: Roles,
    prompts: PromptSet,
    rows: list[int],
    generated: list[Generated],
    accelerator: Accelerator,
    rollout: Rollout,
    args: PPOConfig,
    bias: float,
) -> None:
    """Step 3: fill in scores, dense rewards and final scores (less ``bias``) of a rollout with its samples in place.

    Raises:
        Unusable: the reward gave something that cannot be used.
    """
    found = score(roles, prompts, rows, generated, accelerator, args, rollout)
    rollout.scores = torch.tensor(found.total, dtype=torch.float32)
    for row, values in enumerate(found.dense or []):
        rollout.dense_rewards[row, : len(values)] = torch.tensor(values, dtype=torch.float32)
    scores, references = rollout.scores, None
    if args.reward_aggregation == "normalize_then_sum":
        # Groups lie on several ranks: the scores of all, in the order of the list; of the result this rank's share.
        parts = torch.tensor(found.parts, dtype=torch.float32).T.contiguous().to(accelerator.device)
        ranks, rank = accelerator.num_processes, accelerator.process_index
        whole = accelerator.gather(parts).unflatten(0, (ranks, -1)).transpose(0, 1).flatten(0, 1)
        weights = torch.tensor(roles.rewards.weights, device=whole.device)
        scores = normalised_apart(whole, weights, args.samples_per_prompt)[rank::ranks].cpu()
    if args.reward_shaping == "par":
        references = reference_scores(roles, prompts, rows, accelerator, args)
    rollout.final_scores = final_scores(
        scores, rollout.finished, args, bias, rollout.lengths(), roles.length_coef, references
    )


def reference_scores(
    roles: Roles, prompts: PromptSet, rows: list[int], accelerator: Accelerator, args: PPOConfig
) -> torch.Tensor:
    """``(N, m)`` scores of ``args.par_references`` responses of the reference to the prompts ``rows``.

    Drawn and scored once a prompt; the seeds are the prompt's, so that any rank, and a resumed run, draws the same.
    """
    known, m = roles.reference_scores, args.par_references
    missing = [row for row in dict.fromkeys(rows) if row not in known]
    # Sharded weights are gathered to sample: all ranks do, or none.
    if any_rank(bool(missing), accelerator.device):
        some = missing or rows[:1]
        asked = [row for row in some for _ in range(m)]
        seeds = [row_seed(args.seed, "reference", row, place) for row in some for place in range(m)]
        drawn = sample(roles, [prompts.ids[row] for row in asked], seeds, args, reference=True)
        totals = score(roles, prompts, asked, drawn, accelerator, args).total
        known.update((row, totals[place * m : (place + 1) * m]) for place, row in enumerate(some))
    return torch.tensor([known[row] for row in rows], dtype=torch.float32)


def reference_answers(
    roles: Roles, prompts: PromptSet, rows: list[int], accelerator: Accelerator, args: PPOConfig
) -> list[str]:
    """The reference's answer to each of the prompts ``rows``, drawn once a prompt by the prompt's own seed."""
    known = roles.reference_answers.setdefault(prompts.name, {})
    missing = [row for row in dict.fromkeys(rows) if row not in known]
    # As in `reference_scores`: all ranks sample, or none.
    if any_rank(bool(missing), accelerator.device):
        some = missing or rows[:1]
        seeds = [row_seed(args.seed, "answer", prompts.name, row) for row in some]
        drawn = sample(roles, [prompts.ids[row] for row in some], seeds, args, reference=True)
        texts = decode_completions(roles.tokenizer, [one.token_ids for one in drawn])
        known.update(zip(some, texts, strict=True))
    return [known[row] for row in rows]


def final_scores(
    scores: torch.Tensor,
    finished: torch.Tensor,
    args: PPOConfig,
    bias: float,
    lengths: torch.Tensor | None = None,
    length_coef: float = 0.0,
    references: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scores after length, shaping, bias (N+ detail 15), clip (Xu et al. 2024) and the penalty for a missing EOS (23).

    Args:
        lengths: ``(N,)`` tokens of the responses, where ``length_coef`` is not 0.
        length_coef: subtracted for each of them.
        references: ``(N, m)`` scores of the reference's responses, where the score is shaped by them (PAR).
    """
    if length_coef:
        scores = scores - length_coef * lengths.to(scores.dtype)
    if references is not None:
        scores = par(scores, references)
    final = scores - bias
    if args.score_clip is not None:
        final = final.clamp(-args.score_clip, args.score_clip)
    penalty = args.missing_eos_penalty
    if penalty is None:
        return final
    convention = args.conventions.missing_eos or args.missing_eos
    penalised = final - penalty if convention == "subtract" else torch.full_like(final, -penalty)
    return torch.where(finished, final, penalised)


@torch.no_grad()
def forward(
    roles: Roles, rollout: Rollout, generated: list[Generated], args: PPOConfig, accelerator: Accelerator
) -> None:
    """Fill in log-probabilities, entropies and values, in batches of similar length.

    What sampling has worked out already is not worked out again.
    """
    known = not roles.engine.keeps_weights and all(g.logprobs is not None for g in generated)
    for row, one in enumerate(generated):
        if one.logprobs is not None:
            rollout.engine_logprobs[row, : len(one.logprobs)] = torch.tensor(one.logprobs)
        if known:
            rollout.entropy[row, : len(one.entropy)] = torch.tensor(one.entropy)
    if known:
        rollout.logprobs = rollout.engine_logprobs.clone()
    roles.trained.train()
    temperature = args.logprob_temperature
    size, tokens = args.local_rollout_forward_batch_size, args.micro_batch_tokens
    groups = micro_batches(rollout.extents.total, size, tokens)
    if tokens is not None:
        # Ranks must make the same number of passes: sharded weights are gathered in each.
        most = int(global_max(torch.tensor(float(len(groups)), device=accelerator.device)))
        groups = micro_batches(rollout.extents.total, size, tokens, most)
    for rows in groups:
        part = rollout.select(rows)
        batch = part.batch().to(accelerator.device)
        # Where values count elsewhere than at the tokens, by a convention.
        differs = part.value_mask.to(accelerator.device) if args.conventions.score_after_last else None
        out = roles.trained(batch, temperature, value_mask=differs, with_policy=not known, with_entropy=not known)
        with roles.computing():
            out["ref_logprobs"] = roles.reference.logprobs(batch, temperature)
        width = part.mask.shape[1]
        # One copy to the host for all.
        for name, values in zip(out, torch.stack([x.float() for x in out.values()]).cpu(), strict=True):
            getattr(rollout, name)[rows, :width] = values
    if not roles.engine.keeps_weights:
        # Sampled by the model that trains: nothing to correct for.
        rollout.engine_logprobs = rollout.logprobs.clone()
