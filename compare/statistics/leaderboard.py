"""AlpacaEval 2's length-controlled win rate as its leaderboard prints it: the full model, with its regularisation.

    logit P(m beats b | x) = theta + phi tanh(d(x) / sd(d)) + psi difficulty(x),   d = length of b - length of m

(Dubois et al. 2024, arXiv 2404.04475, section 3). theta alone says little where hardly a prompt has answers of equal
length: the leaderboard therefore fits phi and psi to the judgements of the baseline against *itself*, asked to be
brief and to be verbose, too ("gamed" baselines, weight 0.1 a row, for which theta is 0). Those judgements and each
instruction's difficulty (fitted once to all models) are files of the data set ``tatsu-lab/alpaca_eval``:
``df_gamed.csv`` and ``instruction_difficulty.csv``. Fit, folds, penalty and stopping rule are those of alpaca_eval
0.6.6, so that the figures are its own, digit by digit (tests/compare/estimates/test_leaderboard.py).
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import expit

from ppo_vs_dpo.artifacts.errors import UserError, first_sentence
from ppo_vs_dpo.compare.statistics.soft_logistic import chosen_strength, fit_soft_labels

REPOSITORY = "tatsu-lab/alpaca_eval"
DIFFICULTY_FILE, GAMED_FILE = "instruction_difficulty.csv", "df_gamed.csv"
# Weight of a gamed baseline's row: lambda = 0.2, over two such baselines.
GAMED_WEIGHT = 0.1
# Where liblinear stops in alpaca_eval (scikit-learn's defaults); a tighter one moves the second decimal.
TOLERANCE, ITERATIONS = 1e-4, 100


@dataclass(frozen=True)
class Gamed:
    """Judgements of the baseline, asked to be brief or verbose, against the baseline.

    Attributes:
        preference: ``(G,)`` in [0, 1].
        length_difference: ``(G,)`` standardised, baseline minus model.
        difficulty: ``(G,)`` of the instruction.
    """

    preference: np.ndarray
    length_difference: np.ndarray
    difficulty: np.ndarray


@dataclass(frozen=True)
class Leaderboard:
    """What the leaderboard's model needs beside a model's own judgements.

    Attributes:
        difficulty: instruction's number in the evaluation set -> how hard it is.
        gamed: the baseline against itself; ``None`` fits without that regularisation (alpaca_eval's ``noreg``).
    """

    difficulty: dict[int, float]
    gamed: Gamed | None


@dataclass(frozen=True)
class LeaderboardFit:
    """A fitted model.

    Attributes:
        win_rate: mean prediction at equal lengths, in [0, 1].
        standard_error: of the predictions over prompts, as alpaca_eval gives it.
        theta: quality difference, log-odds.
        phi: slope on tanh of the standardised length difference.
        psi: slope on difficulty.
        strength: scikit-learn's ``C`` that cross-validation chose.
        predictions: ``(P,)`` at equal lengths.
    """

    win_rate: float
    standard_error: float
    theta: float
    phi: float
    psi: float
    strength: float
    predictions: np.ndarray


def fit_leaderboard(
    preferences: np.ndarray, length_difference: np.ndarray, difficulty: np.ndarray, gamed: Gamed | None
) -> LeaderboardFit:
    """Fit the leaderboard's model to one model's judgements.

    Args:
        preferences: ``(P,)`` in [0, 1], 1 where the model wins; NaN where there is none (lengths count all the same).
        length_difference: ``(P,)`` characters of the *baseline's* answer minus the model's.
        difficulty: ``(P,)`` of each instruction.
        gamed: the regularising judgements, or ``None``.

    Raises:
        ValueError: fewer than 10 prompts, or no spread of lengths.
    """
    n, judged = len(preferences), np.isfinite(preferences)
    if judged.sum() < 10:
        raise ValueError(f"{judged.sum()} prompts are too few to fit a length effect")
    deviation = np.std(length_difference, ddof=1)
    if deviation == 0:
        raise ValueError("all length differences are equal: there is no length effect to fit")
    own = np.stack([np.tanh(length_difference / deviation), difficulty, np.ones(n)], axis=1)
    design, labels, weights = own[judged], np.asarray(preferences, dtype=np.float64)[judged], np.ones(judged.sum())
    if gamed is not None:
        # The baseline against itself is no better and no worse: theta does not act there.
        theirs = np.stack(
            [np.tanh(gamed.length_difference), gamed.difficulty, np.zeros(len(gamed.preference))], axis=1
        )
        design = np.concatenate([theirs, design])
        labels = np.concatenate([gamed.preference, labels])
        weights = np.concatenate([np.full(len(theirs), GAMED_WEIGHT), weights])
    options = {"weights": weights, "tolerance": TOLERANCE, "iterations": ITERATIONS}
    strength = chosen_strength(design, labels, **options)
    coefficients = fit_soft_labels(design, labels, strength, "l1", **options)
    at_equal = own.copy()
    at_equal[:, 0] = 0.0
    predictions = expit(at_equal @ coefficients)
    return LeaderboardFit(
        win_rate=float(predictions.mean()),
        standard_error=float(predictions.std(ddof=1) / np.sqrt(n)),
        theta=float(coefficients[2]),
        phi=float(coefficients[0]),
        psi=float(coefficients[1]),
        strength=strength,
        predictions=predictions,
    )


def read_leaderboard(places: list[str]) -> Leaderboard:
    """The two files of the leaderboard's model.

    Args:
        places: files (``instruction_difficulty.csv``, ``df_gamed.csv``, told apart by their columns), folders that
            hold them, or ``hub`` for the data set on the Hub.

    Raises:
        UserError: not found, not readable, or without a column that is needed; names the file.
    """
    difficulty: dict[int, float] = {}
    gamed: Gamed | None = None
    for path in (file for place in places for file in _files_of(place)):
        rows = _rows(path)
        if "std_delta_len" in rows[0]:
            gamed = Gamed(
                *(np.array([_number(row, key, path) for row in rows]) for key in ("preference", "std_delta_len")),
                np.array([_number(row, "instruction_difficulty", path) for row in rows]),
            )
            # An instruction's difficulty stands in each of its rows.
            difficulty |= {
                int(_number(row, "index", path)): _number(row, "instruction_difficulty", path) for row in rows
            }
        else:
            numbers = [key for key in rows[0] if key in ("index", "")]
            for place, row in enumerate(rows):
                number = int(_number(row, numbers[0], path)) if numbers else place
                difficulty[number] = _number(row, "instruction_difficulty", path)
    return Leaderboard(difficulty, gamed)


def _files_of(place: str) -> list[Path]:
    if place == "hub":
        return [_from_hub(DIFFICULTY_FILE), _from_hub(GAMED_FILE)]
    path = Path(place)
    if path.is_dir():
        found = [path / name for name in (DIFFICULTY_FILE, GAMED_FILE) if (path / name).is_file()]
        if not found:
            raise UserError(f"{path} holds neither {DIFFICULTY_FILE} nor {GAMED_FILE}.")
        return found
    if not path.is_file():
        raise UserError(f"{path} does not exist. Give {DIFFICULTY_FILE} and {GAMED_FILE}, their folder, or hub.")
    return [path]


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(REPOSITORY, name, repo_type="dataset"))
    except OSError as error:
        first = first_sentence(error)
        raise UserError(
            f"{name} of the data set {REPOSITORY} could not be had from the Hub ({first}). Download it once, and give "
            f"its folder to --leaderboard."
        ) from None


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not rows or "instruction_difficulty" not in rows[0]:
        have = ", ".join(key or "(no name)" for key in rows[0]) if rows else "no rows"
        raise UserError(f"{path} has no column instruction_difficulty; it has {have}.")
    return rows


def _number(row: dict[str, str], key: str, path: Path) -> float:
    try:
        value = float(row[key])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: {row.get(key)!r} in column {key} is no number.") from None
    if not np.isfinite(value):
        raise UserError(f"{path}: {row[key]!r} in column {key} is no finite number.")
    return value
