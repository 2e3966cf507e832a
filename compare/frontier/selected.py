"""Each method's point chosen on validation prompts, and reported on others: no winner's curse.

The best of several settings by their scores on some prompts is, on those prompts, better than it is: of m equal ones
by about sqrt(2 log m) standard errors. So the choice is made on prompts of its own; given the choice, the figures on
the reported prompts are those of any one policy.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.artifacts.settings import nearest
from ppo_vs_dpo.artifacts.stage import StageContext
from ppo_vs_dpo.compare.config import COEFFICIENT, KIND, METHODS, VALIDATION_PROMPTS, CompareStage
from ppo_vs_dpo.compare.estimates.judgements import table_of
from ppo_vs_dpo.compare.sampling.completions import Draws, split_draws
from ppo_vs_dpo.compare.sampling.contenders import Contender
from ppo_vs_dpo.compare.sampling.gather import Gatherer, score_all
from ppo_vs_dpo.compare.sampling.policies import REFERENCE, Policy, Prompts, validation_prompts
from ppo_vs_dpo.models.passes.inference import Ranks
from ppo_vs_dpo.preferences.judging.llm import Comparison, LLMJudge
from ppo_vs_dpo.preferences.schema import text_of


@dataclass(frozen=True)
class Candidate:
    """One setting of a method.

    Attributes:
        name: method and all that is varied, ``rloo,kl_coef=0.1``; the same in every run.
        policy: the policy's own name, ``ppo,advantage=rloo,kl_coef=0.1``.
        point: what is varied.
        last: the main run at its end.
        score: mean on the validation prompts by the judge that chooses.
        error: its standard error.
        tokens: sampled for that.
        flops: spent on that (2 a parameter and token).
        seconds: taken for that.
    """

    name: str
    policy: str
    point: dict[str, Any]
    last: bool = False
    score: float = 0.0
    error: float = 0.0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    @property
    def job(self) -> str:
        """The training that it is of: a checkpoint is the main run's."""
        return self.policy.partition(",step=")[0]


@dataclass(frozen=True)
class Selection:
    """What was chosen.

    Attributes:
        by: who chose.
        prompts: on how many validation prompts.
        candidates: method -> its settings.
    """

    by: str
    prompts: int
    candidates: dict[str, list[Candidate]]

    def chosen(self, method: str) -> Candidate:
        """The candidate with the highest score, of equal ones the first."""
        return best(self.candidates[method])

    def tuning(self) -> dict[str, dict[str, Any]]:
        """What the report says under ``settings.tuning``."""
        found = {}
        for method, candidates in self.candidates.items():
            scores = {
                one.name: {"policy": one.policy, "point": one.point, "score": one.score, "error": one.error}
                for one in candidates
            }
            found[method] = {
                "settings": len(candidates),
                "chosen_on": "validation",
                "by": self.by,
                "prompts": self.prompts,
                "chosen": self.chosen(method).name,
                "last": next((one.name for one in candidates if one.last), None),
                "candidates": scores,
            }
        return found

    def apply(self, policies: list[Policy], settings: CompareStage) -> tuple[list[Policy], CompareStage]:
        """Policies and settings for the held-out prompts: what was not chosen is a point of the frontier only, and
        ``best_of`` of a method is over its chosen point."""
        chosen = {self.chosen(method).policy for method in self.candidates}
        others = {one.policy for ones in self.candidates.values() for one in ones} - chosen
        # A chosen checkpoint is a policy like any other.
        found = [replace(p, checkpoint=p.name in others or (p.checkpoint and p.name not in chosen)) for p in policies]
        of = {method: self.chosen(method).policy for method in self.candidates}
        best_of = {of.get(name, name): ns for name, ns in (settings.best_of or {}).items()}
        return found, replace(settings, best_of=best_of)

    def name_all(
        self, contenders: list[Contender], points: list[Contender]
    ) -> tuple[list[Contender], list[Contender]]:
        """Contenders under their methods' names, and every setting, the chosen ones too, under a name that all runs
        have."""
        method_of = {self.chosen(method).policy: method for method in self.candidates}
        names = {one.policy: one for ones in self.candidates.values() for one in ones}
        own, twins = [], []
        for contender in contenders:
            method = method_of.get(contender.base if contender.n is not None else contender.name)
            if method is None:
                own.append(contender)
            elif contender.n is not None:
                point = {"n": contender.n, "policy": method}
                own.append(replace(contender, name=f"best_of_{contender.n},policy={method}", point=point, base=method))
            else:
                own.append(replace(contender, name=method, point={}, ends=False))
                twins.append(contender)
        settings = [
            replace(one, name=names[one.name].name, point=names[one.name].point, ends=names[one.name].last)
            for one in [*twins, *points]
            if one.name in names
        ]
        order = [one.name for ones in self.candidates.values() for one in ones]
        return own, sorted(settings, key=lambda one: order.index(one.name))


def tuning_of(settings: CompareStage, policies: list[Policy]) -> dict[str, dict[str, Any]]:
    """Method -> how many settings were tried and where the main one was chosen: as declared, else as far
    as the run shows.
    """
    found = {}
    for name in METHODS:
        trained = sum(policy.method == name and not policy.checkpoint for policy in policies)
        if trained:
            declared = (settings.tuning or {}).get(name, {})
            found[name] = {
                "settings": max(declared.get("settings", 1), trained),
                "chosen_on": declared.get("chosen_on", "unknown"),
            }
    return found


def best(candidates: list[Candidate]) -> Candidate:
    """The one with the highest score, of equal ones the first."""
    return max(candidates, key=lambda one: one.score)  # max keeps the first of equal ones


def candidates_of(run: RunFolder, policies: list[Policy]) -> dict[str, list[Candidate]]:
    """Method -> its settings, the main run first.

    Raises:
        UserError: no method has more than one.
    """
    found: dict[str, list[Candidate]] = {}
    for method in METHODS:
        own = [policy for policy in policies if policy.method == method]
        if not own:
            continue
        stage = own[0].name.partition(",")[0]
        section = OmegaConf.to_container(run.config.get(stage) or OmegaConf.create({}), resolve=True)
        of_stage = [policy for policy in policies if policy.name.partition(",")[0] == stage]
        keys = [key for policy in of_stage for key in policy.point if key not in (*KIND[stage], "step")]
        varied = list(dict.fromkeys([key for key in (COEFFICIENT[method],) if key in section] + keys))
        figures = (run.done(stage) or {}).get("figures") or {}
        found[method] = []
        for policy in own:
            point = {key: policy.point.get(key, section.get(key)) for key in varied}
            if policy.checkpoint:
                point = {"step": policy.point["step"]}
            elif not varied:
                point = {"step": figures.get("updates", figures.get("steps", "last"))}
            name = ",".join([method, *(f"{key}={value}" for key, value in sorted(point.items()))])
            found[method].append(Candidate(name, policy.name, point, policy.name == stage))
    if all(len(ones) < 2 for ones in found.values()):
        raise UserError(
            "compare.select: no method of this run has more than one setting, so there is nothing to choose. Give "
            "ppo.sweep, dpo.sweep or compare.checkpoints, or leave compare.select out."
        )
    return found


def choose(
    context: StageContext,
    settings: CompareStage,
    policies: list[Policy],
    reported: Prompts,
    judges: tuple[list[Any], list[LLMJudge]],
    ranks: Ranks,
) -> Selection:
    """Let a judge choose each method's point on validation prompts; all ranks must call this.

    A judge that scores goes by its mean score; one that reads by how often it prefers the setting's completion to the
    reference's, over both orders.

    Raises:
        UserError: no such judge, nothing to choose among, no validation prompts, or a judge that reads stopped early.
    """
    select = settings.select or {}
    by, wanted = str(select["by"]), int(select.get("prompts", VALIDATION_PROMPTS))
    scoring, reading = judges
    judge = next((one for one in [*scoring, *reading] if one.name == by), None)
    if judge is None:
        known = [one.name for one in [*scoring, *reading]]
        raise UserError(
            f"compare.select.by: there is no judge {by}.{nearest(by, known)} There is: {', '.join(known)}."
        )
    candidates = candidates_of(context.run, policies)
    prompts = validation_prompts(context.run, reported, wanted, settings.near_duplicate)
    plain = {"baseline_draws": 1, "pool_size": 0, "best_of": {}, "other_temperatures": []}
    gatherer = Gatherer(context, replace(settings, **plain), prompts, ranks)
    names = {one.policy for ones in candidates.values() for one in ones}
    # As checkpoints: nothing beside their completions is wanted here.
    drawn = [replace(policy, checkpoint=True) for policy in policies if policy.name in names]
    if judge in reading:
        drawn = [*drawn, *(policy for policy in policies if policy.name == REFERENCE)]
    gathered = gatherer.all(drawn)
    draws = {one.policy: one for table, _ in gathered for one in split_draws(table, len(prompts))}
    learned = {policy.name: extra for policy, (_, extra) in zip(drawn, gathered, strict=True)}
    gatherer.release()
    if judge in scoring:
        score_all(judge, list(draws.values()), prompts, settings.workers, ranks)
        values = {name: one.scores[by].mean(axis=1) for name, one in draws.items()}
    else:
        ranks.step = f"validation prompts by {by}"
        values = ranks.agree(lambda: preferences(judge, draws, prompts))
    measured = {
        method: [_measured(one, values[one.policy], learned[one.policy]) for one in ones]
        for method, ones in candidates.items()
    }
    return Selection(by, len(prompts), measured)


def _measured(one: Candidate, values: np.ndarray, learned: dict[str, Any]) -> Candidate:
    known = values[np.isfinite(values)]
    error = float(known.std(ddof=1) / np.sqrt(len(known))) if len(known) > 1 else 0.0
    tokens, seconds = int(learned.get("tokens_generated") or 0), float(learned.get("seconds") or 0.0)
    flops = 2.0 * float(learned.get("parameters") or 0) * tokens
    return replace(one, score=float(known.mean()), error=error, tokens=tokens, flops=flops, seconds=seconds)


def preferences(judge: LLMJudge, draws: dict[str, Draws], prompts: Prompts) -> dict[str, np.ndarray]:
    """Policy -> ``(P,)`` how far its completion is preferred to the reference's, NaN where no verdict was named.

    Raises:
        UserError: the judge stopped before its end, or named no verdict at all on some policy.
    """
    first = {name: [one.texts[row * one.shape[1]] for row in range(len(prompts))] for name, one in draws.items()}
    comparisons = [
        Comparison(name, REFERENCE, prompts.ids[row], text_of(prompts.prompts[row]), text, first[REFERENCE][row])
        for name, texts in first.items()
        if name != REFERENCE
        for row, text in enumerate(texts)
    ]
    verdicts, stopped = judge.judge(comparisons, lambda done, total: None)
    if stopped:
        raise UserError(
            f"compare.select: the judge {judge.name} stopped early, and no point was chosen: {stopped}. All replies "
            f"so far are kept; the same command goes on."
        )
    table, _ = table_of(verdicts, prompts)
    found = {}
    for name in first:
        if name == REFERENCE:
            continue
        if table is None or not table.has(name, REFERENCE):
            raise UserError(f"compare.select: the judge {judge.name} named no verdict on any answer of {name}.")
        found[name] = table.of(name, REFERENCE)
    return found


def spread_of_budget(scores: np.ndarray, heldout: np.ndarray) -> np.ndarray:
    """``(m,)`` expected held-out value of the best on validation among 1, 2, ... m settings tried, drawn at random.

    Of m settings sorted by their validation score, the i-th best is the best of a random subset of j with probability
    C(m - i, j - 1) / C(m, j) (Dodge et al. 2019, 1909.03004, section 3.1, without replacement).

    Args:
        scores: ``(m,)`` on validation prompts.
        heldout: ``(m,)`` on the reported prompts.
    """
    from math import comb

    m = len(scores)
    order = np.argsort(-scores, kind="stable")
    found = []
    for j in range(1, m + 1):
        shares = np.array([comb(m - 1 - i, j - 1) / comb(m, j) for i in range(m)])
        found.append(float(shares @ heldout[order]))
    return np.array(found)
