"""Strengths and possible ranks: of one run and of several, without a bootstrap."""

import numpy as np
import pytest
from scipy.special import expit

from ppo_vs_dpo.compare.estimates.ranking import ranking

NAMES = ["sft", "a", "b", "c"]
PAIRS = [(NAMES[i], NAMES[j]) for i in range(4) for j in range(i)]


def preferences(rng, skills, prompts):
    """Single draws of policies of these strengths, ``(P, 6)``: Bradley-Terry holds."""
    scores = np.array(skills) + rng.gumbel(size=(prompts, 4))
    return np.stack([(scores[:, NAMES.index(a)] > scores[:, NAMES.index(b)]).astype(float) for a, b in PAIRS], axis=1)


@pytest.mark.parametrize("seeds", [1, 3])
def test_strengths_are_covered_and_ranks_stay_possible(seeds):
    """One law of scores for all pairs: strengths are the true ones; equal policies are not ranked apart."""
    rng, skills, covered, ranked = np.random.default_rng(0), [0.0, 0.4, 0.8, 0.8], [], []
    for _ in range(120):
        groups = [preferences(rng, skills, 60) for _ in range(seeds)]
        found = ranking(PAIRS, groups, NAMES, shared=False)["entries"]
        for entry in found:
            name = entry["policy"]
            if name != "sft":
                covered.append(entry["ci"][0] <= skills[NAMES.index(name)] <= entry["ci"][1])
        top = {entry["policy"]: entry["rank_ci"] for entry in found}
        ranked.append(top["b"][0] == 1 and top["c"][0] == 1 and top["sft"][1] == 4)
    assert 0.92 <= np.mean(covered) <= 0.99
    assert np.mean(ranked) >= 0.95


def test_shared_prompts_are_not_counted_twice():
    """Three runs whose policies differ by prompt only: as wide as one run's interval, not narrower by sqrt(3)."""
    rng = np.random.default_rng(1)
    chance = expit(rng.normal(0, 1.5, (80, 6)))
    groups = [chance + 1e-3 * rng.normal(size=chance.shape) for _ in range(3)]
    one = ranking(PAIRS, groups[:1], NAMES)["entries"]
    three = {e["policy"]: e for e in ranking(PAIRS, groups, NAMES, shared=True)["entries"]}
    for entry in one:
        if entry["policy"] != "sft":
            width, pooled = (e["ci"][1] - e["ci"][0] for e in (entry, three[entry["policy"]]))
            assert pooled > 0.9 * width
            assert len(three[entry["policy"]]["per_seed"]) == 3


def test_what_cannot_be_ranked():
    wins = np.ones((20, 6))
    assert "not finite" in ranking(PAIRS, [wins], NAMES)["note"]
    assert "fewer than three prompts" in ranking(PAIRS, [np.full((2, 6), 0.4)], NAMES)["note"]
