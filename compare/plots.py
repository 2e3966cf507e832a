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

from artifacts.files import atomic_path, write_text
from compare.verdict import label

# Okabe & Ito's colours, told apart with every kind of colour blindness.
STYLES = {
    "ppo": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "dpo": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "best_of_n": {"color": "#009E73", "marker": "^", "linestyle": ":"},
    "other": {"color": "#CC79A7", "marker": "D", "linestyle": "none"},
}
# Where a point's name stands, in points from it: the methods keep out of each other's way.
LABEL_AT = {"ppo": (6, 5), "dpo": (6, -12), "best_of_n": (-7, 3), "other": (6, -3)}
METHOD_LABELS = {"ppo": "PPO", "dpo": "DPO", "best_of_n": "best-of-n", "other": "others"}
RC = {
    "svg.hashsalt": "ppo-vs-dpo",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}


def frontier_plot(report: dict[str, Any]) -> Figure:
    """Gold (where known) and proxy reward against sqrt KL, error bars on both axes."""
    shown = [key for key in ("gold_reward", "proxy_reward") if any(p[key] is not None for p in report["frontier"])]
    with matplotlib.rc_context(RC):
        figure, axes = plt.subplots(1, len(shown), figsize=(5.2 * len(shown), 4.0), squeeze=False, sharex=True)
        for axis, key in zip(axes[0], shown, strict=True):
            _draw(axis, report, key)
        axes[0][0].legend(frameon=False, fontsize=10)
        figure.tight_layout()
    return figure


def _draw(axis: Any, report: dict[str, Any], key: str) -> None:
    start = report["policies"]["sft"]
    axis.axhline(start[key], color="#777777", linewidth=1, linestyle=(0, (1, 2)))
    axis.annotate("SFT", (0, start[key]), xytext=(3, 4), textcoords="offset points", fontsize=9, color="#555555")
    for method, style in STYLES.items():
        points = [p for p in report["frontier"] if p["method"] == method and p[key] is not None]
        points = [p for p in points if p["kl"]["mean"] is not None]
        if not points:
            continue
        x = np.array([p["sqrt_kl"] for p in points])
        y = np.array([p[key] for p in points])
        low, high = np.array([p[f"{key}_ci"] for p in points]).T
        kl_ci = np.array([p["kl"]["ci"] or [p["kl"]["mean"]] * 2 for p in points])
        sides = np.abs(np.sqrt(np.clip(kl_ci, 0, None)).T - x)
        axis.errorbar(
            x,
            y,
            yerr=[y - low, high - y],
            xerr=sides,
            capsize=2,
            markersize=6,
            linewidth=1.3,
            label=METHOD_LABELS[method],
            **style,
        )
        for point, at_x, at_y in zip(points, x, y, strict=True):
            left, below = LABEL_AT[method]
            axis.annotate(
                point_label(point),
                (at_x, at_y),
                xytext=(left, below),
                textcoords="offset points",
                ha="right" if left < 0 else "left",
                fontsize=8,
                color=style["color"],
            )
            if point.get("over_optimised"):
                axis.plot(at_x, at_y, marker="o", markersize=14, fillstyle="none", color="black", linewidth=0)
    axis.set_xlabel("√KL to SFT (√nats)")
    axis.set_title(
        {"gold_reward": "Gold reward (the true one)", "proxy_reward": "Proxy reward (the reward model's)"}[key]
    )
    axis.set_xlim(left=0)


def point_label(point: dict[str, Any]) -> str:
    """``kl_coef=0.1`` of a sweep point, ``n=16`` of best-of-n, ``main`` of the run's own."""
    if point["point"]:
        return ", ".join(f"{key}={value}" for key, value in point["point"].items())
    return f"{label(point['policy'])} (main)"


def write_figure(figure: Figure, folder: Path, name: str) -> str:
    """Write ``NAME.svg`` and ``NAME.png``, give the figure's memory back.

    Returns:
        An ``<svg>`` element without a size of its own, to stand in a page.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(RC):
        # Without metadata: no date in the bytes, no address in the page.
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        with atomic_path(folder / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=160)
    plt.close(figure)
    write_text(folder / f"{name}.svg", buffer.getvalue())
    element = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    opening, rest = element[: element.index(">")], element[element.index(">") :]
    return re.sub(r' (?:width|height)="[^"]*"', "", opening) + rest
