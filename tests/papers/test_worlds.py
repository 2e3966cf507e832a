"""The worlds against closed forms and brute force: a claim is worth what its world is worth."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.papers.direct.xu2024 import counterexample
from ppo_vs_dpo.papers.overoptimisation.coste2023 import combined
from ppo_vs_dpo.papers.overoptimisation.gao2022 import fit, form
from ppo_vs_dpo.papers.worlds import bits, cells, testbed, tree
from ppo_vs_dpo.papers.worlds.online import best_within, online


def test_best_of_n_is_brute_force_with_ties():
    p, r, n = np.array([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 1.0]), 3
    wanted = np.zeros(3)
    for draws in itertools.product(range(3), repeat=n):
        best = max(r[list(draws)])
        ties = [y for y in draws if r[y] == best]
        for y in ties:
            wanted[y] += p[list(draws)].prod() / len(ties)
    assert bits.best_of_n(p, r, n) == pytest.approx(wanted, abs=1e-15)


def test_bits_are_standardised_and_their_tilt_is_the_optimum():
    world = bits.world(np.random.default_rng(0), length=6)
    assert world.reference.sum() == pytest.approx(1, abs=1e-14)
    assert world.reference @ world.gold == pytest.approx(0, abs=1e-14)
    assert world.reference @ world.gold**2 == pytest.approx(1, abs=1e-14)
    beta = 0.4
    best = bits.tilt(world.reference, world.gold, beta)
    # J* = beta log Z, and J* - J = beta KL(pi || pi*) for every pi (papers.md 3.1).
    top = beta * math.log(world.reference @ np.exp(world.gold / beta))
    assert best @ world.gold - beta * world.kl(best) == pytest.approx(top, abs=1e-12)
    assert world.features("large").shape == (64, 6 + 7)


def test_a_linear_reward_model_is_the_maximum_of_its_likelihood():
    """Two items, 30 wins to 10: the difference is log 3."""
    wins = np.concatenate([np.ones((30, 1)), -np.ones((10, 1))])
    assert bits.bradley_terry(wins, ridge=1e-12)[0] == pytest.approx(math.log(3), abs=1e-9)


@pytest.mark.parametrize("kind", ["best_of_n", "tilt"])
def test_the_forms_of_gao_are_recovered_from_their_own_curves(kind):
    distance = np.linspace(0.1, 5, 40)
    assert fit(distance, form(distance, 1.2, 0.4, kind), kind) == pytest.approx((1.2, 0.4), abs=1e-10)


def test_a_tree_knows_all_its_leaves():
    world = tree.world(0, depth=3, interaction=0.5)
    assert len(world.paths) == 27
    law = world.law(world.network)
    assert law.exp().sum().item() == pytest.approx(1, abs=1e-12)
    p = world.reference.exp()
    assert (p @ world.gold).item() == pytest.approx(0, abs=1e-12)
    assert (p @ world.gold**2).item() == pytest.approx(1, abs=1e-12)
    # The chain rule by hand, for one leaf.
    steps = torch.log_softmax(world.network(world.prefixes), 1)
    leaf = 14
    by_hand = sum(steps[world.states[leaf, place], world.paths[leaf, place]] for place in range(3))
    assert law[leaf].item() == pytest.approx(by_hand.item(), abs=1e-12)


def test_pair_losses():
    margin = torch.tensor([0.0, 2.0], dtype=torch.double)
    assert tree.pair_loss("dpo", margin[:1], 0.1).item() == pytest.approx(math.log(2))
    assert tree.pair_loss("ipo", margin[1:], 0.25).item() == pytest.approx(0.0)
    assert tree.pair_loss("slic", margin[1:], 0.5).item() == pytest.approx(0.0)


def test_the_policy_gradient_of_pairs_is_exact_in_expectation():
    """REINFORCE with the other of two samples as the baseline has the gradient of J (papers.md 3.4.11)."""
    world = tree.world(1, depth=2, interaction=0.5)
    beta = 0.3
    model = world.network
    law = world.law(model)
    objective = law.exp() @ world.gold - beta * (law.exp() @ (law - world.reference))
    wanted = torch.autograd.grad(objective, model.parameters())
    with torch.no_grad():
        now = world.law(model)
    reward = world.gold - beta * (now - world.reference)
    law = world.law(model)
    ratio = (law - now).exp()
    gap = reward[:, None] - reward[None]
    weights = now.exp()[:, None] * now.exp()[None]
    surrogate = (weights * (ratio[:, None] - ratio[None]) * gap).sum() / 2
    found = torch.autograd.grad(surrogate, model.parameters())
    for one, other in zip(wanted, found, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_stale_samples_are_drawn_as_rarely_as_said(monkeypatch):
    world = tree.world(0, depth=2, interaction=0.5)
    calls = []
    from ppo_vs_dpo.papers.worlds import online as module

    real = module.labelled

    def counted(*args):
        calls.append(args[2])
        return real(*args)

    monkeypatch.setattr(module, "labelled", counted)
    settings = {"batch": 4, "steps": 8, "learning_rate": 1e-3, "looks": 3, "test_pairs": 10}
    track = online(world, "dpo", 0.1, settings, seed=0, refresh=4)
    assert calls[:2] == [16, 16]
    assert track.step == [0, 4, 8]
    assert track.kl[0] == pytest.approx(0, abs=1e-12)
    assert best_within([track], np.array([100.0]))[0] == max(track.gold)


def test_xu_counterexample_and_cells():
    assert counterexample() > 0.1
    world = cells.world(0, covered=4, noisy=True)
    assert world.covered.sum() == 32
    assert world.covered.diagonal().all()
    assert len(world.pairs[0]) == 8 * 6
    shares = cells.figures(world, world.reference)
    assert 0 < shares["unseen mass"] < 1


def test_ensembles_by_their_formulas():
    members = np.array([[1.0, 0.0], [3.0, 0.0]])
    found = combined(members, weight=0.5)
    assert found["mean"].tolist() == [2.0, 0.0]
    assert found["worst case"].tolist() == [1.0, 0.0]
    assert found["uncertainty"].tolist() == [2.0 - 0.5 * 1.0, 0.0]


def test_a_gain_that_is_only_length_is_none_within_lengths():
    tokens, longer = np.array([4, 4, 8, 8]), np.array([8, 8, 8, 12])
    by_length = testbed.within_lengths(tokens, tokens * 1.0, longer, longer * 1.0)
    assert by_length == 0.0  # the bin of 12 has nothing to be held against
    assert testbed.within_lengths(tokens, tokens * 1.0, longer, longer + 2.0) == pytest.approx(2.0)


@pytest.mark.parametrize(("first", "second", "rate"), [("dpo", "ppo", 0.375), ("ppo", "dpo", 0.625)])
def test_a_run_is_read(tmp_path, first, second, rate):
    with pytest.raises(UserError, match="comparison has not finished"):
        testbed.read(tmp_path, 1)
    compare, ppo = tmp_path / "compare", tmp_path / "ppo"
    compare.mkdir()
    ppo.mkdir()
    policy = {"gold_reward": 1.0, "proxy_reward": 2.0, "kl": {"mean": 3.0}, "length": 9.0, "eos_rate": 1.0}
    win = {"policy": "ppo", "versus": "dpo", "judge": "gold", "win_rate": 0.6}
    report = {
        "policies": {"ppo": {**policy, "displacement": {"chosen": -1.0}}},
        "win_rates": [win, {**win, "judge": "reward_model", "win_rate": 0.9}],
        "reward_model": {"accuracy": 0.7, "ceiling": 0.8},
        "matched_kl": {"policy": first, "versus": second, "win_rate": rate, "kl": 2.0},
        "frontier": [
            {"method": "ppo", "along": "sweep", "kl": {"mean": 3.0}, "gold_reward": 1.0, "proxy_reward": 2.0}
        ],
    }
    (compare / "report.json").write_text(json.dumps(report))
    rows = [("sft", "baseline", 4, 0.0), ("sft", "pool", 4, 0.0), ("ppo", "sample", 4, 1.0), ("dpo", "sample", 8, 1.0)]
    columns = dict(zip(("policy", "role", "tokens", "reward_model"), map(list, zip(*rows, strict=True)), strict=True))
    Dataset.from_dict({**columns, "temperature": [1.0] * 4}).to_parquet(str(compare / "completions.parquet"))
    (compare / "done.json").write_text(json.dumps({"seconds": 60.0}))
    (ppo / "metrics.jsonl").write_text(json.dumps({"step": 1, "objective/kl": -1e-7}) + "\n")
    found = testbed.read(tmp_path, 5)
    assert found["seconds"] == 60.0
    figures = found["figures"]
    assert figures["ppo beats dpo"] == 0.6
    assert figures["ppo beats dpo at one kl"] == 0.625
    assert figures["ppo chosen"] == -1.0
    assert figures["first kl"] == 1e-7
    assert figures["ppo share within lengths"] == 1.0
    assert figures["ppo length gain"] == 0.0
    assert figures["dpo length gain"] == 4.0
    assert math.isnan(figures["dpo share within lengths"])
