"""KL to the reference, measured the same way for every policy: whole sequences, in nats, at a stated temperature.

And likelihoods of held-out pairs under both, measured by the same pass.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_vs_dpo.compare.statistics.rates import wilson
from ppo_vs_dpo.models.passes.logprobs import Batch, logits_in_pieces, pad_batch, response_logprobs, token_kl
from ppo_vs_dpo.models.text.encoding import encode_prompts
from ppo_vs_dpo.models.text.prompts import encode_completion


@dataclass
class SequenceKL:
    """Sums over the tokens (EOS included) of each completion; arrays ``(N,)``.

    Attributes:
        exact: sum over the sampled prefixes of the exact next-token KL. Unbiased for the sequence KL (chain rule,
            papers.md 3.1.9) and of lower variance than ``k1``, because the sum over the vocabulary is not sampled.
        k1: log pi(y) - log ref(y); unbiased, of high variance, may be negative (Schulman).
        k3: sum of e^-l - 1 + l over tokens, l the token's log-ratio; unbiased, never negative.
        logprob: log pi(y).
        reference_logprob: log ref(y).
    """

    exact: np.ndarray
    k1: np.ndarray
    k3: np.ndarray
    logprob: np.ndarray
    reference_logprob: np.ndarray


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 = (r - 1) - log r with r = ref/pi, from l = log pi/ref: e^-l - 1 + l."""
    return torch.expm1(-log_ratio) + log_ratio


@torch.no_grad()
def sequence_kl(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    prompt_ids: list[list[int]],
    response_ids: list[list[int]],
    pad_id: int,
    *,
    temperature: float = 1.0,
    batch_size: int = 256,
) -> SequenceKL:
    """KL(policy || reference) along completions that the policy drew at the same temperature.

    One forward pass of each model gives all estimates. Top-k and top-p are not seen here: completions drawn with them
    come from another policy than the one measured, and the report says so.

    Args:
        reference: one with the same vocabulary.
        response_ids: ``N`` completions, EOS included where there is one.
        temperature: logits of both are divided by it; above 0.
    """
    if reference is policy:
        own = sequence_logprobs(policy, prompt_ids, response_ids, pad_id, batch_size, temperature=temperature)
        return SequenceKL(*np.zeros((3, len(own))), own, own)
    device = next(policy.parameters()).device
    sums = np.zeros((5, len(prompt_ids)))
    for rows, batch in _batches(prompt_ids, response_ids, pad_id, batch_size, device):
        tokens = batch.response_ids.flatten()[batch.places.real]
        pieces = []
        for here, both in logits_in_pieces((policy, reference), batch):
            p, q = ((logits.float() / temperature).log_softmax(-1) for logits in both)
            token = tokens[here, None]
            logprob, reference_logprob = p.gather(-1, token).squeeze(-1), q.gather(-1, token).squeeze(-1)
            log_ratio = logprob - reference_logprob
            pieces.append(torch.stack([token_kl(p, q), log_ratio, k3(log_ratio), logprob, reference_logprob]))
        if pieces:
            of_token = torch.cat(pieces, dim=1).double()
            row_of_token = batch.places.real // batch.response_mask.shape[1]
            totals = torch.zeros(5, len(rows), dtype=torch.double, device=device)
            sums[:, rows] = totals.index_add_(1, row_of_token, of_token).cpu().numpy()
    return SequenceKL(*sums)


def _batches(
    prompt_ids: list[list[int]], response_ids: list[list[int]], pad_id: int, size: int, device: torch.device
) -> Iterator[tuple[list[int], Batch]]:
    """Rows of similar length together: their numbers, and the batch."""
    order = sorted(range(len(prompt_ids)), key=lambda row: len(prompt_ids[row]) + len(response_ids[row]))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        yield rows, pad_batch([prompt_ids[r] for r in rows], [response_ids[r] for r in rows], pad_id, device)


def sequence_logprobs(
    model: PreTrainedModel,
    prompt_ids: list[list[int]],
    response_ids: list[list[int]],
    pad_id: int,
    batch_size: int = 256,
    *,
    temperature: float = 1.0,
) -> np.ndarray:
    """log pi(y) of whole responses at a temperature, ``(N,)`` in nats."""
    device, sums = next(model.parameters()).device, np.zeros(len(prompt_ids))
    for rows, batch in _batches(prompt_ids, response_ids, pad_id, batch_size, device):
        with torch.no_grad():
            logprobs, _ = response_logprobs(model, batch, temperature)
        sums[rows] = logprobs.double().sum(1).cpu().numpy()
    return sums


# Pairs that are measured, at most.
MEASURED_PAIRS = 128
SIDES = ("chosen", "rejected")


class Known(Protocol):
    """The reference policy, its tokenizer, and the held-out pairs of the run.

    ``likelihoods`` keeps what the reference gives their answers, by the seed that picks them: every policy is held
    against it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pairs: Sequence[dict[str, Any]]
    likelihoods: dict[int, dict[str, np.ndarray]]


def on_heldout_pairs(model: PreTrainedModel, reference: Known, seed: int) -> dict[str, Any] | None:
    """Likelihoods of held-out answers under a policy and under the reference; ``None`` without pairs of one turn.

    DPO widens the margin often by pushing *both* sides down (Rafailov et al. 2024; DPO's most asked question): then
    both changes are negative and the margin is not.

    Returns:
        ``chosen``, ``rejected``: mean change of log-probability from the reference, in nats; ``chosen_reference``,
        ``rejected_reference``: mean log-probability under the reference; ``margin``: difference of the changes;
        ``perplexity``: of the chosen answers, a token, EOS included; ``implicit_reward``: how often the policy's
        implicit reward, beta log pi/ref (Rafailov et al. 2023, equation 5), is larger for the chosen side, whatever
        beta is (`agreement_with_labels`), ``None`` where the policy *is* the reference; ``n_pairs``.
    """
    rows = np.random.default_rng([seed, 5]).permutation(len(reference.pairs))
    # Answers of several turns hold others' words, whose log-probability nobody trained.
    pairs = [pair for pair in (reference.pairs[int(row)] for row in rows) if one_turn(pair)][:MEASURED_PAIRS]
    if not pairs:
        return None
    prompt_ids = encode_prompts(reference.tokenizer, [pair["prompt"] for pair in pairs])
    answers = {side: [encode_completion(reference.tokenizer, pair[side]) for pair in pairs] for side in SIDES}

    def under(one: PreTrainedModel) -> dict[str, np.ndarray]:
        pad_id = reference.tokenizer.pad_token_id
        return {side: sequence_logprobs(one, prompt_ids, answers[side], pad_id) for side in SIDES}

    if seed not in reference.likelihoods:
        reference.likelihoods[seed] = under(reference.model)
    theirs = reference.likelihoods[seed]
    mine = theirs if model is reference.model else under(model)
    moved = {side: mine[side] - theirs[side] for side in SIDES}
    implicit = None
    if model is not reference.model:
        margins = moved["chosen"] - moved["rejected"]
        implicit = agreement_with_labels(int((margins > 0).sum()), int((margins != 0).sum()))
    return {
        "chosen": float(moved["chosen"].mean()),
        "chosen_reference": float(theirs["chosen"].mean()),
        "rejected": float(moved["rejected"].mean()),
        "rejected_reference": float(theirs["rejected"].mean()),
        "margin": float(moved["chosen"].mean() - moved["rejected"].mean()),
        "perplexity": float(np.exp(-mine["chosen"].sum() / sum(map(len, answers["chosen"])))),
        "implicit_reward": implicit,
        "n_pairs": len(pairs),
    }


def agreement_with_labels(right: float, n: float) -> dict[str, Any]:
    """``accuracy`` with its 95 % interval (Wilson) beside ``right`` and ``n``."""
    return {
        "n": n,
        "right": right,
        "accuracy": right / n if n else None,
        "ci": list(wilson(right, n)) if n else [0.0, 1.0],
    }


def one_turn(pair: dict[str, Any]) -> bool:
    """Whether both answers of a pair are one message, or plain text."""
    return all(isinstance(pair[side], str) or len(pair[side]) == 1 for side in SIDES)
