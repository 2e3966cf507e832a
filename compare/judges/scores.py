"""Judges that give each completion a number: a Python function (the testbed's gold reward), a reward model.

The higher score wins, equal scores tie. Such a judge has no order of presentation and never fails to parse.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.config import ModelConfig
from ppo_vs_dpo.models.loading.heads import load_reward
from ppo_vs_dpo.models.passes.inference import Ranks
from ppo_vs_dpo.preferences.recipes.functions import score_with
from ppo_vs_dpo.preferences.recipes.named import load_gold
from ppo_vs_dpo.preferences.schema import as_answer
from ppo_vs_dpo.reward_model.scorer import RewardScorer


class FunctionJudge:
    """A Python function ``f(prompts, completions, finished=...) -> list[float]``, named ``package.module:function``.

    Attributes:
        in_sample: some policy was trained to please this judge.
        heavy: worth sharing between processes.
    """

    in_sample = False
    heavy = False

    def __init__(self, function: str, name: str = "gold"):
        self.name, self.function = name, function
        self._score: Callable[..., list[float]] = load_gold(function)

    def identity(self) -> dict[str, Any]:
        """What its verdicts depend on."""
        return {"kind": "function", "function": self.function}

    def score(self, prompts: Sequence, completions: Sequence[str], finished: Sequence[bool]) -> np.ndarray:
        """``(N,)`` scores.

        Raises:
            UserError: the function gave another number of scores, or one that is not a number.
        """
        ends = {"finished": list(finished)}
        scores = score_with(self._score, f"judge {self.name}", prompts, completions, finite=False, **ends)
        return check_scores(self.name, scores, prompts)


class RewardModelJudge:
    """The reward model of the run: *in-sample* for PPO, which was trained to raise its scores."""

    in_sample = True
    heavy = True

    def __init__(
        self,
        folder: str | Path,
        model_config: ModelConfig,
        ranks: Ranks,
        name: str = "reward_model",
        head: str | None = None,
    ):
        self.name, self.folder, self.head = name, str(folder), head
        loader = functools.partial(load_reward, head=head)
        self.frozen = ranks.load(loader, folder, model_config)
        self.scorer = RewardScorer.of(self.frozen.model, folder, model_config, batch_size=256, head=head)

    def identity(self) -> dict[str, Any]:
        """What its verdicts depend on."""
        # In sample, it is the run's own: two equal runs in two places have one report.
        model = Path(self.folder).parent.name if self.in_sample else self.folder
        return {"kind": "reward_model", "model": model} | ({"head": self.head} if self.head else {})

    def check_context(self, prompts: Sequence, max_new_tokens: int) -> None:
        """The longest prompt and a whole response must fit, before anything is sampled.

        Raises:
            UserError: they do not.
        """
        self.scorer.check_context(prompts, max_new_tokens, f"judge {self.name}", "compare.max_new_tokens")

    def score(self, prompts: Sequence, completions: Sequence[str], finished: Sequence[bool]) -> np.ndarray:
        """``(N,)`` scores; conversations are continued by an assistant message."""
        answers = [as_answer(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        return check_scores(self.name, self.scorer.score(list(prompts), answers, finished=list(finished)), prompts)


def check_scores(judge: str, scores: Sequence[float], prompts: Sequence) -> np.ndarray:
    """Scores as an array.

    Raises:
        UserError: the wrong number of them, or one that is not finite; names the prompt.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != (len(prompts),):
        raise UserError(f"judge {judge} gave {scores.size} scores for {len(prompts)} completions.")
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise UserError(
            f"judge {judge} gave {scores[bad[0]]} for completion {bad[0]} (prompt {str(prompts[bad[0]])[:80]!r}), and "
            f"{len(bad)} such scores in all. A score must be a finite number."
        )
    return scores


def preference_by_score(
    ours: np.ndarray, theirs: np.ndarray, our_weights: np.ndarray, their_weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Expected preference and share of ties on every prompt, over all pairs of draws.

    Args:
        ours: ``(P, A)`` scores.
        theirs: ``(P, B)`` scores.
        our_weights: ``(P, A)``, rows sum to 1.
        their_weights: ``(P, B)``, rows sum to 1.

    Returns:
        ``(preference, ties)``, each ``(P,)``.
    """
    gap = ours[:, :, None] - theirs[:, None, :]
    above = np.einsum("pa,pab,pb->p", our_weights, (gap > 0).astype(np.float64), their_weights)
    below = np.einsum("pa,pab,pb->p", our_weights, (gap < 0).astype(np.float64), their_weights)
    ties = 1.0 - above - below
    return 0.5 + 0.5 * (above - below), np.where(ties < 1e-12, 0.0, ties)
