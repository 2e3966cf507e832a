"""Judges asked again: how often they contradict themselves, and win rates without that noise."""

import numpy as np
import pytest

from ppo_vs_dpo.compare.estimates.judgements import table_of
from ppo_vs_dpo.compare.judges.noise import add_corrections, corrected, flip_rate, repeated, rogan_gladen
from ppo_vs_dpo.compare.judges.noise import self_disagreement as disagreement
from ppo_vs_dpo.compare.sampling.policies import Prompts
from ppo_vs_dpo.preferences.judging.llm import Judgement
from tests.compare.server import comparisons, judge_at, prefers_longer

HOW = {"confidence": 0.95}


def judgements(verdicts):
    """``(P, 2, R)`` preferences of one pair, by prompt, order and repeat."""
    return [
        Judgement("j", "ppo", "dpo", f"id{p}", order, None if np.isnan(value) else float(value), "", 1, repeat)
        for p, orders in enumerate(verdicts)
        for order, values in zip(("forward", "swapped"), orders, strict=True)
        for repeat, value in enumerate(values)
    ]


def noisy(rng, theta, e, n, repeats=2):
    """True winners by ``theta``, each verdict flipped with probability ``e``."""
    truth = rng.random(n) < theta
    flips = rng.random((n, 2, repeats)) < e
    return (truth[:, None, None] ^ flips).astype(float)


def test_closed_forms():
    assert rogan_gladen(0.62, 0.8, 0.8) == pytest.approx((0.62 - 0.2) / 0.6)
    assert rogan_gladen(0.5, 0.9, 0.7) == pytest.approx((0.5 + 0.7 - 1) / 0.6)
    with pytest.raises(ValueError, match="say nothing"):
        rogan_gladen(0.5, 0.4, 0.6)
    for e in (0.0, 0.05, 0.2, 0.45):
        assert flip_rate(2 * e * (1 - e)) == pytest.approx(e)
    assert np.isnan(flip_rate(0.5))


def test_by_hand():
    """Two prompts: one verdict of four differs on the first, none on the second."""
    verdicts = np.array([[[1, 0], [1, 1]], [[0, 0], [0, 0]]], dtype=float)
    one = repeated(judgements(verdicts))["ppo", "dpo"]
    assert one.preference.tolist() == [0.75, 0.0]
    assert one.differ.tolist() == [0.5, 0.0]
    found = disagreement(judgements(verdicts), 2)
    assert (found["n"], found["rate"]) == (2, 0.25)
    assert found["flip_rate"] == pytest.approx((1 - np.sqrt(0.5)) / 2)
    assert disagreement(judgements(verdicts), 1) is None
    # A tie against a win is half as far as a loss against a win, and as much a contradiction.
    ties = np.array([[[1, 0.5], [1, 1]]])
    assert repeated(judgements(ties))["ppo", "dpo"].squared.tolist() == [0.125]
    assert repeated(judgements(ties))["ppo", "dpo"].differ.tolist() == [0.5]
    # A preference that was weighted by probabilities is the verdict that it leans to.
    assert repeated(judgements(np.array([[[0.9, 0.6], [0.7, 0.8]]])))["ppo", "dpo"].differ.tolist() == [0.0]
    # What was answered once in each order, or in one order only, tells nothing.
    assert repeated(judgements(np.array([[[1, np.nan], [1, np.nan]]]))) == {}
    assert repeated(judgements(np.array([[[1, 0], [np.nan, np.nan]]]))) == {}
    assert disagreement(judgements(np.array([[[1, np.nan], [1, np.nan]]])), 2)["rate"] is None


@pytest.mark.parametrize(("theta", "e"), [(0.7, 0.1), (0.3, 0.25), (0.5, 0.2), (0.9, 0.15)])
def test_what_was_injected_comes_back(theta, e):
    covered, means, naive = 0, [], []
    for trial in range(25):
        verdicts = noisy(np.random.default_rng([trial, 1]), theta, e, 250)
        one = repeated(judgements(verdicts))["ppo", "dpo"]
        found = corrected([one], **HOW)
        covered += found["ci"][0] <= theta <= found["ci"][1]
        means.append(found["win_rate"])
        naive.append(verdicts.mean())
    assert np.mean(means) == pytest.approx(theta, abs=0.025)
    assert np.mean(naive) == pytest.approx(theta * (1 - e) + (1 - theta) * e, abs=0.025)
    assert covered >= 21


def test_a_coin_is_refused():
    rng = np.random.default_rng(0)
    one = repeated(judgements(rng.integers(0, 2, (200, 2, 2)).astype(float)))["ppo", "dpo"]
    assert "coin" in corrected([one], **HOW)["refused"]


def test_a_judge_without_noise_is_left_as_it_is():
    verdicts = noisy(np.random.default_rng(3), 0.6, 0.0, 100)
    found = corrected([repeated(judgements(verdicts))["ppo", "dpo"]], **HOW)
    assert found["win_rate"] == pytest.approx(verdicts.mean())
    assert found["flip_rate"] == 0.0


def test_prompts_of_one_unit_are_drawn_together():
    """Every prompt four times over is the same evidence: the interval must not shrink."""
    verdicts = noisy(np.random.default_rng(5), 0.6, 0.1, 60)
    alone = corrected([repeated(judgements(verdicts))["ppo", "dpo"]], **HOW)
    four = repeated(judgements(np.repeat(verdicts, 4, axis=0)))["ppo", "dpo"]
    together = corrected([four], **HOW, clusters=[np.repeat(np.arange(60), 4)])
    assert together["ci"] == pytest.approx(alone["ci"])
    apart = corrected([four], **HOW)
    assert apart["ci"][1] - apart["ci"][0] < 0.7 * (alone["ci"][1] - alone["ci"][0])


def test_both_directions_add_up():
    entries = [
        {"policy": "ppo", "versus": "dpo", "judge": "j"},
        {"policy": "dpo", "versus": "ppo", "judge": "j"},
        {"policy": "ppo", "versus": "dpo", "judge": "other"},
    ]
    made = judgements(noisy(np.random.default_rng(4), 0.7, 0.2, 200))
    forward, back, other = add_corrections(entries, "j", [made], **HOW)
    assert forward["noise_corrected"]["win_rate"] + back["noise_corrected"]["win_rate"] == pytest.approx(1.0)
    assert forward["noise_corrected"]["ci"][0] + back["noise_corrected"]["ci"][1] == pytest.approx(1.0)
    assert "noise_corrected" not in other


def test_several_runs_are_corrected_together():
    """One figure over seeds and prompts; prompts that runs share are paired by their id, those of one run left out."""
    rng = np.random.default_rng(6)
    verdicts = [noisy(rng, 0.7, 0.15, 120) for _ in range(3)]
    runs = [judgements(one) for one in verdicts]
    runs[1] = [one for one in runs[1] if one.prompt_id != "id7"][::-1]
    single = [corrected([repeated(run)["ppo", "dpo"]], **HOW) for run in runs]
    entries = [{"policy": "dpo", "versus": "ppo", "judge": "j"}]
    (found,) = add_corrections(entries, "j", runs, **HOW, shared=True)
    found = found["noise_corrected"]
    assert found["n"] == 119
    assert found["win_rate"] == pytest.approx(1 - np.mean([one["win_rate"] for one in single]), abs=0.01)
    assert found["flip_rate"] == pytest.approx(np.mean([one["flip_rate"] for one in single]), abs=0.01)
    assert found["ci"][0] < found["win_rate"] < found["ci"][1]
    (own,) = add_corrections(entries, "j", runs, **HOW)
    assert own["noise_corrected"]["n"] == 359
    # A run in which the judge is a coin: nothing is said of all.
    coin = judgements(rng.integers(0, 2, (120, 2, 2)).astype(float))
    assert "coin" in corrected([repeated(run)["ppo", "dpo"] for run in (runs[0], coin)], **HOW)["refused"]


def test_each_repeat_is_asked_and_kept(serve, tmp_path):
    from ppo_vs_dpo.preferences.judging.cache import Cache

    def wavers(question, number):
        first = server.requests[-1]["seed"] < 1000
        return prefers_longer(question) if first or "Question 0?" not in question else "B"

    server = serve(wavers)
    judge = judge_at(server, Cache(tmp_path / "c.jsonl"), repeats=2, concurrency=1, logprobs=False)
    assert judge.estimate(comparisons(3))["requests"] == 12
    found, _ = judge.judge(comparisons(3))
    assert [one.repeat for one in found[:4]] == [0, 1, 0, 1]
    assert {r["seed"] for r in server.requests} == {0, 1000}
    # Question 0: forward A then B, swapped B then B.
    assert [one.preference for one in found[:4]] == [1.0, 0.0, 1.0, 1.0]
    again = disagreement(found, 2)
    assert again["rate"] == pytest.approx(0.5 / 3)
    table, figures = table_of(found, Prompts([""] * 3, [f"id{i}" for i in range(3)]))
    assert table.preferences[:, 0].tolist() == [0.75, 1.0, 1.0]
    assert figures["judged"] == 3
    # One more time costs one more time.
    more = judge_at(server, Cache(tmp_path / "c.jsonl"), repeats=3, concurrency=1, logprobs=False)
    assert more.estimate(comparisons(3))["requests"] == 6
