"""From contenders and judges to the figures of the report: policies, win rates, control, frontier, matched KL."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ppo_vs_dpo.compare.estimates.length_control import length_controlled, support_of
from ppo_vs_dpo.compare.sampling.best_of_n import kl_bound
from ppo_vs_dpo.compare.sampling.contenders import PROXY, Contender, best_of_n_kl, pair_preference
from ppo_vs_dpo.compare.sampling.policies import REFERENCE
from ppo_vs_dpo.compare.statistics.intervals import mean_interval
from ppo_vs_dpo.compare.statistics.rates import wilson, win_rate_interval
from ppo_vs_dpo.compare.statistics.significance import (
    detectable_gap,
    holm,
    label_permutation_p,
    prompts_for_equality,
    sign_test,
    win_rates_with_p,
)


@dataclass(frozen=True)
class Settings:
    """How figures get their intervals.

    Attributes:
        resamples: random sign flips of the test of judges that read.
        seed: of them.
        confidence: of all intervals; 1 - confidence is the level of all tests.
        clusters: ``(P,)`` which prompts are one unit of evidence; ``None``: each one is.
    """

    resamples: int = 2000
    seed: int = 0
    confidence: float = 0.95
    clusters: np.ndarray | None = None

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the interval functions."""
        return {"confidence": self.confidence, "clusters": self.clusters}

    @property
    def both_sided(self) -> float:
        """Confidence of the interval whose two ends are one-sided tests at the level of all tests."""
        return 2 * self.confidence - 1

    def units(self, n: int) -> int:
        """How many units of evidence ``n`` prompts are."""
        return n if self.clusters is None else len(np.unique(self.clusters))

    def units_of(self, rows: np.ndarray) -> int:
        """How many units of evidence some prompts ``(P,)`` are."""
        return int(rows.sum()) if self.clusters is None else len(np.unique(self.clusters[rows]))

    def of_rows(self, rows: np.ndarray) -> "Settings":
        """The same for some of the prompts."""
        return self if self.clusters is None else replace(self, clusters=self.clusters[rows])


def describe(contender: Contender, judges: list[str], settings: Settings, bon_logprob: np.ndarray | None) -> dict:
    """The entry of one policy under ``policies``."""
    scores = {judge: contender.score(judge) for judge in judges}
    columns = [contender.length(), contender.eos_rate(), *(s for s in scores.values() if s is not None)]
    interval = mean_interval(np.stack(columns, axis=1), **settings.kwargs())
    entry: dict[str, Any] = {
        "method": contender.method,
        "point": contender.point,
        "n_prompts": len(contender.weights),
        "draws": contender.draws.shape[1],
        "gold_reward": None,
        "gold_reward_ci": None,
        "proxy_reward": None,
        "proxy_reward_ci": None,
    }
    position = 2
    for judge, values in scores.items():
        if values is None:
            continue
        prefix = {"gold": "gold_reward", PROXY: "proxy_reward"}.get(judge)
        if prefix:
            entry[prefix], entry[f"{prefix}_ci"] = float(interval.mean[position]), interval.ci(position)
        else:
            other = entry.setdefault("other_scores", {})
            other[judge] = {"mean": float(interval.mean[position]), "ci": interval.ci(position)}
        position += 1
    entry["kl"] = describe_kl(contender, settings, bon_logprob)
    entry["length"], entry["length_ci"] = float(interval.mean[0]), interval.ci(0)
    entry["eos_rate"] = float(interval.mean[1])
    # What one answer takes: best-of-n throws n - 1 of its n samples away.
    entry["tokens_per_answer"] = float((contender.n or 1) * contender.draws.tokens.mean())
    return entry


def describe_kl(contender: Contender, settings: Settings, bon_logprob: np.ndarray | None) -> dict[str, Any]:
    """KL to the reference with its interval and how it was estimated."""
    if contender.method == "best_of_n":
        if contender.base != REFERENCE and not np.isfinite(contender.draws.measures["k1"]).all():
            return {"mean": None, "ci": None, "kind": "not measured"}  # another vocabulary than the reference's
        if bon_logprob is None:
            return {"mean": kl_bound(contender.n), "ci": None, "kind": "bound", "bound": kl_bound(contender.n)}
        found = best_of_n_kl(contender, bon_logprob)
        interval = mean_interval(found["estimate"], **settings.kwargs())
        kind = "beirami" if contender.base == REFERENCE else "beirami + k1"
        # Where no draw was likely and none tied, the estimate is the bound, and an interval of no width would be a
        # claim.
        low, high = interval.ci()
        ci = [low, high] if high - low > 0.003 * interval.mean else None
        return {"mean": interval.mean, "ci": ci, "kind": kind, "bound": found["bound"]}
    if contender.kl() is None:
        return {"mean": None, "ci": None, "kind": "not measured"}
    measures = np.stack([contender.kl(name) for name in ("kl", "k1", "k3")], axis=1)
    interval = mean_interval(measures, **settings.kwargs())
    low, high = interval.ci(0)
    error = measures.std(axis=0, ddof=1) / np.sqrt(len(measures)) if len(measures) > 1 else np.full(3, np.nan)
    return {
        "mean": float(interval.mean[0]),
        "ci": [max(low, 0.0), high],  # never negative: a KL
        "kind": "exact per token",
        "standard_error": float(error[0]),
        "k1": {"mean": float(interval.mean[1]), "ci": interval.ci(1), "standard_error": float(error[1])},
        "k3": {"mean": float(interval.mean[2]), "ci": interval.ci(2), "standard_error": float(error[2])},
    }


@dataclass
class PairTable:
    """Preferences of all unordered pairs by one judge.

    Attributes:
        pairs: names ``(policy, versus)``.
        preferences: ``(P, K)``.
        ties: ``(P, K)``.
        known_difficulty: ``(P,)``, where it was computed from more pairs than this table holds.
        exact_p: ``(K,)`` of the label permutation test, NaN where draws were weighted (best-of-n); ``None`` for a
            judge that reads, whose verdicts are tested by swapping names.

    A judge that reads may leave comparisons out: these are NaN.
    """

    pairs: list[tuple[str, str]]
    preferences: np.ndarray
    ties: np.ndarray
    known_difficulty: np.ndarray | None = None
    exact_p: np.ndarray | None = None

    def of(self, policy: str, versus: str) -> np.ndarray:
        """``(P,)`` preference for ``policy`` over ``versus``, whichever way the pair is stored."""
        if (policy, versus) in self.pairs:
            return self.preferences[:, self.pairs.index((policy, versus))]
        return 1.0 - self.preferences[:, self.pairs.index((versus, policy))]

    def has(self, policy: str, versus: str) -> bool:
        """Whether the pair was judged."""
        return (policy, versus) in self.pairs or (versus, policy) in self.pairs

    def difficulty(self, policy: str, versus: str) -> np.ndarray:
        """``(P,)`` how hard a prompt is: how well the reference does there against policies *outside* of the pair.

        AlpacaEval 2 fits it to all models at once; leaving the pair out keeps its verdicts from explaining themselves.
        Standardised; 0 where no other policy was judged against the reference.
        """
        if self.known_difficulty is not None:
            return self.known_difficulty
        others = [
            self.of(REFERENCE, name)
            for name in dict.fromkeys(name for pair in self.pairs for name in pair)
            if name not in (REFERENCE, policy, versus) and self.has(REFERENCE, name)
        ]
        if not others:
            return np.zeros(len(self.preferences))
        known = np.ma.masked_invalid(np.stack(others, axis=1)).mean(axis=1).filled(0.5)
        deviation = known.std()
        return (known - known.mean()) / deviation if deviation > 0 else np.zeros(len(known))

    def complete(self) -> np.ndarray:
        """Preferences ``(P', K)`` of the prompts on which every pair was judged."""
        return self.preferences[self.whole()]

    def whole(self) -> np.ndarray:
        """``(P,)`` whether every pair was judged on the prompt."""
        return np.isfinite(self.preferences).all(axis=1)


def judge_pairs(contenders: list[Contender], judge: str) -> PairTable:
    """All unordered pairs by a scoring judge; pairs that share draws and cannot be made independent are left out."""
    pairs, preferences, ties, exact_p = [], [], [], []
    for i, ours in enumerate(contenders):
        for theirs in contenders[:i]:
            found = pair_preference(ours, theirs, judge)
            if found is not None:
                pairs.append((ours.name, theirs.name))
                preferences.append(found[0])
                ties.append(found[1])
                plain = ours.n is None and theirs.n is None
                sides = (ours.draws.scores[judge], theirs.draws.scores[judge])
                exact_p.append(label_permutation_p(*sides) if plain else np.nan)
    return PairTable(pairs, np.stack(preferences, axis=1), np.stack(ties, axis=1), exact_p=np.array(exact_p))


def win_rates(
    table: PairTable,
    judge: str,
    settings: Settings,
    lengths: dict[str, np.ndarray] | None = None,
    difficulty: bool = False,
) -> list[dict[str, Any]]:
    """Both directions of every pair: they add up to 1 exactly.

    With ``lengths`` (policy -> mean length ``(P,)``) length-controlled win rates are added; with ``difficulty``
    their model knows how hard a prompt is.
    """
    known = np.isfinite(table.preferences)
    if not known.all():
        return _partial_win_rates(table, judge, settings, lengths, difficulty)
    # Enough flips that the smallest p can pass Holm's correction.
    flips = max(5 * settings.resamples - 1, int(np.ceil(20 * len(table.pairs) / (1 - settings.confidence))))
    interval, p_values = win_rates_with_p(
        table.preferences, table.exact_p, flips=flips, seed=settings.seed, **settings.kwargs()
    )
    corrected = holm(p_values)
    # Two one-sided tests at alpha are the interval of confidence 1 - 2 alpha (Schuirmann 1987).
    inner = win_rate_interval(table.preferences, confidence=settings.both_sided, clusters=settings.clusters)
    n = len(table.preferences)
    entries = []
    for column, (policy, versus) in enumerate(table.pairs):
        preference = table.preferences[:, column]
        win_rate, (low, high) = float(interval.mean[column]), interval.ci(column)
        wilson_low, wilson_high = wilson(preference.sum(), n, settings.confidence)
        shared = {
            "judge": judge,
            "n": n,
            "units": settings.units(n),
            "decided": settings.units_of(np.abs(preference - 0.5) > 1e-12),
            "ties": float(table.ties[:, column].mean()),
            "test": _test_of(table, column),
            "within": float(max(0.5 - inner.low[column], inner.high[column] - 0.5)),
            "p": float(p_values[column]),
            "p_holm": float(corrected[column]),
            "p_sign": sign_test(preference),
        }
        entry = {
            "policy": policy,
            "versus": versus,
            "win_rate": win_rate,
            "ci": [low, high],
            "wilson": [wilson_low, wilson_high],
            "length_controlled": None,
            **shared,
        }
        if lengths is not None:
            hard = table.difficulty(policy, versus) if difficulty else None
            entry["length_support"] = support_of(lengths[policy] - lengths[versus])
            entry["length_controlled"] = _controlled(preference, lengths[policy] - lengths[versus], settings, hard)
        entries += [entry, reverse(entry)]
    return entries


def _partial_win_rates(
    table: PairTable, judge: str, settings: Settings, lengths: dict[str, np.ndarray] | None, difficulty: bool
) -> list[dict[str, Any]]:
    """Pair by pair, each on the prompts that have a verdict; corrected for all pairs together."""
    entries = []
    for column, pair in enumerate(table.pairs):
        rows = np.isfinite(table.preferences[:, column])
        alone = PairTable([pair], table.preferences[rows][:, [column]], table.ties[rows][:, [column]])
        if difficulty:
            alone.known_difficulty = table.difficulty(*pair)[rows]
        of_rows = None if lengths is None else {name: lengths[name][rows] for name in pair}
        entries += win_rates(alone, judge, settings.of_rows(rows), of_rows, difficulty)
    corrected = holm([entry["p"] for entry in entries[::2]])
    for number, entry in enumerate(entries):
        entry["p_holm"] = float(corrected[number // 2])
    return entries


def reverse(entry: dict[str, Any]) -> dict[str, Any]:
    """The same comparison seen from the other side."""

    def swap(interval: list[float]) -> list[float]:
        return [1.0 - interval[1], 1.0 - interval[0]]

    raw = entry.get("raw")
    if raw is not None:
        entry = {**entry, "raw": {**raw, "win_rate": 1.0 - raw["win_rate"], "ci": swap(raw["ci"])}}
    if "per_seed" in entry:
        entry = {**entry, "per_seed": [1.0 - rate for rate in entry["per_seed"]]}
    controlled = entry["length_controlled"]
    if controlled is not None:
        controlled = {**controlled, "win_rate": 1.0 - controlled["win_rate"], "ci": swap(controlled["ci"])}
    return {
        **entry,
        "policy": entry["versus"],
        "versus": entry["policy"],
        "win_rate": 1.0 - entry["win_rate"],
        "ci": swap(entry["ci"]),
        **({"wilson": swap(entry["wilson"])} if "wilson" in entry else {}),
        "length_controlled": controlled,
    }


def _controlled(
    preference: np.ndarray, difference: np.ndarray, settings: Settings, difficulty: np.ndarray | None = None
) -> dict[str, Any] | None:
    """The length-controlled win rate, or ``None`` where it cannot be fitted."""
    try:
        fit = length_controlled(preference, difference, difficulty, **settings.kwargs())
    except ValueError:
        return None
    found = {
        "model": "minimal" if difficulty is None else "difficulty",
        "win_rate": fit.win_rate,
        "ci": list(fit.ci),
    }
    # The size of the slope: its sign depends on which of the two stands first.
    return found if difficulty is None else {**found, "difficulty_slope": abs(fit.psi)}


def _test_of(table: PairTable, column: int) -> str:
    if table.exact_p is None:
        return "sign flip"
    return "label permutation" if np.isfinite(table.exact_p[column]) else "interval"


def power_line(
    table: PairTable,
    policy: str,
    versus: str,
    settings: Settings,
    delta: float,
    reweighted: np.ndarray | None = None,
) -> dict[str, Any]:
    """What this many prompts can show: a difference, and equality within ``delta``.

    ``reweighted`` ``(P,)``: values of `reweighted`, where the report's figure is their mean; their spread counts
    then.
    """
    preference = table.of(policy, versus) if reweighted is None else reweighted
    known = np.isfinite(preference)
    units, alpha = settings.of_rows(known).units(int(known.sum())), round(1 - settings.confidence, 12)
    deviation = float(preference[known].std(ddof=1)) if known.sum() > 1 else 0.5
    fresh = reweighted is None
    # Of fresh verdicts a deviation of 0 shows nothing about the next prompt.
    least = max(deviation, 0.5 / np.sqrt(units)) if fresh else max(deviation, 1e-9)
    return {
        "policy": policy,
        "versus": versus,
        "n": int(known.sum()),
        "units": units,
        "deviation": deviation,
        "detectable_gap": min(0.5, detectable_gap(units, least, alpha=alpha, floor=fresh)),
        "detectable_gap_single_draws": min(0.5, detectable_gap(units, alpha=alpha)) if fresh else None,
        "delta": delta,
        "prompts_for_equality": prompts_for_equality(delta, least, alpha=alpha),
        "power": 0.8,
        "alpha": alpha,
    }
