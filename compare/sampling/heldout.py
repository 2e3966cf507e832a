"""What a policy makes of held-out pairs: likelihoods of chosen and rejected answers, and the reward it implies."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_vs_dpo.compare.sampling.kl import sequence_kl
from ppo_vs_dpo.compare.statistics.intervals import wilson
from ppo_vs_dpo.models.text.encoding import encode_prompts
from ppo_vs_dpo.models.text.prompts import encode_completion
from ppo_vs_dpo.preferences.schema import prompt_id

# Pairs that are measured, at most.
MEASURED_PAIRS = 128


class Known(Protocol):
    """The reference policy, its tokenizer, and the held-out pairs of the run."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pairs: Sequence[dict[str, Any]]


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
    found, tokens = {}, 0
    for side in ("chosen", "rejected"):
        answers = [encode_completion(reference.tokenizer, pair[side]) for pair in pairs]
        found[side] = sequence_kl(model, reference.model, prompt_ids, answers, reference.tokenizer.pad_token_id)
        tokens = tokens or sum(map(len, answers))
    chosen, rejected = found["chosen"], found["rejected"]
    implicit = None
    if model is not reference.model:
        margins = chosen.k1 - rejected.k1
        implicit = agreement_with_labels(int((margins > 0).sum()), int((margins != 0).sum()))
    return {
        "chosen": float(chosen.k1.mean()),
        "chosen_reference": float(chosen.reference_logprob.mean()),
        "rejected": float(rejected.k1.mean()),
        "rejected_reference": float(rejected.reference_logprob.mean()),
        "margin": float(chosen.k1.mean() - rejected.k1.mean()),
        "perplexity": float(np.exp(-chosen.logprob.sum() / tokens)),
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
    return all(isinstance(pair[side], str) or len(pair[side]) == 1 for side in ("chosen", "rejected"))


def written_answers(pairs: Sequence[dict[str, Any]], ids: Sequence[str]) -> list[str | None]:
    """For each prompt (by its fingerprint) the chosen answer of a held-out pair, which nobody trained on.

    Where a prompt has several pairs, the first one's; ``None`` where it has none.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        if one_turn(pair):
            chosen = pair["chosen"]
            text = chosen if isinstance(chosen, str) else str(chosen[-1]["content"])
            found.setdefault(prompt_id(pair["prompt"]), text)
    return [found.get(one) for one in ids]
