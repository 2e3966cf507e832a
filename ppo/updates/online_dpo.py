"""Online DPO: the same loop, with a loss on pairs of fresh samples in place of PPO's.

Of the ``k`` responses to a prompt the best and the worst by the reward are a pair, and the policy is trained on it as
DPO trains on pairs of a file (Guo et al. 2024, 2402.04792, with k = 2; Dong et al. 2024, 2405.07863, with best and
worst). No value model, no advantages, no ratio to clip: a step does not ask who sampled. So one rollout may serve many
steps (``num_mini_batches``): that is the staleness of Noukhovitch et al. 2024 (2410.18252), and between online and
offline lies nothing but it.
"""

import torch
from torch.nn.functional import logsigmoid

from ppo_vs_dpo.ppo.rollouts.rollout import Rollout
from ppo_vs_dpo.ppo.updates.losses import LossInputs, LossOutputs, LossSettings, figures_of, with_pretraining


def chosen_and_rejected(rollout: Rollout, k: int) -> Rollout:
    """The best and the worst of each group by ``final_scores``: rows ``2 i`` (chosen) and ``2 i + 1`` (rejected).

    Of equal scores the first counts as best and the last as worst, so that the two are never the same row.

    Of a whole rollout ``k`` neighbouring rows, at least 2, are the responses to a prompt.
    """
    scores = rollout.final_scores.view(-1, k)
    first = torch.arange(len(scores), device=scores.device) * k
    best = scores.argmax(1)
    worst = (k - 1) - scores.flip(1).argmin(1)
    return rollout.select(torch.stack([first + best, first + worst], dim=1).flatten().cpu())


def label(scores: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """How sure it is that the first of a pair is better, and whether the pair says anything.

    Args:
        scores: ``(P, 2)`` of the pair's responses, the first at least as high.
        kind: ``certain``: 1, and a tie says nothing. ``bradley_terry``: sigma(r_1 - r_2), what labels drawn by that
            model are on average; then, and only then, the optimum is that of the KL-regularised reward (Rafailov et
            al. 2023, eq. 4).

    Returns:
        ``(P,)`` probabilities, ``(P,)`` weights of 0 or 1.
    """
    difference = scores[:, 0] - scores[:, 1]
    if kind == "bradley_terry":
        return torch.sigmoid(difference), torch.ones_like(difference)
    # But for rounding: equal responses that were scored in other batches differ in the last bits.
    return torch.ones_like(difference), (difference > 1e-5 * (1 + scores.abs().amax(1))).to(difference.dtype)


def dpo_loss(inputs: LossInputs, settings: LossSettings) -> LossOutputs:
    """DPO's or IPO's loss of the pairs of a micro-batch (rows ``2 i`` and ``2 i + 1``), as a share of the minibatch's.

    With ``h = log pi(y)/ref(y)``, summed over tokens, ``d = h_chosen - h_rejected`` and the label ``p``:

    * ``dpo``: ``-p log sigma(beta d) - (1 - p) log sigma(-beta d)`` (Rafailov et al. 2023, eq. 7);
    * ``ipo``: ``p (d - 1/(2 beta))^2 + (1 - p) (d + 1/(2 beta))^2``, h as a mean over tokens (Azar et al. 2023,
      eq. 17, and TRL's reading of it, which its authors confirmed there).
    """
    old, beta = inputs.rollout, settings.beta
    mask, here = old.mask, old.mask.sum()
    log_ratio = torch.where(mask, inputs.logprobs - old.ref_logprobs, 0)
    h = log_ratio.sum(1)
    if settings.loss == "ipo":
        h = h / mask.sum(1).clamp_min(1)
    chosen, rejected = h.view(-1, 2).unbind(1)
    d = chosen - rejected
    p, counts = label(old.final_scores.view(-1, 2).to(d.dtype), settings.preference_labels)
    if settings.loss == "ipo":
        loss = p * (d - 1 / (2 * beta)) ** 2 + (1 - p) * (d + 1 / (2 * beta)) ** 2
    else:
        loss = -p * logsigmoid(beta * d) - (1 - p) * logsigmoid(-beta * d)
    # A mean over all pairs of the minibatch.
    share = (counts * loss).sum() / (inputs.responses / 2)
    with torch.no_grad():
        pairs = torch.as_tensor(len(d), device=d.device)
        moved = torch.where(mask, inputs.logprobs - old.logprobs, 0)
        sums = figures_of(
            pairs,
            {
                "loss/policy_avg": share * (inputs.responses / 2) / pairs,
                "rewards/chosen": beta * chosen.mean(),
                "rewards/rejected": beta * rejected.mean(),
                "rewards/margins": beta * d.mean(),
                "rewards/accuracies": (d > 0).to(d.dtype).mean(),
                "rewards/ties": (old.final_scores.view(-1, 2).diff(dim=1) == 0).to(d.dtype).mean(),
            },
        )
        sums |= figures_of(here, {"policy/approxkl_avg": 0.5 * (moved**2).sum() / here.clamp_min(1)})
    return with_pretraining(LossOutputs(share, sums), inputs, settings)
