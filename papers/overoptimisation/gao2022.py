"""Gao, Schulman, Hilton 2022: what gold does while a reward model is optimised, by its size and its data."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ppo_vs_dpo.papers.claims import Report, Statement, figure
from ppo_vs_dpo.papers.paper import Paper
from ppo_vs_dpo.papers.worlds.bits import best_of_n, bradley_terry, pairs, tilt, world

PLACE = "Gao et al. 2022 (2210.10760)"


def simulate(seed: int, settings: dict[str, Any]) -> Report:
    """Best-of-n and the exact tilt by small and large reward models, at several numbers of pairs."""
    rng = np.random.default_rng(seed)
    bits = world(rng, settings["length"])
    numbers = np.unique(np.round(np.logspace(0, np.log10(settings["largest_n"]), settings["points"])).astype(int))
    betas = np.logspace(1.5, -2, settings["points"])
    figures, curves = {}, {}
    for count in settings["pairs"]:
        winners, losers = pairs(bits, count, rng)
        for kind in ("small", "large"):
            seen = bits.features(kind)
            proxy = seen @ bradley_terry(seen[winners] - seen[losers])
            ordered = np.sign(proxy[winners] - proxy[losers]) == np.sign(bits.gold[winners] - bits.gold[losers])
            label = f"{kind} {count}"
            for name, policies in (
                ("best_of_n", (best_of_n(bits.reference, proxy, float(n)) for n in numbers)),
                ("tilt", (tilt(bits.reference, proxy, beta) for beta in betas)),
            ):
                rows = [(np.sqrt(max(bits.kl(p), 0.0)), p @ bits.gold, p @ proxy) for p in policies]
                distance, gold, score = map(np.array, zip(*rows, strict=True))
                top = int(gold.argmax())
                curves[f"{label} {name}"] = {"distance": distance.tolist(), "gold": gold.tolist()}
                figures[f"{label} {name} peak"] = float(gold[top])
                figures[f"{label} {name} peak distance"] = float(distance[top])
                figures[f"{label} {name} end"] = float(gold[-1])
                figures[f"{label} {name} proxy least step"] = float(np.diff(score).min())
                figures[f"{label} {name} form error"] = form_error(distance, gold, name)
            figures[f"{label} accuracy"] = float(ordered.mean())
    most = max(settings["pairs"])
    figures["accuracy"] = figures[f"small {most} accuracy"]
    for kind in ("small", "large"):
        for name in ("peak", "peak distance", "end", "proxy least step", "form error"):
            figures[f"{kind} {name}"] = figures[f"{kind} {most} best_of_n {name}"]
        figures[f"{kind} fall"] = figures[f"{kind} peak"] - figures[f"{kind} end"]
    figures["extrapolation error"] = extrapolation_error(curves[f"small {most} best_of_n"], settings["fitted_to"])
    return {"seed": seed, "figures": figures, "curves": {k: v for k, v in curves.items() if f" {most} " in k}}


def fit(distance: np.ndarray, gold: np.ndarray, kind: str) -> tuple[float, float]:
    """alpha and beta of R = d (alpha - beta d) (best-of-n), or d (alpha - beta log d) (RL), the paper's two forms."""
    keep = distance > 1e-9
    distance, gold = distance[keep], gold[keep]
    second = distance**2 if kind == "best_of_n" else distance * np.log(distance)
    solution, *_ = np.linalg.lstsq(np.stack([distance, -second], axis=1), gold, rcond=None)
    return float(solution[0]), float(solution[1])


def form(distance: np.ndarray, alpha: float, beta: float, kind: str) -> np.ndarray:
    """The paper's functional form."""
    distance = np.asarray(distance, dtype=float)
    slope = distance if kind == "best_of_n" else np.log(np.maximum(distance, 1e-12))
    return distance * (alpha - beta * slope)


def form_error(distance: np.ndarray, gold: np.ndarray, kind: str) -> float:
    """Root mean square distance of a curve from the form fitted to it, in shares of the curve's height."""
    fitted = form(distance, *fit(distance, gold, kind), kind)
    return float(np.sqrt(np.mean((fitted - gold) ** 2)) / max(np.ptp(gold), 1e-12))


def extrapolation_error(curve: dict[str, list[float]], share: float) -> float:
    """How far off the peak's distance is when the form sees only distances up to ``share`` of it (1: exact)."""
    distance, gold = np.array(curve["distance"]), np.array(curve["gold"])
    peak = distance[gold.argmax()]
    keep = distance <= share * peak
    alpha, beta = fit(distance[keep], gold[keep], "best_of_n")
    # d* = alpha / (2 beta); a form that never turns down predicts no peak at all.
    return float(abs(alpha / (2 * beta) / peak - 1)) if beta > 0 else 10.0


def draw(axes: Any, reports: Sequence[Report]) -> None:
    """Gold against the square root of KL, best-of-n and RL, small and large reward model."""
    colours = {"small": "#D55E00", "large": "#0072B2"}
    for report in reports:
        for label, curve in report["curves"].items():
            kind, _, method = label.split(" ")
            style = "-" if method == "best_of_n" else "--"
            name = f"{kind} reward model, {'best-of-n' if style == '-' else 'RL (exact)'}"
            axes.plot(curve["distance"], curve["gold"], style, color=colours[kind], label=name)
    axes.set(xlabel="sqrt KL(policy, reference), nats^½", ylabel="gold reward, standard deviations")


PAPER = Paper(
    name="gao2022",
    title="Gao, Schulman, Hilton 2022: Scaling laws for reward model overoptimization (2210.10760)",
    question="How far can a reward model be optimised before the true reward falls, by its size and its data?",
    takes="not published; its models were never released, so the full configuration asks for a policy and data",
    world="4,096 bit strings with exact probabilities, gold and proxies in closed form",
    simulate=simulate,
    draw=draw,
    published=(
        ("best-of-n, 3M reward model: peak of gold", "about 0.50 at KL 4", f"{PLACE}, a figure, read off by eye [F]"),
        (
            "RL, 3M reward model: peak of gold",
            "about 0.58 at KL 18-20, then towards 0",
            f"{PLACE}, a figure, read off by eye [F]",
        ),
        ("RL, 3B reward model: peak of gold", "about 1.08 at KL 70-90", f"{PLACE}, a figure, read off by eye [F]"),
        ("best-of-n form", "d (alpha - beta d)", f"{PLACE} [S]"),
        ("RL form", "d (alpha - beta log d)", f"{PLACE} [S]"),
        ("pairs below which a reward model is near chance", "2,000", f"{PLACE} [S]"),
    ),
    explanations={
        "... and, fitted to the beginning, predicts the rest": (
            "this world's gold turns down more sharply than the form: its penalty sets in at a number of ones"
        ),
    },
    unknown=(
        "alpha and beta of each reward model (figures only)",
        "the policies, reward models and labels themselves",
    ),
    statements=(
        Statement(
            "Selecting harder by the proxy never lowers the proxy",
            f"{PLACE} [F]",
            "rises throughout",
            "least change of the proxy from one n to the next",
            figure("small proxy least step"),
            least=-1e-9,
            always=True,
        ),
        Statement(
            "Gold rises first and falls in the end, though the proxy rises (small reward model)",
            f"{PLACE} [F]",
            "a hump",
            "gold at its peak less gold at the largest n, standard deviations",
            figure("small fall"),
            least=0.5,
        ),
        Statement(
            "... and ends below where it began",
            f"{PLACE}, smallest reward models [F]",
            "towards or below 0",
            "gold at the largest n, standard deviations",
            figure("small end"),
            most=0.0,
        ),
        Statement(
            "A larger reward model peaks higher",
            f"{PLACE} [F]",
            "about 1.08 against 0.58 (RL, 3B and 3M)",
            "peak of gold, large less small, standard deviations",
            lambda report: report["figures"]["large peak"] - report["figures"]["small peak"],
            least=0.0,
        ),
        Statement(
            "... and later",
            f"{PLACE} [F]",
            "KL 70-90 against 18-20",
            "distance of the peak, large less small, nats^1/2",
            lambda report: report["figures"]["large peak distance"] - report["figures"]["small peak distance"],
            least=0.0,
        ),
        Statement(
            "High accuracy on pairs does not prevent it",
            f"{PLACE} [S]",
            "over-optimised at every size",
            "share of pairs in gold's order by a small reward model whose gold ends below 0 (0 where it does not)",
            lambda report: report["figures"]["accuracy"] if report["figures"]["small end"] < 0 else 0.0,
            least=0.9,
        ),
        Statement(
            "d (alpha - beta d) describes best-of-n up to the largest n",
            f"{PLACE} [S]",
            "fits to n = 60,000",
            "root mean square distance from the fitted form, share of the curve's height",
            figure("small form error"),
            most=0.1,
        ),
        Statement(
            "... and, fitted to the beginning, predicts the rest",
            f"{PLACE}; proposed at n <= 1,000, KL about 6 [S]",
            "predicted n up to 60,000",
            "relative error of the peak's distance, fitted below 0.7 of it",
            figure("extrapolation error"),
            most=0.25,
        ),
    ),
)
