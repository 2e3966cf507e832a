"""The loss of a minibatch, term by term, against sums worked out by hand: one table of cases."""

import dataclasses
import math

import pytest
import torch

from ppo_vs_dpo.ppo.rollouts.rollout import Rollout
from ppo_vs_dpo.ppo.updates.losses import LossInputs, LossSettings, Totals, ppo_loss

# Two responses, of 3 and of 1 token; what stands at padding must change nothing.
NAN = math.nan
OLD = [[-1.0, -2.0, -0.5], [-1.5, NAN, NAN]]
NEW = [[-1.0 + math.log(1.5), -2.0, -0.5 - math.log(2)], [-1.5 + 0.1, NAN, NAN]]
RATIO = [1.5, 1.0, 0.5, math.exp(0.1)]
ADVANTAGES = [[1.0, -2.0, 3.0], [-1.0, NAN, NAN]]
REFERENCE = [[-1.2, -1.8, -0.5], [-2.0, NAN, NAN]]
ENGINE = [[-1.0, -2.0 - math.log(3), -0.5 + math.log(2)], [-1.5, NAN, NAN]]
VALUES, OLD_VALUES = [[0.5, 1.0, 0.0], [2.0, NAN, NAN]], [[0.4, 0.0, 0.0], [2.0, NAN, NAN]]
RETURNS = [[1.0, 1.5, -1.0], [2.0, NAN, NAN]]
ENTROPY = [[0.5, 1.0, 1.5], [2.0, NAN, NAN]]
TEXT, TEXT_MASK = [[-1.0, -3.0], [-2.0, NAN]], [[True, True], [True, False]]

# rho A = 1.5, -2, 1.5, -e^0.1; clipped at 0.8 and 1.2: 1.2, -2, 2.4, -e^0.1; the smaller ones count.
SURROGATE = [-1.2, 2.0, -1.5, math.exp(0.1)]
# max of (V - R)^2 = .25, .25, 1, 0 and, with V within 0.2 of the old, (0.5, 0.2, 0, 2): .25, 1.69, 1, 0.
VALUE, UNCLIPPED = 0.5 * (0.25 + 1.69 + 1 + 0) / 4, 0.5 * (0.25 + 0.25 + 1 + 0) / 4
LOG_RATIO = [math.log(RATIO[i]) for i in range(4)]
NEW_REAL, REFERENCE_REAL = [-1.0 + math.log(1.5), -2.0, -0.5 - math.log(2), -1.4], [-1.2, -1.8, -0.5, -2.0]
L = [a - b for a, b in zip(NEW_REAL, REFERENCE_REAL, strict=True)]
K2, K3 = sum(x * x / 2 for x in L) / 4, sum(math.exp(-x) - 1 + x for x in L) / 4
POLICY = sum(SURROGATE) / 4
# Weights exp(old - engine) = 1, 3, 0.5, 1, of which 3 is cut at 2.
CORRECTED = (SURROGATE[0] + 2 * SURROGATE[1] + 0.5 * SURROGATE[2] + SURROGATE[3]) / 4

BASE = LossSettings(vf_coef=0.0, cliprange_value=None)
CASES = {
    "policy alone": (BASE, POLICY),
    "a wider clip": (dataclasses.replace(BASE, cliprange=0.6), (-1.5 + 2.0 - 1.5 + math.exp(0.1)) / 4),
    "another engine's weights": (dataclasses.replace(BASE, importance_sampling_cap=2.0), CORRECTED),
    "values, unclipped": (dataclasses.replace(BASE, vf_coef=0.3), POLICY + 0.3 * UNCLIPPED),
    "values, clipped": (dataclasses.replace(BASE, vf_coef=0.3, cliprange_value=0.2), POLICY + 0.3 * VALUE),
    "KL, k2": (dataclasses.replace(BASE, kl_coef=0.7, kl_estimator="k2"), POLICY + 0.7 * K2),
    "KL, k3": (dataclasses.replace(BASE, kl_coef=0.7, kl_estimator="k3"), POLICY + 0.7 * K3),
    "entropy": (dataclasses.replace(BASE, entropy_coef=0.4), POLICY - 0.4 * (0.5 + 1 + 1.5 + 2) / 4),
    "pretraining": (dataclasses.replace(BASE, ptx_coef=2.0), POLICY + 2.0 * (1 + 3 + 2) / 3),
    "all": (
        LossSettings(0.2, 0.2, 0.1, 0.7, "k3", 0.4, 2.0, 2.0),
        CORRECTED + 0.1 * VALUE + 0.7 * K3 - 0.4 * 1.25 + 2.0 * 2.0,
    ),
}


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def inputs(rows=(0, 1), **given) -> LossInputs:
    """The micro-batch of some of the rows, of the minibatch of both."""
    rows = list(rows)
    rollout = Rollout.empty([[3], [3]], [[5, 6, 2], [2]], [True, True], 0)
    for name, value in (
        ("logprobs", OLD), ("advantages", ADVANTAGES), ("ref_logprobs", REFERENCE), ("engine_logprobs", ENGINE),
        ("values", OLD_VALUES), ("returns", RETURNS),
    ):  # fmt: skip
        setattr(rollout, name, tensor(value))
    width = 3 if 0 in rows else 1
    now = {"values": VALUES, "logprobs": NEW, "entropy": ENTROPY}
    now = {name: tensor(value)[rows, :width].requires_grad_() for name, value in now.items()}
    texts = {"ptx_logprobs": tensor(TEXT)[rows].requires_grad_(), "text_mask": torch.tensor(TEXT_MASK)[rows]}
    sizes = {"tokens": torch.tensor(4), "value_tokens": torch.tensor(4), "text_tokens": 3}
    return LossInputs(**{"rollout": rollout.select(rows), **sizes, **now, **texts, **given})


def alone(settings, rows=(0, 1)):
    """Without the terms that the settings do not ask for, as `update` leaves them out."""
    without = {} if settings.ptx_coef else {"ptx_logprobs": None, "text_mask": None}
    return ppo_loss(inputs(rows, **without, **({} if settings.entropy_coef else {"entropy": None})), settings)


@pytest.mark.parametrize("case", CASES)
def test_each_term(case):
    settings, expected = CASES[case]
    assert alone(settings).loss.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_add_up(case):
    """The losses of two micro-batches, and their figures, are those of both rows together."""
    settings, expected = CASES[case]
    parts, whole, added = [alone(settings, rows) for rows in ((0,), (1,))], Totals(), Totals()
    assert sum(part.loss.item() for part in parts) == pytest.approx(expected, abs=1e-12)
    for part in parts:
        added.add(part.sums, part.maxima)
    together = alone(settings)
    whole.add(together.sums, together.maxima)
    assert added.over_ranks() == pytest.approx(whole.over_ranks(), abs=1e-12)


def test_figures():
    figures = Totals()
    out = ppo_loss(inputs(), CASES["all"][0])
    figures.add(out.sums, out.maxima)
    assert figures.over_ranks() == pytest.approx(
        {
            "loss/policy_avg": CORRECTED,
            "loss/value_avg": VALUE,
            "loss/kl_avg": K3,
            "loss/ptx_avg": 2.0,
            "policy/approxkl_avg": sum(x * x for x in LOG_RATIO) / 8,
            "policy/clipfrac_avg": 1 / 4,  # of rho 1.5 with A > 0; rho 0.5 with A > 0 may come back
            "val/ratio": sum(RATIO) / 4,
            "val/ratio_max": 1.5,
            "val/clipfrac_avg": 1 / 4,
            "val/error": 1.5 / 4,
        },
        abs=1e-12,
    )


def test_values_alone_while_they_warm_up():
    out = ppo_loss(inputs(logprobs=None, entropy=None, ptx_logprobs=None, text_mask=None), CASES["all"][0])
    assert out.loss.item() == pytest.approx(0.1 * VALUE, abs=1e-12)
    assert set(out.sums) == {"loss/value_avg", "val/clipfrac_avg", "val/error"}


def test_a_policy_without_a_value_model():
    out = ppo_loss(inputs(values=None, ptx_logprobs=None, text_mask=None), dataclasses.replace(BASE, vf_coef=0.5))
    assert out.loss.item() == pytest.approx(POLICY, abs=1e-12)


def test_nothing_is_touched():
    """The same inputs give the same outputs, gradients reach what is trained alone, and padding gets none."""
    given = inputs()
    before = {name: value.clone() for name, value in given.rollout.fields().items()}
    first, second = (ppo_loss(given, CASES["all"][0]) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(before[n].nan_to_num(), value.nan_to_num()) for n, value in given.rollout.fields().items())
    first.loss.backward()
    for trained, mask in (
        (given.logprobs, given.rollout.mask),
        (given.values, given.rollout.value_mask),
        (given.entropy, given.rollout.mask),
        (given.ptx_logprobs, given.text_mask),
    ):
        assert trained.grad.isfinite().all()
        assert not trained.grad[~mask].any()
    with pytest.raises(dataclasses.FrozenInstanceError):
        given.tokens = 1
