"""The figures of one model's annotations, under AlpacaEval's names, and what it does not give: tests and power."""

from typing import Any

import numpy as np

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.compare.estimates.annotations.reading import lengths_of, shares_of
from ppo_vs_dpo.compare.estimates.length_control import length_controlled, support_of
from ppo_vs_dpo.compare.statistics.leaderboard import GAMED_FILE, Leaderboard, fit_leaderboard
from ppo_vs_dpo.compare.statistics.rates import wilson
from ppo_vs_dpo.compare.statistics.significance import detectable_gap, sign_test, win_rates_with_p


def chosen_first(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How often the judge chose what was shown first, where the rows say what that was: 1/2 without a bias."""
    known = [row for row in rows if row.get("shown_first") in (1, 2) and row.get("preference") in (1.0, 2.0)]
    if not known:
        return {}
    wins = sum(row["preference"] == row["shown_first"] for row in known)
    low, high = wilson(wins, len(known))
    return {"chosen_first": 100 * wins / len(known), "chosen_first_wilson": [100 * low, 100 * high]}


def statistics_of(
    rows: list[dict[str, Any]],
    where: str = "",
    difficulty: dict[str, float] | None = None,
    leaderboard: Leaderboard | None = None,
    numbers: dict[str, int] | None = None,
) -> dict[str, Any]:
    """AlpacaEval's figures under its names (percent), and what it does not give: intervals, tests, power.

    ``win_rate`` is the mean of preference - 1, ``standard_error`` its standard error, a win is a preference above
    1.5, a draw one of exactly 1.5 or 0, and ``discrete_win_rate`` rounds every preference to a win, a loss or a draw.
    ``length_controlled_minimal_win_rate`` is of the minimal model (intercept and length), which can be fitted to these
    rows alone; ``length_controlled_win_rate`` is the leaderboard's, of its full model. ``length_support`` is the
    share of rows on the thinner side of equal length.

    Args:
        difficulty: instruction -> how hard it is, from other models' files, for a third term in the minimal model.
        leaderboard: what the leaderboard's full model needs (`compare.statistics.leaderboard`).
        numbers: instruction -> its number in the evaluation set; by default rows stand in that order.
    """
    shares = shares_of(rows)
    usable = np.isfinite(shares)
    if not usable.any():
        raise UserError(f"{where}: none of {len(rows)} annotations has a preference.")
    preference = shares[usable]
    draws = preference == 0.5
    n = len(preference)
    discrete = (1 + np.sign(preference - 0.5)) / 2
    interval, p = win_rates_with_p(preference[:, None])
    low, high = wilson(discrete.sum(), n)
    result: dict[str, Any] = {
        "win_rate": float(preference.mean() * 100),
        "standard_error": float(preference.std(ddof=1) / np.sqrt(n) * 100) if n > 1 else None,
        "n_wins": int((preference > 0.5).sum()),
        "n_wins_base": int((preference < 0.5).sum()),
        "n_draws": int(draws.sum()),
        "n_total": n,
        "discrete_win_rate": float(discrete.mean() * 100),
        "n_without_preference": int((~usable).sum()),
        "win_rate_ci": [100 * x for x in interval.ci(0)],
        "discrete_win_rate_wilson": [100 * low, 100 * high],
        "p_permutation": float(p[0]),
        "p_sign": sign_test(preference),
        "detectable_gap": 100 * detectable_gap(n, float(preference.std(ddof=1)) if n > 1 else 0.5),
    }
    kept = [row for row, use in zip(rows, usable, strict=True) if use]
    result |= chosen_first(kept)
    lengths, known = lengths_of(kept)
    result["length_controlled_win_rate"] = None
    if not known.any():
        note = "no annotation has both outputs, so lengths are not known"
        return {**result, "length_controlled_minimal_win_rate": None, "length_controlled_note": note}
    result["avg_length"], result["avg_length_base"] = float(lengths[:, 1].mean()), float(lengths[:, 0].mean())
    if not known.all():
        result["n_without_length"] = int((~known).sum())
    difference = lengths[:, 1] - lengths[:, 0]
    result |= length_figures(preference[known], difference)
    if difficulty is not None:
        hard = np.array([difficulty.get(str(row.get("instruction")), 0.0) for row in kept])[known]
        with_it = length_figures(preference[known], difference, hard)
        result["length_controlled_difficulty_win_rate"] = with_it["length_controlled_minimal_win_rate"]
    if leaderboard is not None:
        result |= leaderboard_figures(rows, where, leaderboard, numbers)
    return result


def leaderboard_figures(
    rows: list[dict[str, Any]], where: str, leaderboard: Leaderboard, numbers: dict[str, int] | None
) -> dict[str, Any]:
    """The leaderboard's own length-controlled win rate in percent (`compare.statistics.leaderboard.fit_leaderboard`).

    Raises:
        UserError: an instruction whose difficulty is not known.
    """
    lengths, known = lengths_of(rows)
    n = len(leaderboard.difficulty)
    if numbers is None and len(rows) != n:
        raise UserError(
            f"{where}: {len(rows)} annotations, and the leaderboard's difficulties are of {n} instructions: which row "
            f"is which is not known. Give a file with all {n} of them beside it (any model's)."
        )
    found = range(len(rows)) if numbers is None else [numbers.get(str(row.get("instruction")), -1) for row in rows]
    unknown = [row for row, number in enumerate(found) if number not in leaderboard.difficulty]
    if unknown:
        raise UserError(
            f"{where}, entry {unknown[0]}: no difficulty is known of its instruction ({len(unknown)} such entries). "
            f"The leaderboard's model is for AlpacaEval's own instructions."
        )
    hard = np.array([leaderboard.difficulty[number] for number in found])[known]
    try:
        fit = fit_leaderboard(shares_of(rows)[known], lengths[:, 0] - lengths[:, 1], hard, leaderboard.gamed)
    except ValueError as error:
        return {"length_controlled_note": str(error)}
    note = (
        None
        if leaderboard.gamed is not None
        else f"without {GAMED_FILE}, which regularises the leaderboard's fit: not its figure"
    )
    return {
        "length_controlled_win_rate": 100 * fit.win_rate if leaderboard.gamed is not None else None,
        "length_controlled_unregularised_win_rate": 100 * fit.win_rate if leaderboard.gamed is None else None,
        "length_controlled_standard_error": 100 * fit.standard_error,
        "length_controlled_model": {"theta": fit.theta, "phi": fit.phi, "psi": fit.psi, "C": fit.strength},
        **({"length_controlled_note": note} if note else {}),
    }


def length_figures(
    preference: np.ndarray, difference: np.ndarray, difficulty: np.ndarray | None = None
) -> dict[str, Any]:
    """The minimal model's length-controlled win rate in percent, or why there is none; and how far it extrapolates."""
    support = {"length_support": support_of(difference)}
    how = {"regularised": len(preference) >= 50, "extrapolate": True}
    try:
        fit = length_controlled(preference, difference, difficulty, **how)
    except ValueError as error:
        return {**support, "length_controlled_minimal_win_rate": None, "length_controlled_minimal_note": str(error)}
    note = {"length_controlled_minimal_note": f"extrapolation: {fit.extrapolates}"} if fit.extrapolates else {}
    return {
        **support,
        "length_controlled_minimal_win_rate": 100 * fit.win_rate,
        "length_controlled_minimal_ci": [100 * x for x in fit.ci],
        "length_controlled_minimal_extrapolates": fit.extrapolates is not None,
        "length_bias": fit.phi,
        **note,
    }


def difficulties(models: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Model -> instruction -> how well the baseline does there against the *other* models, standardised.

    AlpacaEval 2 fits one difficulty an instruction to all models of its leaderboard; here it is taken from the files
    that were given, without the model itself, so that no verdict explains itself.

    Raises:
        UserError: no two models were judged on one instruction.
    """
    of_model: dict[str, dict[str, float]] = {}
    for name, rows in models.items():
        of_model[name] = {
            str(row.get("instruction")): 1 - float(share)
            for row, share in zip(rows, shares_of(rows), strict=True)
            if np.isfinite(share)
        }
    found = {}
    for name in of_model:
        sums: dict[str, list[float]] = {}
        for other, values in of_model.items():
            if other != name:
                for instruction, value in values.items():
                    sums.setdefault(instruction, []).append(value)
        shared = {i: float(np.mean(sums[i])) for i in of_model[name] if i in sums}
        if not shared:
            raise UserError(f"--difficulty: no other model was judged on the instructions of {name}.")
        middle, spread = np.mean(list(shared.values())), np.std(list(shared.values()))
        found[name] = {i: float((value - middle) / spread) if spread > 0 else 0.0 for i, value in shared.items()}
    return found
