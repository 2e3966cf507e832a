"""Towards the enumerated optimum with the real trainers: short runs here, the whole grid by
``benchmarks/convergence.py``."""

import numpy as np
import pytest
import torch

from benchmarks.convergence import BARS, figure_of, run_case, run_ppo
from benchmarks.enumerable import Space, bradley_terry_pairs


def test_the_space_is_all_there_is():
    """Probabilities sum to 1, no policy beats J*, and J* - J = beta KL(pi || pi*) exactly."""
    space = Space(0)
    assert len(space.prompts) * len(space.responses) == 120
    assert np.exp(space.log_reference).sum(1) == pytest.approx(np.ones(3), abs=1e-6)
    beta = 0.3
    best, top = space.optimum(beta)
    assert np.exp(best).sum(1) == pytest.approx(np.ones(3))
    for seed in range(20):
        log_p = np.log(np.random.default_rng(seed).dirichlet(np.ones(40), size=3))
        kl_reference = (np.exp(log_p) * (log_p - space.log_reference)).sum(1).mean()
        objective = (np.exp(log_p) * space.rewards).sum(1).mean() - beta * kl_reference
        kl_best = (np.exp(log_p) * (log_p - best)).sum(1).mean()
        assert top - objective == pytest.approx(beta * kl_best, abs=1e-9)
        assert objective < top
    start = space.measure(space.policy(), beta)
    assert start["gap"] == pytest.approx(1, abs=1e-6)
    assert start["kl"] == pytest.approx(start["kl_start"], abs=1e-6)


def test_labels_are_bradley_terry():
    space = Space(1)
    pairs = bradley_terry_pairs(space, 60_000, seed=0)
    chosen = [space.responses.index(ids) for ids in pairs["chosen_ids"]]
    rejected = [space.responses.index(ids) for ids in pairs["rejected_ids"]]
    rows = [space.prompts.index(ids) for ids in pairs["prompt_ids"]]
    margin = np.abs(space.rewards[rows, chosen] - space.rewards[rows, rejected])
    better = space.rewards[rows, chosen] > space.rewards[rows, rejected]
    # Three standard errors around the mean probability that the better one wins.
    assert abs(better.mean() - (1 / (1 + np.exp(-margin))).mean()) < 3 * 0.5 / 60_000**0.5
    assert set(chosen) | set(rejected) == set(range(40))


def test_ppo_moves_most_of_the_way():
    """80 updates of 256 samples (the grid's bar is 0.01, with 400 of 510); the KL coefficient falls until the 40th."""
    torch.set_num_threads(1)
    space = Space(0)
    policy = run_ppo(space, 0.5, epochs=1, minibatches=1, updates=80, seed=0, batch=256, lr=2e-3)
    assert space.measure(policy, 0.5)["gap"] < 0.35


def test_ppo_with_clipping_moves_most_of_the_way():
    space = Space(0)
    policy = run_ppo(space, 0.5, epochs=4, minibatches=4, updates=8, seed=0, batch=256, lr=1e-3)
    assert space.measure(policy, 0.5)["gap"] < 0.35


@pytest.mark.slow
@pytest.mark.parametrize("method", [method for method in BARS if method != "dpo-1e6"])
def test_convergence_at_the_bar(method):
    """One case of each method of the grid, at the bar of docs/verification.md."""
    row = run_case(method, 0, 0.5)
    assert row[figure_of(method)] <= BARS[method]
    assert row["cpu_seconds"] < 180 or method.startswith("dpo")
