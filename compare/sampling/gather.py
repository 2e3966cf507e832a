"""All completions of a comparison: what is on disk is kept, the rest is drawn, several policies at a time if asked."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ppo_vs_dpo.artifacts.files import read_parquet
from ppo_vs_dpo.artifacts.guards.outputs import content_id
from ppo_vs_dpo.artifacts.stage import StageContext
from ppo_vs_dpo.compare.config import CompareStage
from ppo_vs_dpo.compare.sampling.completions import (
    Draws,
    Reference,
    completions_key,
    completions_path,
    draw,
    load_or_draw,
)
from ppo_vs_dpo.compare.sampling.elsewhere import NoReference, completions_elsewhere
from ppo_vs_dpo.compare.sampling.policies import REFERENCE, Policy, Prompts, model_content
from ppo_vs_dpo.models.passes.inference import Ranks
from ppo_vs_dpo.models.sampling.forked import in_processes, may_fork
from ppo_vs_dpo.models.training import model_settings


class Gatherer:
    """Draws, or finds on disk, the completions of every policy of a run."""

    def __init__(self, context: StageContext, settings: CompareStage, prompts: Prompts, ranks: Ranks):
        self.context, self.settings, self.prompts, self.ranks = context, settings, prompts, ranks
        # Beside the stages: what was drawn outlives a change of any setting that it does not depend on.
        self.folder = context.run.cache("completions")
        self.model_config = model_settings(context)
        # Whose tokens and probabilities they are; pairs are what log-probabilities are compared on, too.
        done, pairs = context.run.require(REFERENCE), context.run.done("pairs") or {}
        self.reference_identity = [
            model_content(context.run, REFERENCE, done),
            content_id(pairs, "test"),
            vars(self.model_config),
        ]
        # A comparison of outputs alone knows no model.
        self.has_model = "completions" not in (done.get("figures") or {})
        self._reference: Reference | NoReference | None = None

    @property
    def reference(self) -> Reference | NoReference:
        """The reference policy, loaded when first needed."""
        if self._reference is None and not self.has_model:
            self._reference = NoReference(self.prompts)
        if self._reference is None:
            folder = self.context.run.stage_dir(REFERENCE) / "model"
            test = self.context.run.path("pairs", "test.parquet")
            pairs = read_parquet(test, ["prompt", "chosen", "rejected"]) if test.is_file() else ()
            self._reference = Reference(folder, self.prompts, self.settings, self.model_config, self.ranks, pairs)
        return self._reference

    def release(self) -> None:
        """Give the reference policy's memory back; it is loaded again when needed."""
        if isinstance(self._reference, Reference):
            self._reference.frozen.release()
        self._reference = None

    def key(self, policy: Policy) -> str:
        """What the policy's completions depend on, hashed."""
        return completions_key(policy, self.prompts, self.settings, self.context.seed, self.reference_identity)

    def is_done(self, policy: Policy) -> bool:
        """Whether the policy's completions are on disk."""
        return completions_path(self.folder, policy, self.key(policy)).is_file()

    def one(self, policy: Policy, report_progress: bool = True) -> tuple[pa.Table, dict[str, Any]]:
        """One policy's completions, and what was learned with them."""

        def make() -> tuple[pa.Table, dict[str, Any]]:
            def progress(done: int, total: int) -> None:
                if report_progress:
                    self.context.progress(done, total, f"completions of {policy.name}")

            if policy.completions is not None:
                return completions_elsewhere(policy, self.reference, self.settings)
            return draw(policy, self.reference, self.settings, self.context.seed, progress)

        self.ranks.step = f"completions of {policy.name}"
        return load_or_draw(policy, self.folder, self.key(policy), self.ranks, make)

    def all(self, policies: list[Policy]) -> list[tuple[pa.Table, dict[str, Any]]]:
        """Completions of every policy, in order, and what was learned with each; all ranks must call this."""
        missing = [policy for policy in policies if not self.is_done(policy)]
        if len(missing) > 1 and may_fork(self.settings.workers, self.ranks.alone):
            # The reference has most to draw: it goes first.
            ordered = sorted(missing, key=lambda policy: policy.name != REFERENCE)
            for number, (policy, _) in enumerate(in_processes(self._draw, ordered, self.settings.workers)):
                self.context.progress(80 * (number + 1) / len(ordered), 100, f"completions of {policy.name}")
        found = []
        for number, policy in enumerate(policies):
            found.append(self.one(policy, report_progress=False))
            self.context.progress(80 * (number + 1) / len(policies), 100, f"completions of {policy.name}")
        return found

    def _draw(self, policy: Policy) -> None:
        self.one(policy, report_progress=False)


# Rows scored at once by one process; fixed, so that the number of processes changes no figure.
SCORING_ROWS = 2048


def score_all(judge: Any, draws: list[Draws], prompts: Prompts, workers: int, ranks: Ranks) -> None:
    """Let one scoring judge score every completion; fills ``draws[i].scores[judge.name]`` on every rank.

    A model's rows are shared between the ranks. A function is called on the main process.
    """
    ranks.step = f"scores of {judge.name}"
    rows: list[tuple[int, str, bool]] = []
    for one in draws:
        prompt_of = np.repeat(np.arange(len(prompts)), one.shape[1]).tolist()
        rows += zip(prompt_of, one.texts, one.finished.ravel().tolist(), strict=True)
    if not judge.heavy:
        scores = ranks.agree(lambda: judge.score(*_columns(rows, prompts)))
    else:
        # The same completion is scored once: in another batch its score would differ in the last digit, and a tie
        # would be won by rounding.
        distinct = list(dict.fromkeys(rows))
        of = dict(zip(distinct, _by_model(judge, distinct, prompts, workers, ranks), strict=True))
        scores = np.array([of[row] for row in rows])
    before = 0
    for one in draws:
        one.scores[judge.name] = scores[before : before + one.finished.size].reshape(one.shape)
        before += one.finished.size


# Held-out pairs on which a judge is checked, at most.
CHECKED_PAIRS = 256


def heldout_accuracy(judge: Any, pairs: Sequence[dict[str, Any]], workers: int, ranks: Ranks) -> dict[str, int]:
    """In how many of the held-out pairs a scoring judge prefers the chosen side; ties count as neither right nor
    judged.

    Returns:
        ``n`` and ``right``. All ranks must call this.
    """
    some = [pairs[row] for row in range(min(len(pairs), CHECKED_PAIRS))]
    if not some:
        return {"n": 0, "right": 0}
    prompts = Prompts([pair["prompt"] for pair in some], [str(row) for row in range(len(some))])
    sides = [pair[side] for side in ("chosen", "rejected") for pair in some]
    texts = [side if isinstance(side, str) else str(side[-1]["content"]) for side in sides]
    rows = [(number % len(some), text, True) for number, text in enumerate(texts)]
    ranks.step = f"held-out pairs by {judge.name}"
    if judge.heavy:
        scores = _by_model(judge, rows, prompts, workers, ranks)
    else:
        scores = ranks.agree(lambda: judge.score(*_columns(rows, prompts)))
    margin = scores[: len(some)] - scores[len(some) :]
    return {"n": int((margin != 0).sum()), "right": int((margin > 0).sum())}


def _columns(rows: list[tuple[int, str, bool]], prompts: Prompts) -> tuple[list, list[str], list[bool]]:
    return [prompts.prompts[row] for row, _, _ in rows], [text for _, text, _ in rows], [end for _, _, end in rows]


def _by_model(
    judge: Any, rows: list[tuple[int, str, bool]], prompts: Prompts, workers: int, ranks: Ranks
) -> np.ndarray:
    """A model's scores ``(N,)`` of completions: each rank scores its share, or forked processes a part each."""
    own = [rows[number] for number in ranks.share(len(rows))]
    starts = range(0, len(own), SCORING_ROWS)

    def part(start: int) -> np.ndarray:
        return judge.score(*_columns(own[start : start + SCORING_ROWS], prompts))

    if len(starts) > 1 and may_fork(workers, ranks.alone):
        found = dict(in_processes(part, starts, workers))
        return np.concatenate([found[start] for start in starts])
    return np.array(ranks.merge(np.concatenate([part(start) for start in starts]), len(rows)))
