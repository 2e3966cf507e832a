"""The reward-KL frontier of a report: the points of every method, and two methods at matched KL."""

from itertools import combinations
from typing import Any

import numpy as np

from ppo_vs_dpo.compare.estimates.win_rates import PairTable, Settings
from ppo_vs_dpo.compare.frontier.matched import curve, matched_win_rate, over_optimised
from ppo_vs_dpo.compare.sampling.contenders import PROXY, Contender
from ppo_vs_dpo.compare.sampling.policies import REFERENCE


def matched_kl(contenders: list[Contender], table: PairTable, a: str, b: str, settings: Settings) -> dict[str, Any]:
    """Two methods at the KL of the closer of their main policies, along their sweeps from the reference on.

    Returns:
        The figures, or ``{"refused": reason}``: nothing is extrapolated.
    """
    by_name = {c.name: c for c in contenders}
    if a not in by_name or b not in by_name or by_name[a].kl() is None or by_name[b].kl() is None:
        return {"policy": a, "versus": b, "refused": "the KL of one of them was not measured"}
    swept = [name for name in by_name if by_name[name].method in (REFERENCE, "ppo", "dpo")]
    judged = all(table.has(one, two) for one, two in combinations(swept, 2))
    if not judged or not np.isfinite(table.preferences).all():
        return {"policy": a, "versus": b, "refused": "the judge did not judge every point of both sweeps"}
    start = [by_name[REFERENCE]]
    sides = [start + curve(contenders, by_name[name].method) for name in (a, b)]
    n = len(by_name[a].weights)
    preferences = np.full((n, len(sides[0]), len(sides[1])), 0.5)
    for i, ours in enumerate(sides[0]):
        for j, theirs in enumerate(sides[1]):
            if ours.name != theirs.name:
                preferences[:, i, j] = table.of(ours.name, theirs.name)
    kl = [np.stack([c.kl() for c in side], axis=1) for side in sides]
    main = [[c.name for c in side].index(name) for side, name in zip(sides, (a, b), strict=True)]
    try:
        found = matched_win_rate(*kl, preferences, *main, **settings.kwargs())
    except ValueError as error:
        return {"policy": a, "versus": b, "refused": f"{error}; nothing is extrapolated"}
    weights = found.pop("weights")
    found["points"] = {
        name: {c.name: w for c, w in zip(side, weight, strict=True) if w > 0}
        for name, side, weight in zip((a, b), sides, weights, strict=True)
    }
    return {"policy": a, "versus": b, **found}


def frontier(
    contenders: list[Contender], checkpoints: list[Contender], policies: dict[str, dict], settings: Settings
) -> list[dict[str, Any]]:
    """Points of every method; over-optimisation marked where gold is known.

    Each point says which line it is on: ``along`` is ``sweep`` (of the coefficient, by rising KL), ``training``
    (checkpoints of the main run, by step), ``n`` (best-of-n) or ``other``. Over-optimised is what has less gold and no
    less proxy than an *earlier* point of its line.
    """
    points = []
    for method in ("ppo", "dpo"):
        sweep = _line(curve(contenders, method), "sweep", policies, settings)
        # In the order of training, which ends at the main policy: it closes this line and is written down once.
        steps = sorted((c for c in checkpoints if c.method == method), key=lambda c: c.point["step"])
        main = [c for c in contenders if c.name == method and c.kl() is not None]
        training = _line([*steps, *main], "training", policies, settings) if steps else []
        late = next((point for point in training if point["policy"] == method and point.get("over_optimised")), None)
        # Over-optimised against an own checkpoint counts like against a point of the sweep.
        points += [{**late, "along": "sweep"} if late and point["policy"] == method else point for point in sweep]
        points += [point for point in training if point["policy"] != method]
    for contender in contenders:
        if contender.method == "best_of_n":
            points.append({**_point(contender.name, policies[contender.name], {}), "along": "n"})
        elif contender.method == "other" and contender.kl() is not None:
            points.append({**_point(contender.name, policies[contender.name], {}), "along": "other"})
    return points


def _line(line: list[Contender], along: str, policies: dict[str, dict], settings: Settings) -> list[dict[str, Any]]:
    if not line:
        return []
    marks: list[dict[str, Any]] = [{} for _ in line]
    if all("gold" in c.draws.scores and PROXY in c.draws.scores for c in line):
        gold = np.stack([c.score("gold") for c in line], axis=1)
        proxy = np.stack([c.score(PROXY) for c in line], axis=1)
        marks = over_optimised(gold, proxy, **settings.kwargs())
    points = []
    for contender, mark in zip(line, marks, strict=True):
        if mark.get("over_optimised"):
            mark["against"] = line[mark["against"]].name
        else:
            mark.pop("against", None)
        points.append({**_point(contender.name, policies[contender.name], mark), "along": along})
    return points


def _point(name: str, entry: dict[str, Any], mark: dict[str, Any]) -> dict[str, Any]:
    keys = ("method", "point", "kl", "gold_reward", "gold_reward_ci", "proxy_reward", "proxy_reward_ci", "eos_rate")
    point = {"policy": name, **{key: entry[key] for key in keys}}
    if point["kl"]["mean"] is not None:
        point["sqrt_kl"] = float(np.sqrt(max(point["kl"]["mean"], 0.0)))
    return {**point, **mark}
