"""The reward-model report, before PPO trusts the model: ``report.json`` and ``reliability.png``.

What is measured, on held-out pairs: accuracy with its interval against the ceiling that label noise sets, by margin;
calibration; what the scores go along with (length, and gold where it is known); scores of SFT samples; over-fitting.
Where it is not good enough for PPO, the report says so in words.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ppo_vs_dpo.artifacts.files import atomic_path, write_json
from ppo_vs_dpo.artifacts.resources import part
from ppo_vs_dpo.models.text.encoding import encode_pairs
from ppo_vs_dpo.preferences.recipes.bradley_terry import (
    accuracy_ceiling,
    expected_accuracy,
    label_entropy,
    preference_probability,
)
from ppo_vs_dpo.reward_model import calibration
from ppo_vs_dpo.reward_model.scorer import RewardScorer

# Below this share of what the labels allow, (expected accuracy - 0.5) / (ceiling - 0.5), PPO mostly learns the
# model's errors.
ENOUGH = 0.6
# Without a known ceiling: below this accuracy. InstructGPT's and Stiennon's models have 0.65 to 0.75.
ENOUGH_WITHOUT_CEILING = 0.6


@part("scoring")
def scored_pairs(scorer: RewardScorer, pairs: Dataset, limit: int | None, max_length: int | None) -> dict[str, Any]:
    """Scores, lengths and columns of (at most ``limit``) pairs that are not longer than ``max_length``.

    Returns:
        ``delta``, ``scores`` and ``lengths`` (both sides, ``(2, N)``), and the kept ``pairs``.
    """
    encoded = encode_pairs(scorer.tokenizer, pairs if limit is None else pairs.select(range(min(limit, len(pairs)))))
    fits = [row for row, n in enumerate(encoded["length"][:]) if max_length is None or n <= max_length]
    encoded = encoded.select(fits)
    prompts = encoded["prompt_ids"][:]
    sides = [encoded["chosen_ids"][:], encoded["rejected_ids"][:]]
    scores = np.array(
        [scorer.score_sequences([p + answer for p, answer in zip(prompts, side, strict=True)]) for side in sides]
    )
    lengths = np.array([[len(answer) for answer in side] for side in sides])
    return {"delta": scores[0] - scores[1], "scores": scores, "lengths": lengths, "pairs": encoded}


@part("statistics")
def build_report(
    test: dict[str, Any],
    train_delta: np.ndarray,
    samples: dict[str, list],
    labels_from_gold: bool,
    label_noise: float | None = None,
) -> dict[str, Any]:
    """The figures of the report.

    Args:
        train_delta: ``(M,)`` score differences of training pairs.
        samples: ``scores`` and ``finished`` of SFT samples.
        labels_from_gold: labels were drawn by Bradley-Terry from ``chosen_score`` and ``rejected_score``.
        label_noise: share of labels believed wrong, where gold is not known.
    """
    delta, pairs, lengths = test["delta"], test["pairs"], test["lengths"]
    gold = None
    if {"chosen_score", "rejected_score"} <= set(pairs.column_names):
        gold = np.array([pairs["chosen_score"][:], pairs["rejected_score"][:]], dtype=float)
    probability = preference_probability(*gold) if labels_from_gold and gold is not None else None
    ceiling = entropy = None
    if probability is not None:
        ceiling, entropy = accuracy_ceiling(probability), label_entropy(probability)
    elif label_noise is not None:
        ceiling = 1.0 - label_noise
    accuracy, on_train = calibration.pair_accuracy(delta), calibration.pair_accuracy(train_delta)
    table = calibration.reliability(delta)
    margin_kind, margin = _margins(pairs, gold, delta)
    expected = expected_accuracy(delta, probability) if probability is not None else accuracy.accuracy
    own_ceiling = np.maximum(probability, 1 - probability) if probability is not None else None
    # A rule that always prefers the longer answer; equal lengths are worth one half.
    longer = calibration.pair_accuracy((lengths[0] - lengths[1]).astype(float))
    scores = np.array(samples["scores"])
    report = {
        "accuracy": accuracy.accuracy,
        "accuracy_interval": [accuracy.low, accuracy.high],
        "test_pairs": accuracy.n,
        "ceiling": ceiling,
        "expected_accuracy": expected if probability is not None else None,
        "of_ceiling": (expected - 0.5) / (ceiling - 0.5) if ceiling and ceiling > 0.5 else None,
        "train_accuracy": on_train.accuracy,
        "train_accuracy_interval": [on_train.low, on_train.high],
        "overfit": _overfit(accuracy, on_train),
        "loss": calibration.log_loss(delta),
        "label_entropy": entropy,
        "ece": calibration.expected_calibration_error(table),
        "overconfidence": calibration.overconfidence(table),
        "brier": calibration.brier(delta),
        "reliability": table,
        "margin": margin_kind,
        "by_margin": calibration.by_margin(delta, margin, own_ceiling),
        **_groups(pairs, delta),
        "longer_is_better": asdict(longer),
        "length_correlation": {
            "score": calibration.correlation(test["scores"].ravel(), lengths.ravel().astype(float)),
            "within_pairs": calibration.correlation(delta, (lengths[0] - lengths[1]).astype(float)),
        },
        "gold_correlation": calibration.correlation(test["scores"].ravel(), gold.ravel())
        if gold is not None
        else None,
        "sft_samples": {
            "n": len(scores),
            "mean": float(scores.mean()),
            "std": float(scores.std()),
            "quantiles": {str(q): float(np.quantile(scores, q)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)},
            "finished": float(np.mean(samples["finished"])),
        },
    }
    report["warnings"] = warnings(report)
    return report


def _margins(pairs: Dataset, gold: np.ndarray | None, delta: np.ndarray) -> tuple[str, np.ndarray]:
    """What the pairs are binned by: the annotators' margin, the gold difference, or the model's own."""
    if "margin" in pairs.column_names and None not in pairs["margin"][:]:
        return "margin", np.abs(np.array(pairs["margin"][:], dtype=float))
    if gold is not None:
        return "gold_difference", np.abs(gold[0] - gold[1])
    return "score_difference", np.abs(delta)


def _groups(pairs: Dataset, delta: np.ndarray) -> dict[str, dict[str, Any]]:
    """Accuracy by labelling batch and by the two policies that wrote, where data say them (Stiennon et al. 2020)."""
    found, columns = {}, set(pairs.column_names)
    if "batch" in columns:
        found["by_batch"] = calibration.by_group(delta, pairs["batch"][:])
    if {"chosen_policy", "rejected_policy"} <= columns:
        wrote = zip(pairs["chosen_policy"][:], pairs["rejected_policy"][:], strict=True)
        versus = [" against ".join(sorted(both)) if all(both) else None for both in wrote]
        found["by_policies"] = calibration.by_group(delta, versus)
    return {key: {name: asdict(one) for name, one in groups.items()} for key, groups in found.items() if groups}


def _overfit(test: calibration.Accuracy, train: calibration.Accuracy) -> bool:
    """Training accuracy above test accuracy by more than 5 points and by more than both intervals allow."""
    return train.accuracy - test.accuracy > 0.05 and train.low > test.high


def warnings(report: dict[str, Any]) -> list[str]:
    """Sentences on what is not good enough, each with what to do about it."""
    found = []
    low, high = report["accuracy_interval"]
    accuracy, ceiling = report["accuracy"], report["ceiling"]
    learned = accuracy if report["expected_accuracy"] is None else report["expected_accuracy"]
    if low <= 0.5:
        found.append(
            f"Held-out accuracy is {accuracy:.3f} [{low:.3f}, {high:.3f}]: not better than a coin. PPO would maximise "
            f"noise. Check the pairs, raise reward_model.learning_rate or train longer."
        )
    elif report["of_ceiling"] is not None and report["of_ceiling"] < ENOUGH:
        found.append(
            f"The model learned {report['of_ceiling']:.0%} of what the labels allow (accuracy {learned:.3f}, ceiling "
            f"{ceiling:.3f}); below {ENOUGH:.0%} PPO mostly finds its errors. More pairs, more epochs, or a larger "
            f"ppo.kl_coef."
        )
    elif report["of_ceiling"] is None and accuracy < ENOUGH_WITHOUT_CEILING:
        found.append(
            f"Held-out accuracy is {accuracy:.3f}; published reward models reach 0.65 to 0.75 on human labels. "
            f"More pairs, a larger model, or a larger ppo.kl_coef."
        )
    if ceiling is not None and low > ceiling:
        found.append(
            f"Accuracy {accuracy:.3f} [{low:.3f}, {high:.3f}] is above the ceiling {ceiling:.3f} that the label noise "
            f"sets: test labels have leaked into training, or reward_model.label_noise is too high."
        )
    if report["overfit"]:
        found.append(
            f"Over-fitted: {report['train_accuracy']:.3f} on training pairs, {accuracy:.3f} on test pairs. Fewer "
            f"epochs (reward_model.num_train_epochs) or more weight decay."
        )
    if report["longer_is_better"]["accuracy"] >= accuracy:
        found.append(
            f"'The longer answer is better' is right as often ({report['longer_is_better']['accuracy']:.3f}) as this "
            f"model ({accuracy:.3f})."
        )
    lengths = report["length_correlation"]["score"]
    if lengths is not None and abs(lengths["pearson"]) > 0.5:
        found.append(
            f"Scores go along with length (correlation {lengths['pearson']:.2f}): expect PPO to change the length of "
            f"answers. Watch length-controlled win rates."
        )
    if report["ece"] > 0.1:
        way = "over" if report["overconfidence"] > 0 else "under"
        found.append(
            f"{way.capitalize()}confident: calibration error {report['ece']:.3f}. Its score differences are not "
            f"log-odds; a KL coefficient from elsewhere will not carry over."
        )
    gold = report["gold_correlation"]
    if gold is not None and gold["pearson"] < 0.5:
        found.append(f"Scores correlate with the gold reward by only {gold['pearson']:.2f}.")
    if report["sft_samples"]["std"] < 1e-3:
        found.append("All SFT samples get the same score: there is nothing for PPO to learn from.")
    if report["sft_samples"]["finished"] < 0.5:
        found.append(
            f"Only {report['sft_samples']['finished']:.0%} of the SFT policy's samples end within "
            f"reward_model.sample_max_new_tokens; scores of unfinished answers are outside of what was trained."
        )
    return found


def write_report(
    folder: Path,
    scorer: RewardScorer,
    train: Dataset,
    test: Dataset,
    samples: dict[str, list],
    labels_from_gold: bool,
    label_noise: float | None,
    limit: int | None,
    max_length: int | None,
    more: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Score, measure, write ``report.json`` and ``reliability.png`` into ``folder``, and return the figures."""
    scored = scored_pairs(scorer, test, limit, max_length)
    seen = scored_pairs(scorer, train, len(scored["delta"]), max_length)
    report = build_report(scored, seen["delta"], samples, labels_from_gold, label_noise)
    report |= more or {}
    write_json(folder / "report.json", report)
    plot(report, np.array(samples["scores"]), folder / "reliability.png")
    return report


@part("report")
def plot(report: dict[str, Any], sample_scores: np.ndarray, path: Path) -> None:
    """Three panels: reliability, accuracy by margin, scores of SFT samples."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    calibrated, margins, scores = figure.subplots(1, 3)

    table = report["reliability"]
    calibrated.plot([0.5, 1], [0.5, 1], color="0.6", linestyle="--", label="perfect")
    calibrated.plot([row["confidence"] for row in table], [row["accuracy"] for row in table], "o-", label="measured")
    calibrated.set(title=f"Reliability (ECE {report['ece']:.3f})", xlabel="confidence", ylabel="accuracy")
    calibrated.legend()

    bins = report["by_margin"]
    middle = np.array([row["accuracy"] for row in bins])
    error = np.clip([middle - [row["low"] for row in bins], [row["high"] for row in bins] - middle], 0, None)
    margins.errorbar(range(len(bins)), middle, yerr=error, fmt="o", capsize=3, label="accuracy")
    if bins and "ceiling" in bins[0]:
        margins.plot(range(len(bins)), [row["ceiling"] for row in bins], "_", markersize=18, label="ceiling")
    margins.axhline(0.5, color="0.6", linestyle="--")
    margins.set(title="By margin", xlabel=f"fifths by {report['margin'].replace('_', ' ')}", ylabel="accuracy")
    margins.set_xticks(range(len(bins)))
    margins.legend()

    scores.hist(sample_scores, bins=40)
    scores.axvline(0, color="0.3", linestyle="--")
    scores.set(title="Scores of SFT samples", xlabel="score, mean 0", ylabel="samples")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
