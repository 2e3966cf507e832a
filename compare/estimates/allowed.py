"""What the measured KLs say about win rates: how far from 1/2 they can be, and, near the reference, what they are.

`compare.statistics.kl_allows` has the bounds, `reweighted` the estimate.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ppo_vs_dpo.compare.config import CompareStage
from ppo_vs_dpo.compare.estimates.reweighted import reweighted
from ppo_vs_dpo.compare.estimates.win_rates import Settings, reverse
from ppo_vs_dpo.compare.sampling.completions import Draws
from ppo_vs_dpo.compare.sampling.contenders import Contender
from ppo_vs_dpo.compare.sampling.policies import REFERENCE
from ppo_vs_dpo.compare.statistics.intervals import Spread, spread
from ppo_vs_dpo.compare.statistics.kl_allows import Allowed, best_of_n, best_of_n_against, phi, via_reference

# Two-sided: each upper end is above its KL in 99.5 of 100 comparisons, the smaller one of two bounds in 99.
KL_CONFIDENCE = 0.99

# Nats between two policies up to which k3 is trusted with its own upper end: beyond, its few large terms are missing
# from most samples, and the mean log-ratio must agree.
K3_RELIABLE = 0.5

# A bound further from 1/2 than this says nothing.
IDLE = 0.4995


def sampled_as_measured(settings: CompareStage) -> bool:
    """Whether completions come from the law whose KL was measured: top-k and top-p draw from another one."""
    return settings.top_k == 0 and settings.top_p >= 1


def allowed(
    ours: Sequence[Contender],
    theirs: Sequence[Contender],
    shared: bool = False,
    clusters: Sequence[np.ndarray | None] = (),
) -> Allowed | None:
    """What the KLs allow the win rate of one policy over another; ``None`` where no bound is known.

    Args:
        ours: a policy, one a run.
        theirs: the other one, likewise; each run against its own reference. The bound is on the mean over runs (phi is
            concave).
    """
    one, other = ours[0], theirs[0]
    if one.name == REFERENCE:
        one, other, ours, theirs = other, one, theirs, ours
    if one.name == REFERENCE or min(len(np.unique(_units(c, i, clusters))) for i, c in enumerate(ours)) < 3:
        return None

    def over(values: list[np.ndarray]) -> Spread:
        return spread([v[:, None] for v in values], shared=shared, clusters=clusters)

    def ends(values: list[np.ndarray]) -> tuple[float, float]:
        """Mean and upper end of a mean KL."""
        mean, upper = _upper(over(values))
        return float(mean[0]), float(upper[0])

    def kl(policy: Sequence[Contender]) -> tuple[float, float] | None:
        values = [c.kl() for c in policy]
        return None if any(v is None for v in values) else ends(values)

    if one.n is not None or other.n is not None:
        if one.n is None:
            one, other, ours, theirs = other, one, theirs, ours
        if one.base != REFERENCE or other.n is not None:
            return None
        if other.name == REFERENCE:
            return Allowed(best_of_n(one.n), best_of_n(one.n), "best-of-n")
        far = kl(theirs)
        if far is None:
            return None
        return Allowed(best_of_n_against(one.n, far[0]), best_of_n_against(one.n, far[1]), "best-of-n and KL")
    found = kl(ours)
    if found is None:
        return None
    if other.name == REFERENCE:
        return Allowed(phi(found[0]), phi(found[1]), "KL to SFT")
    second = kl(theirs)
    if second is None:
        return None
    bounds = [Allowed(via_reference(found[0], second[0]), via_reference(found[1], second[1]), "KLs to SFT")]
    for policy, against in ((ours, theirs), (theirs, ours)):
        direct = [_direct(a, b) for a, b in zip(policy, against, strict=True)]
        if all(values is not None for values in direct):
            mean, upper = upper_of_direct(*(over([values[column] for values in direct]) for column in (0, 1)))
            bounds.append(Allowed(phi(float(mean[0])), phi(float(upper[0])), "KL between them"))
            break
    return min(bounds, key=lambda bound: bound.at_most)


def _upper(found: Spread) -> tuple[np.ndarray, np.ndarray]:
    """Means and upper ends ``(K,)`` of mean KLs, none below 0."""
    mean = np.maximum(found.mean, 0.0)
    return mean, np.maximum(found.interval(KL_CONFIDENCE).high, mean)


def upper_of_direct(k1: Spread, k3: Spread) -> tuple[np.ndarray, np.ndarray]:
    """Means and upper ends ``(K,)`` of the KL between two policies from two estimates of it; see `K3_RELIABLE`."""
    (mean_one, upper_one), (mean_three, upper_three) = _upper(k1), _upper(k3)
    near = np.maximum(mean_one, mean_three) <= K3_RELIABLE
    mean = np.where(near, mean_three, np.maximum(mean_one, mean_three))
    return mean, np.where(near, upper_three, np.maximum(upper_one, upper_three))


def _units(contender: Contender, number: int, clusters: Sequence[np.ndarray | None]) -> np.ndarray:
    labels = clusters[number] if clusters else None
    return np.arange(len(contender.weights)) if labels is None else labels


def _direct(policy: Contender, against: Contender) -> tuple[np.ndarray, np.ndarray] | None:
    """KL of a policy to another one on its own draws, ``(P,)`` twice: the mean log-ratio (k1), and k3, which is never
    negative and of low variance where the KL is small.
    """
    if against.name not in policy.draws.under:
        return None
    ratio = policy.draws.measures["logprob"] - policy.draws.under[against.name]
    if not np.isfinite(ratio).all() or np.abs(ratio).max() > 50:
        return None
    return policy.per_prompt(ratio), policy.per_prompt(np.expm1(-ratio) + ratio)


def use_kl(
    entries: list[dict[str, Any]],
    of: Callable[[str], list[Contender]],
    own: Sequence[Sequence[Draws]],
    settings: Settings,
    shared: bool = False,
    clusters: Sequence[np.ndarray | None] = (),
) -> list[dict[str, Any]]:
    """Win rates with what KL says about them; both directions of every pair, in the order given.

    Near the reference the reweighted estimate is the figure, and the one from fresh draws stands beside it as ``raw``.
    Every interval is cut to what the KLs allow, and so is its estimate (the most likely rate that is possible; what
    was seen is then ``raw``); one that lies wholly outside is left as it is and marked (``outside``).

    ``entries`` has each pair's two directions one after the other, ``own`` of each run all draws of its reference.
    """
    found = []
    for entry in entries[::2]:
        ours, theirs = of(entry["policy"]), of(entry["versus"])
        changed = dict(entry)
        values = [reweighted(a, b, draws, entry["judge"]) for a, b, draws in zip(ours, theirs, own, strict=True)]
        if all(one is not None for one in values):
            estimate = spread([v[:, None] for v in values], shared=shared, clusters=clusters, outward=True)
            changed |= _figures(estimate, settings)
            changed["raw"] = {key: entry[key] for key in ("win_rate", "ci", "p", "test")}
            if len(values) > 1:
                changed["per_seed"] = [float(one.mean()) for one in values]
        bound = allowed(ours, theirs, shared, clusters) if _whole(entry, ours) else None
        if bound is not None and bound.at_most < IDLE:
            changed["ci"], outside = bound.cut(changed["ci"])
            changed["allowed"] = {"distance": bound.distance, "at_most": bound.at_most, "via": bound.via}
            changed["allowed"]["outside"] = outside
            if not outside:
                changed["within"] = min(changed["within"], bound.at_most)
                seen, most = changed["win_rate"], bound.at_most
                changed["win_rate"] = float(np.clip(seen, 0.5 - most, 0.5 + most))
                if abs(changed["win_rate"] - seen) > 1e-12 and "raw" not in changed:
                    changed["raw"] = {key: entry[key] for key in ("win_rate", "ci", "p", "test")}
        found += [changed, reverse(changed)]
    return found


def _whole(entry: dict[str, Any], ours: Sequence[Contender]) -> bool:
    """Whether every prompt was judged: a judge that leaves comparisons out chooses by what was said."""
    prompts = len(ours[0].weights)
    return entry["n"] in (prompts, sum(len(one.weights) for one in ours))


def _figures(found: Any, settings: Settings) -> dict[str, Any]:
    interval, inner = (found.interval(c, (0.0, 1.0)) for c in (settings.confidence, settings.both_sided))
    return {
        "win_rate": float(np.clip(interval.mean[0], 0.0, 1.0)),
        "ci": interval.ci(0),
        "p": float(found.p_value(0.5)[0]),
        "test": "reweighted",
        "within": float(max(0.5 - inner.low[0], inner.high[0] - 0.5)),
    }
