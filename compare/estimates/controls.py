"""What is known beforehand: SFT against SFT is 1/2, best-of-n by the judge it was chosen by is n/(n+1)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ppo_vs_dpo.compare.estimates.win_rates import PairTable, Settings
from ppo_vs_dpo.compare.judges.scores import preference_by_score
from ppo_vs_dpo.compare.sampling.best_of_n import own_judge_p
from ppo_vs_dpo.compare.sampling.completions import Draws
from ppo_vs_dpo.compare.sampling.contenders import PROXY, Contender, uniform
from ppo_vs_dpo.compare.sampling.policies import REFERENCE
from ppo_vs_dpo.compare.statistics.rates import rate_over
from ppo_vs_dpo.compare.statistics.significance import label_permutation_p, win_rates_with_p

# A control that fails touches every figure: all controls of a report together fail one sound report in a hundred.
CONTROL_LEVEL = 0.01


def control(
    baseline: Draws, pool: Draws | None, judge: str, settings: Settings, controls: int = 1
) -> dict[str, Any] | None:
    """SFT against SFT on independent draws: the yardstick must say "no difference", by the exact law of that null.

    All ``controls`` of a report, best-of-n's included, share `CONTROL_LEVEL`.
    """
    if pool is None or judge not in pool.scores:
        return None
    sides = (pool.scores[judge], baseline.scores[judge])
    preference, ties = preference_by_score(*sides, uniform(pool), uniform(baseline))
    exact = label_permutation_p(*sides)
    interval, _ = win_rates_with_p(preference[:, None], np.array([exact]), **settings.kwargs())
    rate = (float(interval.mean[0]), interval.ci(0))
    return null_control(judge, len(preference), *rate, float(ties.mean()), exact, controls)


def null_control(
    judge: str, n: int, win_rate: float, ci: list[float], ties: float, p: float, controls: int
) -> dict[str, Any]:
    """The entry of SFT against SFT, of one run or several; ``p`` by the exact law of the null."""
    return {
        "policy": REFERENCE,
        "versus": REFERENCE,
        "judge": judge,
        "n": n,
        "win_rate": win_rate,
        "ci": ci,
        "ties": ties,
        "contains_half": bool(ci[0] <= 0.5 <= ci[1]),
        "expected": 0.5,
        **_passed(p, controls),
    }


def _passed(p: float, controls: int) -> dict[str, Any]:
    level = CONTROL_LEVEL / controls
    return {"p": float(p), "level": level, "passed": bool(p > level)}


# Ties make best-of-n win less than n/(n+1) by its own judge; with more than this share the control is left out.
FEW_TIES = 0.01


def positive_control(
    win_rates: list[dict[str, Any]],
    tables: Sequence[PairTable],
    settings: Settings,
    draws: tuple[int, int],
    *,
    controls: int = 1,
    shared: bool = False,
    clusters: Sequence[np.ndarray | None] = (),
) -> dict[str, Any] | None:
    """Best-of-n against SFT by the judge it was chosen by wins n/(n+1), exactly: a known difference must be seen.

    Of n + 1 independent draws of SFT the best is equally likely to be each. The largest n over the reference is taken.
    p is of the exact law (`own_judge_p`): all draws are independent given their prompts, those of several runs too.

    ``draws``: of the reference a prompt, in the pool and in the baseline; the others as in `control` and `spread`.
    """
    own = [e for e in win_rates if e["judge"] == PROXY and e["versus"] == REFERENCE]
    own = [e for e in own if e["policy"].removeprefix("best_of_").isdigit() and e["ties"] <= FEW_TIES]
    if not own:
        return None
    entry = max(own, key=lambda e: int(e["policy"].removeprefix("best_of_")))
    n = int(entry["policy"].removeprefix("best_of_"))
    groups = [table.of(entry["policy"], REFERENCE) for table in tables]
    if n == 1 or min(map(len, groups)) < 3:
        return None
    expected, together = n / (n + 1), np.concatenate(groups)
    interval, _, _ = rate_over(groups, confidence=settings.confidence, shared=shared, clusters=clusters)
    low, high = interval.ci()
    # A tie is half a win here; what it would be, were it decided, is anything up to a whole one.
    seen = float(np.clip(expected, together.mean(), together.mean() + entry["ties"] / 2))
    p = float(own_judge_p(seen, n, *draws, len(together)))
    kept = {key: entry[key] for key in ("policy", "versus", "judge", "n", "ties")}
    about = {"win_rate": interval.mean, "ci": [low, high], "contains_half": low <= 0.5 <= high, "expected": expected}
    about |= {"per_seed": [float(group.mean()) for group in groups]} if len(groups) > 1 else {}
    return {**kept, **about, **_passed(p, controls)}


def controls_of(judges: Sequence[str], contenders: Sequence[Contender]) -> int:
    """How many controls a report has at most: SFT against SFT by each judge that scores, and best-of-n by its own."""
    return len(judges) + (PROXY in judges and any(c.n is not None and c.base == REFERENCE for c in contenders))
