"""The optimal frontier: estimated by importance weights it is near the exact one, and it stops where draws run out."""

import itertools

import numpy as np
import pytest
import torch

from ppo_vs_dpo.compare.frontier.enumeration import Space, log_probabilities, space_of
from ppo_vs_dpo.compare.frontier.exact import kl_divergence, optimal_policy, suboptimality
from ppo_vs_dpo.compare.frontier.tilted import LEAST_ESS, tilt, usable_betas
from ppo_vs_dpo.models.passes.logprobs import pad_batch, response_logprobs
from ppo_vs_dpo.models.sampling.generation import SamplingConfig, generate
from ppo_vs_dpo.tests.compare.helpers import exact_frontier
from tests.compare.helpers import small_model

BETAS = np.geomspace(0.1, 20, 25)


def law_and_draws(seed, prompts=3000, draws=24, atoms=4000):
    """One law with rewards like the testbed's gold, and independent draws of it."""
    rng = np.random.default_rng(seed)
    p, r = rng.dirichlet(np.full(atoms, 0.3)), 3.6 * np.tanh(rng.normal(-0.1, 0.7, atoms))
    return p, r, r[rng.choice(atoms, size=(prompts, draws), p=p)]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_estimates_are_near_the_exact_frontier(seed):
    p, r, rewards = law_and_draws(seed)
    found = usable_betas(rewards, BETAS)
    assert len(found) >= 10
    assert found[-1].kl.mean() > 1.2  # it reaches where best-of-8 is
    for one in found:
        best = optimal_policy(p, r, one.beta)
        assert one.reward.mean() == pytest.approx(best @ r, abs=0.06)
        assert one.kl.mean() == pytest.approx(kl_divergence(best, p), abs=0.06)
        assert one.optimum.mean() == pytest.approx(best @ r - one.beta * kl_divergence(best, p), abs=0.06)


def test_the_jackknife_takes_most_of_the_bias_away():
    p, r, rewards = law_and_draws(0, prompts=20_000)
    beta = 0.8
    best = optimal_policy(p, r, beta)
    weights = np.exp((rewards - rewards.max(1, keepdims=True)) / beta)
    plain = ((weights * rewards).sum(1) / weights.sum(1)).mean()
    ours = tilt(rewards, beta).reward.mean()
    assert abs(ours - best @ r) < 0.4 * abs(plain - best @ r)


def test_points_that_hang_on_few_draws_are_left_out():
    _, _, rewards = law_and_draws(0, prompts=200)
    shown = {one.beta for one in usable_betas(rewards, BETAS)}
    for beta in BETAS:
        estimate = tilt(rewards, beta)
        assert (beta in shown) == estimate.usable
        if beta in shown:
            assert estimate.ess.mean() >= LEAST_ESS
    assert min(shown) > 0.3
    # All the mass on one draw: nothing can be said, whatever beta is near 0.
    assert usable_betas(rewards, np.array([1e-3])) == []


def test_equal_rewards_leave_the_reference():
    found = tilt(np.full((5, 24), 1.7), 0.3)
    assert found.kl == pytest.approx(np.zeros(5), abs=1e-9)
    assert found.reward == pytest.approx(np.full(5, 1.7), abs=1e-9)
    assert found.optimum == pytest.approx(np.full(5, 1.7), abs=1e-9)
    assert found.ess == pytest.approx(np.full(5, 24.0))


PROMPT, END = [1, 6, 7], 2


@pytest.fixture(scope="module")
def models(word_tokenizer):
    """Reference and policy over eight tokens."""
    return [small_model(word_tokenizer, seed=s, vocab_size=8, initializer_range=0.4).double() for s in (1, 2)]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_enumeration_equals_one_pass_over_every_completion(models, length):
    model = models[0]
    space = space_of(model, [END], length, 10_000)
    ids, finished = space.completions()
    assert len(ids) == len({tuple(one) for one in ids}) == space.size
    assert finished == [one[-1] == END for one in ids]
    others = [token for token in range(8) if token != END]
    by_hand = {(*head, END) for n in range(length) for head in itertools.product(others, repeat=n)}
    assert {tuple(one) for one in ids} == by_hand | set(itertools.product(others, repeat=length))
    found = log_probabilities(model, PROMPT, space, 0, 0.7)
    assert np.exp(found).sum() == pytest.approx(1.0, abs=1e-9)
    with torch.no_grad():
        one_by_one = response_logprobs(model, pad_batch([PROMPT] * len(ids), ids, 0), 0.7)[0].double().sum(-1)
    assert found == pytest.approx(one_by_one.numpy(), abs=3e-6)  # the plain pass returns fp32


def test_what_is_too_large_is_not_enumerated(models):
    assert space_of(models[0], [END], 3, 400) == Space((0, 1, 3, 4, 5, 6, 7), (END,), 3)
    assert space_of(models[0], [END], 3, 399) is None
    assert space_of(models[0], [END], 500, 20_000) is None
    assert space_of(models[0], [END], 3, 0) is None
    assert space_of(models[0], [], 3, 20_000) is None


def test_samples_of_the_reference_find_the_enumerated_frontier(models):
    """Both ways on one space: draws of the model itself, reweighted, against the sum over all its completions."""
    reference, policy = models
    space = space_of(reference, [END], 3, 10_000)
    ids, _ = space.completions()
    p, pi = (np.exp(log_probabilities(model, PROMPT, space, 0)) for model in (reference, policy))
    rewards = np.random.default_rng(3).normal(size=len(ids))
    n, per = 600, 24
    drawn = generate(
        reference, [PROMPT] * (n * per), SamplingConfig(3, batch_size=4800), eos_token_ids=[END], seeds=range(n * per)
    )
    row_of = {tuple(one): row for row, one in enumerate(ids)}
    draws = rewards[[row_of[tuple(sample.token_ids)] for sample in drawn]].reshape(n, per)
    curve = exact_frontier(p, rewards, BETAS)
    found = usable_betas(draws, BETAS)
    assert len(found) >= 8
    for one in found:
        best = optimal_policy(p, rewards, one.beta)
        assert one.reward.mean() == pytest.approx(best @ rewards, abs=4 * one.reward.std() / np.sqrt(n) + 0.06)
        assert one.reward.mean() <= np.interp(one.kl.mean(), *curve.T) + 4 * one.reward.std() / np.sqrt(n) + 0.03
        # J* - J = beta KL(pi || pi*), both from the enumeration and from J* as estimated.
        gap = suboptimality(pi, p, rewards, one.beta)
        assert gap == pytest.approx(one.beta * kl_divergence(pi, best), abs=1e-9)
        objective = pi @ rewards - one.beta * kl_divergence(pi, p)
        spread = 4 * one.optimum.std() / np.sqrt(n) + 0.03
        assert one.optimum.mean() - objective == pytest.approx(gap, abs=spread)
