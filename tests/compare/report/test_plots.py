"""The frontier's figure: its legend and its labels cover no data; zero has no sign."""

import numpy as np
import pytest

from ppo_vs_dpo.compare.report.pages import number
from ppo_vs_dpo.compare.report.plots import frontier_plot
from tests.compare.report.test_browser import POINTS, frontier_point, small_report


@pytest.fixture
def crowded():
    """Points as close as those of a real report: the main policies and a sweep on one spot."""
    report = small_report(["sft", "ppo", "dpo"], ["gold", "reward_model"])
    kls = {"ppo": 4.0, "ppo,kl_coef=0.0": 4.4, "ppo,step=8": 4.2, "dpo": 4.1, "best_of_4": 4.3}
    report["frontier"] = [
        {**frontier_point(*about[:4], kls.get(about[0], about[4])), "gold_reward": 0.5 + 0.01 * i}
        for i, about in enumerate(POINTS)
    ]
    return report


def boxes(figure):
    figure.canvas.draw()
    (axis,) = figure.axes
    renderer = figure.canvas.get_renderer()
    names = [text for text in axis.texts if text.get_label() == "_point"]
    return axis, names, [text.get_window_extent(renderer) for text in names]


def test_the_legend_lies_under_the_panel(crowded):
    figure = frontier_plot(crowded, ["gold_reward"])
    figure.canvas.draw()
    (axis,) = figure.axes
    (legend,) = figure.legends
    assert axis.get_legend() is None
    assert legend.get_window_extent().y1 <= axis.get_window_extent().y0
    assert legend.get_window_extent().x0 >= 0


def test_names_cover_no_point_and_no_other_name(crowded):
    axis, names, extents = boxes(frontier_plot(crowded, ["gold_reward"]))
    assert len(names) == len(POINTS)
    points = axis.transData.transform([text.xy for text in names])
    for text, box in zip(names, extents, strict=True):
        inside = [np.all(point > box.p0) and np.all(point < box.p1) for point in points]
        assert not any(inside), text.get_text()
    pairs = [(a, b) for i, a in enumerate(extents) for b in extents[:i]]
    overlapping = [a.overlaps(b) for a, b in pairs]
    assert sum(overlapping) == 0


@pytest.mark.parametrize(
    ("value", "text"), [(-0.001, "0.00"), (-0.006, "−0.01"), (0.0, "0.00"), (-1.5, "−1.50"), (None, "–")]
)
def test_zero_has_no_sign(value, text):
    assert number(value) == text


def test_an_estimate_outside_of_its_interval_is_drawn(crowded):
    """Seen on a run of 16 prompts: best-of-4 won 87.5 %, and its interval was cut to the 80 % that n allows."""
    crowded["win_rates"] = [
        {**entry, "ci": [0.65, entry["win_rate"] - 0.05]} for entry in crowded["win_rates"] if entry["versus"] == "sft"
    ]
    figure = frontier_plot(crowded, ["win_rate"])
    figure.canvas.draw()
    (axis,) = figure.axes
    assert axis.containers
