"""What is known beforehand, and best-of-n's KL where completions tie."""

import numpy as np
import pytest

from ppo_vs_dpo.compare.estimates.controls import control, positive_control
from ppo_vs_dpo.compare.estimates.win_rates import PairTable, Settings, describe_kl
from ppo_vs_dpo.compare.judges.scores import preference_by_score
from ppo_vs_dpo.compare.sampling.best_of_n import kl_bound
from ppo_vs_dpo.compare.sampling.completions import Draws
from ppo_vs_dpo.compare.sampling.contenders import PROXY, best_of, uniform


def draws(scores, role="baseline", judge="gold"):
    """The reference's draws with these scores ``(P, D)``."""
    ones = np.ones(scores.shape)
    return Draws("sft", role, 1.0, [], [], ones, ones, {"logprob": -20 * ones, "k1": 0 * ones}, {judge: scores})


def test_sft_against_sft_fails_where_it_should_and_not_elsewhere():
    rng, failed = np.random.default_rng(0), 0
    for _ in range(300):
        found = control(draws(rng.random((29, 4))), draws(rng.random((29, 4)), "pool"), "gold", Settings())
        failed += not found["passed"]
    assert failed / 300 <= 0.03  # 1 in 100
    skewed = control(draws(rng.random((64, 4))), draws(rng.random((64, 4)) + 0.35, "pool"), "gold", Settings())
    assert not skewed["passed"]
    assert skewed["level"] == 0.01
    # Two judges share the level.
    assert (
        control(draws(rng.random((8, 2))), draws(rng.random((8, 2)), "pool"), "gold", Settings(), 2)["level"] == 0.005
    )
    assert control(draws(rng.random((8, 2))), None, "gold", Settings()) is None


@pytest.mark.parametrize("bent", [False, True])
def test_best_of_n_wins_what_is_known(bent):
    """n/(n+1) by its own judge; a baseline that is not the law best-of-n selects from is seen."""
    rng = np.random.default_rng(1)
    pool, base = draws(rng.random((200, 20)), "pool", PROXY), draws(rng.random((200, 4)), judge=PROXY)
    if bent:
        base.scores[PROXY] = base.scores[PROXY] ** 0.7
    best = best_of(pool, 4)
    preference, ties = preference_by_score(pool.scores[PROXY], base.scores[PROXY], best.weights, uniform(base))
    table = PairTable([("best_of_4", "sft")], preference[:, None], ties[:, None])
    about = {"policy": "best_of_4", "versus": "sft", "judge": PROXY, "n": 200}
    entry = {**about, "win_rate": float(preference.mean()), "ties": float(ties.mean())}
    found = positive_control([entry], [table], Settings(), (20, 4))
    assert found["expected"] == pytest.approx(0.8)
    assert found["passed"] != bent
    # With ties it must win less than that, and is left out.
    assert positive_control([{**entry, "ties": 0.2}], [table], Settings(), (20, 4)) is None


def test_kl_of_best_of_n_where_completions_tie():
    """Three levels of reward: among equals best-of-n chooses as SFT does, and its KL is that between the levels."""
    rng = np.random.default_rng(2)
    levels, law, n = np.arange(3), np.array([0.5, 0.3, 0.2]), 4
    pool = draws(rng.choice(levels, p=law, size=(2000, 20)).astype(float), "pool", PROXY)
    best = np.diff(np.r_[0.0, np.cumsum(law) ** n])
    exact = float((best * np.log(best / law)).sum())
    found = describe_kl(best_of(pool, n), Settings(), np.full(2000, -20.0))
    assert exact < found["mean"] < exact + 0.6 * (kl_bound(n) - exact)
    assert found["ci"] is not None
    # Nothing ties and nothing was likely: the estimate is the bound, and no interval of no width is shown.
    plain = describe_kl(best_of(draws(rng.random((50, 20)), "pool", PROXY), n), Settings(), np.full(50, -60.0))
    assert (plain["mean"], plain["ci"]) == (pytest.approx(kl_bound(n), abs=1e-9), None)
