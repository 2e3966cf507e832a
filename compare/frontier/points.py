"""The reward-KL frontier of a report: the points of every method, and two methods at matched KL."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ppo_vs_dpo.compare.config import METHODS
from ppo_vs_dpo.compare.estimates.win_rates import PairTable, Settings, reverse
from ppo_vs_dpo.compare.frontier.matched import Mixture, curve, matched_values, neighbours
from ppo_vs_dpo.compare.frontier.overoptimised import over_optimised
from ppo_vs_dpo.compare.sampling.contenders import PROXY, Contender
from ppo_vs_dpo.compare.statistics.intervals import Spread, spread
from ppo_vs_dpo.compare.statistics.rates import rate_over

# KLs that are shown to differ by less than this share of their mean are the same for a comparison at one KL.
ALIKE = 0.1
# Nats below which a policy is where it began: no judge tells it from the reference on more than 1 of 100 prompts
# (Pinsker: sqrt(KL / 2)), and of two such policies the one with less KL is a matter of rounding.
STILL = 1e-4


@dataclass(frozen=True)
class Compared:
    """What one run has to say about its frontier.

    Attributes:
        contenders: its policies.
        checkpoints: points of the frontier only: along training, and settings that were not chosen.
        table: preferences of the main judge, or ``None``.
        clusters: of its prompts.
    """

    contenders: list[Contender]
    checkpoints: list[Contender] = field(default_factory=list)
    table: PairTable | None = None
    clusters: np.ndarray | None = None

    @property
    def settings(self) -> list[Contender]:
        """All points that differ in a setting, not in how long they were trained."""
        return [*self.contenders, *(one for one in self.checkpoints if "step" not in one.point)]

    def __getitem__(self, name: str) -> Contender:
        return next(one for one in [*self.contenders, *self.checkpoints] if one.name == name)

    def has(self, name: str) -> bool:
        """Whether there is a policy or checkpoint of this name whose KL was measured."""
        return any(one.name == name and one.kl() is not None for one in [*self.contenders, *self.checkpoints])


def matched_kl(
    runs: list[Compared],
    a: str,
    b: str,
    settings: Settings,
    shared: bool = False,
    entry: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Two methods at one KL, or what can be said without: of one run, or of several.

    Args:
        runs: each with the table of the main judge.
        entry: the win rate of ``a`` over ``b`` that the report shows: where the two are compared as they are, that is
            the figure. ``None``: it is worked out here.

    Returns:
        ``kind`` ``matched`` (the farther method's mixture has the nearer one's KL; each run at its own, ``kl`` is
        their mean and ``points`` the first run's), ``equal`` (the two KLs are shown to differ by less than `ALIKE`:
        they are compared as they are) or ``one-sided`` (in so many runs ``without`` a point of the farther method's
        sweep at or below the nearer KL: they are compared as they are, and where the KLs are shown to differ,
        ``kl_apart``, a win of the nearer one is a win with less KL); or ``{"refused": reason}``.
    """
    about = {"policy": a, "versus": b}
    if not all(run.has(a) and run.has(b) for run in runs):
        return {**about, "refused": "the KL of one of them was not measured"}
    if not all(run.table is not None and run.table.has(a, b) for run in runs):
        return {**about, "refused": "no judge compared PPO with DPO"}
    if not all(np.isfinite(run.table.of(a, b)).all() for run in runs):
        return {**about, "refused": "the judge did not judge every prompt"}
    if any(len(run[a].weights) < 3 for run in runs):
        return {**about, "refused": "there are fewer than three prompts"}

    def over(values: Callable[[Compared], np.ndarray]) -> Spread:
        groups, labels = [values(run)[:, None] for run in runs], [run.clusters for run in runs]
        return spread(groups, shared=shared, clusters=labels, by_skewness=False)

    def as_they_are(one: str, other: str) -> dict[str, Any]:
        if entry is None:
            groups = [run.table.of(one, other) for run in runs]
            return _figures(groups, settings, runs, shared)
        turned = entry if entry["policy"] == one else reverse(entry)
        return {**{key: turned[key] for key in ("win_rate", "ci", "p")}, "points": {}, "runs": len(runs)}

    kls = {name: float(np.mean([run[name].kl().mean() for run in runs])) for name in (a, b)}
    if max(kls.values()) < STILL:
        return {**about, "refused": f"neither has moved, both lie within {STILL} nats of where they began"}
    difference = over(lambda run: run[a].kl() - run[b].kl())
    apart = difference.interval(settings.confidence)
    # Shown to be alike (two one-sided tests), which is more than not shown to differ.
    inner, alike = difference.interval(settings.both_sided), ALIKE * float(np.mean(list(kls.values())))
    if -alike <= inner.low[0] and inner.high[0] <= alike:
        figures = as_they_are(a, b)
        return {**about, "kind": "equal", "kl": float(np.mean(list(kls.values()))), **figures}
    near, far = (a, b) if kls[a] < kls[b] else (b, a)
    # Of several runs each at its own lower KL: a seed may turn round which of the two that is.
    ends = [(a, b) if run[a].kl().mean() < run[b].kl().mean() else (b, a) for run in runs]
    sides = [_sides(run, *pair) for run, pair in zip(runs, ends, strict=True)]
    if not all(sides):
        about = {"policy": near, "versus": far, "kl_apart": bool(apart.low[0] > 0 or apart.high[0] < 0)}
        return {
            **about,
            "kind": "one-sided",
            "kl": kls[near],
            "kl_versus": kls[far],
            "without": sum(side is None for side in sides),
            **as_they_are(near, far),
        }
    matched = [
        matched_values(mixture, run[nearer].kl(), run.table.of(below, nearer), run.table.of(above, nearer))
        for run, (nearer, _), (below, above, mixture) in zip(runs, ends, sides, strict=True)
    ]
    below, above, _ = sides[0]
    mixed = {below: 1 - matched[0][1], above: matched[0][1]}
    groups = [v if farther == far else 1 - v for (v, _), (_, farther) in zip(matched, ends, strict=True)]
    figures = _figures(groups, settings, runs, shared)
    inner = _figures(groups, replace(settings, confidence=settings.both_sided), runs, shared)["ci"]
    figures["within"] = max(0.5 - inner[0], inner[1] - 0.5)
    figures["decided"] = max(
        replace(settings, clusters=run.clusters).units_of(
            (np.abs(np.stack([run.table.of(name, nearer) for name in side[:2]]) - 0.5) > 1e-12).any(axis=0)
        )
        for run, (nearer, _), side in zip(runs, ends, sides, strict=True)
    )
    return {
        **{"policy": far, "versus": near, "kind": "matched"},
        "kl": float(np.mean([run[nearer].kl().mean() for run, (nearer, _) in zip(runs, ends, strict=True)])),
        **figures,
        "points": {
            ends[0][1]: {name: weight for name, weight in mixed.items() if weight > 1e-9},
            ends[0][0]: {ends[0][0]: 1.0},
        },
    }


def _sides(run: Compared, near: str, far: str) -> tuple[str, str, Mixture] | None:
    """The farther method's two points around the nearer KL and their mixture; ``None`` where it cannot be made."""
    pair = neighbours(curve(run.settings, run[far].method), float(run[near].kl().mean()))
    if pair is None:
        return None
    below, above = pair
    names = below.name, above.name
    known = above.name in below.draws.under and below.name in above.draws.under
    judged = all(run.table.has(name, near) and np.isfinite(run.table.of(name, near)).all() for name in names)
    if not known or not judged:
        return None
    mixture = Mixture(
        below.kl(),
        above.kl(),
        below.draws.under[above.name] - below.draws.measures["logprob"],
        above.draws.under[below.name] - above.draws.measures["logprob"],
    )
    return *names, mixture


def _figures(groups: list[np.ndarray], settings: Settings, runs: list[Compared], shared: bool) -> dict[str, Any]:
    options = {"shared": shared, "clusters": [run.clusters for run in runs], "outward": True}
    interval, p, _ = rate_over(groups, confidence=settings.confidence, **options)
    return {"win_rate": interval.mean, "ci": interval.ci(), "p": p, "points": {}, "runs": len(runs)}


def frontier(
    runs: list[Compared], policies: dict[str, dict[str, Any]], settings: Settings, shared: bool = False
) -> list[dict[str, Any]]:
    """Points of every method; over-optimisation marked where gold is known. Of one run, or of several.

    Each point says which line it is on: ``along`` is ``sweep`` (of the coefficient, by rising KL), ``training``
    (checkpoints of the main run, by step), ``n`` (best-of-n) or ``other``. See `over_optimised` for the mark: against
    an *earlier* point of its line.

    What is not among ``policies``, the report's entries, checkpoints included, is left out.
    """
    everywhere = [name for name in policies if all(run.has(name) for run in runs)]
    first = runs[0]
    kl_of = {name: np.mean([run[name].kl().mean() for run in runs]) for name in everywhere}
    lines: dict[tuple[str, str], list[str]] = {}
    ends: dict[str, str | None] = {}
    for method in METHODS:
        own = [name for name in everywhere if first[name].method == method]
        steps = [name for name in own if "step" in first[name].point]
        sweep = [name for name in own if name not in steps]
        lines[method, "sweep"] = sorted(sweep, key=lambda name: (kl_of[name], name))
        ends[method] = next((name for name in sweep if first[name].is_end), None)
        if steps:
            # In the order of training, which ends at the main run: it closes this line and is written down once.
            steps.sort(key=lambda name: first[name].point["step"])
            lines[method, "training"] = steps + [name for name in [ends[method]] if name]
    tests = sum(max(len(line) - 1, 0) for line in lines.values())
    points = []
    for (method, along), line in lines.items():
        if along == "training":
            continue
        sweep = _line(runs, line, along, policies, settings, shared, tests)
        training = _line(runs, lines.get((method, "training"), []), "training", policies, settings, shared, tests)
        main = ends[method]
        late = next((point for point in training if point["policy"] == main and point.get("over_optimised")), None)
        # Over-optimised against an own checkpoint counts like against a point of the sweep.
        points += [{**late, "along": "sweep"} if late and point["policy"] == main else point for point in sweep]
        points += [point for point in training if point["policy"] != main]
    for contender in first.contenders:
        if contender.name not in policies:
            continue
        if contender.method == "best_of_n":
            points.append({**_point(contender.name, policies[contender.name], {}), "along": "n"})
        elif contender.method == "other" and contender.name in everywhere:
            points.append({**_point(contender.name, policies[contender.name], {}), "along": "other"})
    return points


def _line(
    runs: list[Compared],
    line: list[str],
    along: str,
    policies: dict[str, dict[str, Any]],
    settings: Settings,
    shared: bool,
    tests: int,
) -> list[dict[str, Any]]:
    if not line:
        return []
    marks: list[dict[str, Any]] = [{} for _ in line]
    if all({"gold", PROXY} <= set(run[name].draws.scores) for run in runs for name in line):
        gold, proxy = (
            [np.stack([run[name].score(judge) for name in line], axis=1) for run in runs] for judge in ("gold", PROXY)
        )
        labels = [run.clusters for run in runs]
        marks = over_optimised(
            gold, proxy, tests=tests, shared=shared, clusters=labels, confidence=settings.confidence
        )
    points = []
    for name, mark in zip(line, marks, strict=True):
        if mark.get("over_optimised") or mark.get("gold_fell"):
            mark["against"] = line[mark["against"]]
        else:
            mark.pop("against", None)
        points.append({**_point(name, policies[name], mark), "along": along})
    return points


def _point(name: str, entry: dict[str, Any], mark: dict[str, Any]) -> dict[str, Any]:
    keys = ("method", "point", "kl", "gold_reward", "gold_reward_ci", "proxy_reward", "proxy_reward_ci", "eos_rate")
    point = {"policy": name, **{key: entry[key] for key in keys}}
    if point["kl"]["mean"] is not None:
        point["sqrt_kl"] = float(np.sqrt(max(point["kl"]["mean"], 0.0)))
    return {**point, **mark}
