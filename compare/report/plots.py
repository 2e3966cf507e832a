"""Figures: legible without colour (markers and line styles differ), the same bytes for the same numbers."""

import io
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ppo_vs_dpo.artifacts.files import atomic_path, write_text
from ppo_vs_dpo.compare.config import KIND, METHODS
from ppo_vs_dpo.compare.report.decision import find, main_judge
from ppo_vs_dpo.compare.report.verdict import label
from ppo_vs_dpo.compare.statistics.kl_allows import phi

# Okabe & Ito's colours, told apart with every kind of colour blindness.
STYLES = {
    "ppo": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "dpo": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "rloo": {"color": "#56B4E9", "marker": "v", "linestyle": "-"},
    "grpo": {"color": "#E69F00", "marker": "P", "linestyle": "-"},
    "reinforce_pp": {"color": "#7F5F00", "marker": "X", "linestyle": "-"},
    "online_dpo": {"color": "#000000", "marker": "*", "linestyle": "--"},
    "online_ipo": {"color": "#666666", "marker": "h", "linestyle": "--"},
    "best_of_n": {"color": "#009E73", "marker": "^", "linestyle": ":"},
    "other": {"color": "#CC79A7", "marker": "D", "linestyle": "none"},
}
# Where a point's name stands, in points from it: the methods keep out of each other's way.
LABEL_AT = {"ppo": (5, 6), "dpo": (6, -12), "best_of_n": (-6, 4), "other": (7, -3)}
# Points are named by the number that was varied; the legend says which number.
METHOD_LABELS = {
    **{(one, "sweep"): f"{name}, by {'beta' if one == 'dpo' else 'KL coefficient'}" for one, name in METHODS.items()},
    **{
        (one, "training"): f"{name} along training, by {'step' if one == 'dpo' else 'update'}"
        for one, name in METHODS.items()
    },
    ("best_of_n", "n"): "best-of-n, by n",
    ("best_of_n", "policy"): "best-of-n over a policy",
    ("other", "other"): "others",
}
TITLES = {
    "gold_reward": "Gold reward (the true one)",
    "proxy_reward": "Proxy reward (the reward model's)",
    "win_rate": "Wins against SFT (grey: what KL allows)",
}
JUDGE_OF = {"gold_reward": "gold", "proxy_reward": "reward_model"}
OPTIMUM = {"color": "#444444", "linewidth": 1.4, "linestyle": (0, (6, 2))}
RC = {
    # Names of policies are text, also where they hold dollar signs.
    "text.parse_math": False,
    "svg.hashsalt": "ppo-vs-dpo",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}


def shown_rewards(report: dict[str, Any]) -> list[str]:
    """What has points to draw: gold where it is known, proxy where there is a reward model, wins where
    anyone was judged.
    """
    return [key for key in TITLES if any(point.get(key) is not None for point in with_wins(report)["frontier"])]


def with_wins(report: dict[str, Any]) -> dict[str, Any]:
    """The report, its points with their win rate against SFT by the main judge; checkpoints have none."""
    judge, points = main_judge(report), []
    for point in report["frontier"]:
        entry = find(report, point["policy"], "sft", judge)
        wins = {} if entry is None else {"win_rate": entry["win_rate"], "win_rate_ci": entry["ci"]}
        points.append({**point, **wins})
    start = {**report["policies"]["sft"], "win_rate": 0.5}
    return {**report, "frontier": points, "policies": {**report["policies"], "sft": start}}


def frontier_plot(report: dict[str, Any], keys: list[str] | None = None) -> Figure:
    """Rewards and wins against sqrt KL, a panel for each, error bars on both axes, the optimal frontier
    where it is known.
    """
    keys, report = keys or shown_rewards(report), with_wins(report)
    with matplotlib.rc_context(RC):
        figure, axes = plt.subplots(1, len(keys), figsize=(5.4 * len(keys), 4.5), squeeze=False, sharex=True)
        for axis, key in zip(axes[0], keys, strict=True):
            _draw(axis, report, key)
        # Under the panels: inside one it would lie over the points that it explains.
        handles = {name: h for axis in axes[0] for h, name in zip(*axis.get_legend_handles_labels(), strict=True)}
        columns = 2 * len(keys)
        rows = -(-len(handles) // columns)
        tight = {"fontsize": 8.2, "frameon": False, "columnspacing": 1.0, "handlelength": 1.6}
        figure.legend(handles.values(), handles, loc="lower center", ncols=columns, **tight)
        figure.tight_layout(rect=(0, 0.02 + 0.05 * rows, 1, 1))
        for axis in axes[0]:
            place_labels(axis)
    return figure


def series_of(point: dict[str, Any]) -> tuple[str, str]:
    """Which line a point belongs to."""
    if point["method"] == "best_of_n":
        return ("best_of_n", "policy" if "policy" in point["point"] else "n")
    return (point["method"], point["along"])


def _draw(axis: Any, report: dict[str, Any], key: str) -> None:
    start = report["policies"]["sft"]
    axis.axhline(start[key], color="#777777", linewidth=1, linestyle=(0, (1, 2)))
    axis.annotate(
        label("sft"), (0, start[key]), xytext=(3, 4), textcoords="offset points", fontsize=9, color="#555555"
    )
    known = [p for p in report["frontier"] if p.get(key) is not None and p["kl"]["mean"] is not None]
    furthest = max((p["sqrt_kl"] for p in known), default=1.0)
    if key == "win_rate":
        _draw_allowed(axis, furthest)
    else:
        _draw_optimum(axis, report, key, furthest)
    for series, name in METHOD_LABELS.items():
        points = [p for p in known if series_of(p) == series]
        if not points:
            continue
        style = dict(STYLES[series[0]])
        if series[1] == "training":
            # From SFT through the checkpoints to the main policy.
            tuning = (report["settings"].get("tuning") or {}).get(series[0]) or {}
            main = [p for p in known if p["policy"] == (tuning.get("last") or series[0])]
            by_step = sorted(points, key=lambda point: point["point"]["step"])
            line = [(0.0, start[key]), *((p["sqrt_kl"], p[key]) for p in [*by_step, *main])]
            axis.plot(*zip(*line, strict=True), color=style["color"], linewidth=0.9, linestyle="-.", zorder=1)
            style |= {"linestyle": "none", "markerfacecolor": "white"}
        elif series[1] == "policy":
            style |= {"linestyle": "none", "markerfacecolor": "white"}
        _draw_points(axis, points, key, style, name, small=series[1] == "training")
    axis.set_xlabel(f"√KL to {label('sft')} (√nats): 0 is {label('sft')} itself, further right is further from it")
    axis.set_title(TITLES[key].replace("SFT", label("sft")))
    axis.set_xlim(0, furthest * 1.08)


def _draw_points(
    axis: Any, points: list[dict[str, Any]], key: str, style: dict[str, Any], name: str, small: bool
) -> None:
    x = np.array([p["sqrt_kl"] for p in points])
    y = np.array([p[key] for p in points])
    low, high = np.array([p[f"{key}_ci"] for p in points]).T
    kl_ci = np.array([p["kl"]["ci"] or [p["kl"]["mean"]] * 2 for p in points])
    sides = np.abs(np.sqrt(np.clip(kl_ci, 0, None)).T - x)
    size = 4 if small else 6
    # An interval that was cut to what KL allows may end before its estimate: the bar then ends at the point.
    up_down = np.clip([y - low, high - y], 0, None)
    bars = {"yerr": up_down, "xerr": sides, "capsize": 2, "markersize": size, "linewidth": 1.3}
    axis.errorbar(x, y, **bars, label=name, **style)
    for point, at_x, at_y in zip(points, x, y, strict=True):
        main = not point["point"]
        axis.annotate(
            point_label(point),
            (at_x, at_y),
            xytext=LABEL_AT.get(point["method"], (5, 6)),
            textcoords="offset points",
            label="_point",
            fontsize=9 if main else 7.5,
            fontweight="bold" if main else "normal",
            color=style["color"],
        )
        if point.get("over_optimised"):
            axis.plot(at_x, at_y, marker="o", markersize=14, fillstyle="none", color="black", linewidth=0)


# Where a label may stand, from its point, in points; the first that covers nothing is taken.
AROUND = [(6, 5), (6, -11), (-6, 5), (-6, -11), (0, 9), (0, -15), (12, -3), (-12, -3), (14, 12), (-14, 12), (14, -18)]


def place_labels(axis: Any) -> None:
    """Move the names of points to where they cover no point and no other name, as far as there is room."""
    dots = 72 / axis.figure.dpi
    names = [text for text in axis.texts if text.get_label() == "_point"]
    taken = [axis.transData.transform(text.xy) * dots for text in names]
    boxes = [np.array([x - 4, y - 4, x + 4, y + 4]) for x, y in taken]
    for text, (x, y) in zip(names, taken, strict=True):
        width, height = 0.58 * text.get_fontsize() * len(text.get_text()), 1.1 * text.get_fontsize()
        best = None
        for right, up in [text.get_position(), *AROUND]:
            left = x + right - (width if right < 0 else width / 2 if right == 0 else 0)
            box = np.array([left, y + up, left + width, y + up + height])
            covered = sum(_overlap(box, other) for other in boxes)
            if best is None or covered < best[0] - 1e-9:
                best = (covered, right, up, box)
            if covered == 0:
                break
        _, right, up, box = best
        text.set_position((right, up))
        text.set_ha("right" if right < 0 else "center" if right == 0 else "left")
        boxes.append(box)


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Area that two boxes (left, bottom, right, top) share."""
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    return float(np.prod(np.clip(sides, 0, None)))


def _draw_allowed(axis: Any, furthest: float) -> None:
    """How far from one half a KL lets a win rate be, whoever judges (`compare.statistics.kl_allows`)."""
    x = np.linspace(0, furthest * 1.08, 120)
    reach = np.array([phi(kl) for kl in x**2])
    axis.fill_between(x, 0.5 - reach, 0.5 + reach, color="#444444", alpha=0.1, linewidth=0, label="what KL allows")
    axis.set_ylim(0, 1)


def _draw_optimum(axis: Any, report: dict[str, Any], key: str, furthest: float) -> None:
    """The best that any policy can reach at each KL; an estimate is drawn as far as it holds."""
    optimum = report.get("optimum")
    points = (optimum or {"curves": {}})["curves"].get(JUDGE_OF[key], [])
    if len(points) < 2:
        return
    x = np.sqrt([max(point["kl"], 0.0) for point in points])
    y, inside = np.array([point["reward"] for point in points]), x <= furthest * 1.08
    name = "optimum (exact)" if optimum["kind"] == "exact" else "optimum (lower estimate, as far as it holds)"
    axis.plot(x[inside], y[inside], label=name, zorder=0, **OPTIMUM)
    if optimum["kind"] != "exact":
        low, high = np.array([point["reward_ci"] for point in points]).T
        axis.fill_between(x[inside], low[inside], high[inside], color=OPTIMUM["color"], alpha=0.12, linewidth=0)


def point_label(point: dict[str, Any]) -> str:
    """``0.1`` for a coefficient, ``16`` for best-of-16, ``PPO`` for the main policy, the name of any other."""
    if "policy" in point["point"]:
        return label(point["policy"])
    varied = [str(value) for key, value in point["point"].items() if key not in KIND["ppo"]]
    return ", ".join(varied) or label(point["policy"])


def compute_plot(report: dict[str, Any]) -> Figure | None:
    """Reward against FLOPs (wall time where they were not counted): of all settings so far, or of each policy."""
    drawn = compute_rows(report)
    if drawn is None:
        return None
    with matplotlib.rc_context(RC):
        figure, axis = plt.subplots(figsize=(7.0, 4.5))
        _draw_compute(axis, report, *drawn)
        axis.legend(frameon=False, fontsize=9)
        figure.tight_layout()
    return figure


def compute_rows(report: dict[str, Any]) -> tuple[list[dict[str, Any]], str, str] | None:
    """What `compute_plot` draws: its rows, which reward, which unit; ``None`` where nothing was counted."""
    rows = (report.get("cost") or {}).get("curves") or []
    key = next((k for k in ("gold_reward", "proxy_reward") if rows and all(r.get(k) is not None for r in rows)), None)
    unit = next((u for u in ("flops", "seconds") if rows and all(r.get(u) for r in rows)), None)
    return None if key is None or unit is None else (rows, key, unit)


def _draw_compute(axis: Any, report: dict[str, Any], rows: list[dict[str, Any]], key: str, unit: str) -> None:
    tuned = any(row["settings"] > 1 for row in rows)
    scale, spent = (1e12, "TFLOPs") if unit == "flops" else (1.0, "seconds")
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        style = {**STYLES[method], **({} if tuned else {"linestyle": "none"})}
        axis.plot([r[unit] / scale for r in own], [r[key] for r in own], label=METHODS[method], **style)
    start = report["policies"]["sft"].get(key)
    if start is not None:
        axis.axhline(start, color="#777777", linewidth=1, linestyle=(0, (1, 2)))
    axis.set_xlabel(f"{spent} after SFT and the pairs" + (": a setting more at each mark" if tuned else ""))
    axis.set_title(TITLES[key])


def beside(report: dict[str, Any], path: Path) -> None:
    """Write one picture: reward at equal KL, and reward at equal compute."""
    drawn = compute_rows(report)
    with matplotlib.rc_context(RC), atomic_path(path) as temporary:
        figure, axes = plt.subplots(1, 2 if drawn else 1, figsize=(11.5 if drawn else 6.0, 4.8), squeeze=False)
        _draw(axes[0][0], with_wins(report), drawn[1] if drawn else "gold_reward")
        if drawn:
            _draw_compute(axes[0][1], report, *drawn)
        handles, names = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="lower center", ncols=5, fontsize=8.2, frameon=False)
        figure.tight_layout(rect=(0, 0.1, 1, 1))
        place_labels(axes[0][0])
        figure.savefig(temporary, format="png", dpi=110)
        plt.close(figure)


def write_figure(figure: Figure, folder: Path, name: str) -> str:
    """Write ``NAME.svg`` and ``NAME.png``, give the figure's memory back; returns the SVG, for a page to show."""
    with matplotlib.rc_context(RC), atomic_path(folder / f"{name}.png") as temporary:
        figure.savefig(temporary, format="png", dpi=160)
    text = svg_of(figure)
    write_text(folder / f"{name}.svg", text)
    return text


def svg_of(figure: Figure) -> str:
    """The figure as SVG, without metadata: no date in the bytes, no address in the page. Closes the figure."""
    buffer = io.StringIO()
    with matplotlib.rc_context(RC):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    plt.close(figure)
    return buffer.getvalue()


def element_of(text: str, title: str, prefix: str) -> str:
    """An ``<svg>`` element without a size of its own, to stand in a page beside others.

    Args:
        text: the SVG, of `svg_of` or `write_figure`.
        title: what a screen reader says.
        prefix: put before all ids, which two figures of one page must not share.
    """
    element = text[text.index("<svg") :]
    element = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", element)
    opening, rest = element[: element.index(">")], element[element.index(">") :]
    opening = re.sub(r' (?:width|height)="[^"]*"', "", opening)
    return f'{opening} role="img" aria-label="{title}"{rest}'
