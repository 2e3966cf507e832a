"""The optimal frontier of a report and how far from it each method ended: exact where the space can be enumerated.

pi*(y|x) = p(y|x) e^{r(x, y) / beta} / Z(x), with one beta for all prompts, has the highest mean reward of all policies
with its mean KL. J* - J = beta KL(pi || pi*) ranks methods with no judge (papers.md 3.1 and 3.8.5).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.compare.config import COEFFICIENT, CompareStage
from ppo_vs_dpo.compare.estimates.win_rates import Settings
from ppo_vs_dpo.compare.frontier.enumeration import Space, log_probabilities, space_of
from ppo_vs_dpo.compare.frontier.exact import kl_divergence, optimal_policy, suboptimality
from ppo_vs_dpo.compare.frontier.tilted import tilt, usable_betas
from ppo_vs_dpo.compare.sampling.completions import Draws
from ppo_vs_dpo.compare.sampling.contenders import PROXY, Contender
from ppo_vs_dpo.compare.sampling.gather import Gatherer
from ppo_vs_dpo.compare.sampling.policies import REFERENCE, Policy, Prompts
from ppo_vs_dpo.compare.statistics.intervals import mean_interval
from ppo_vs_dpo.models.loading.pretrained import eos_token_ids, load_policy
from ppo_vs_dpo.models.passes.inference import Ranks
from ppo_vs_dpo.models.text.prompts import decode_completion

# One grid for all runs, so that runs can be pooled beta by beta.
BETAS = np.geomspace(0.02, 50.0, 60)
# Fewer draws a prompt than this give no estimate.
FEW_DRAWS = 8


def coefficients_of(run: RunFolder, contenders: list[Contender]) -> dict[str, float]:
    """Policy -> the beta of the objective it was trained on; PPO without a penalty and other policies have none."""
    found = {}
    for contender in contenders:
        figures = (run.done(contender.draws.policy) or {}).get("figures") or {}
        beta = figures.get(COEFFICIENT.get(contender.method, ""))
        if beta:
            found[contender.name] = float(beta)
    return found


@dataclass(frozen=True)
class Enumerated:
    """Every completion of every prompt: what only the models can say about them.

    Attributes:
        space: the completions.
        rewards: judge -> ``P`` arrays ``(Y,)``.
        laws: policy -> ``P`` arrays ``(Y,)`` of probabilities.
    """

    space: Space
    rewards: dict[str, list[np.ndarray]]
    laws: dict[str, list[np.ndarray]]


def asked(scoring: list[Any]) -> list[Any]:
    """The judges whose rewards have an optimum here: the gold function and the reward model."""
    return [judge for judge in scoring if judge.name in ("gold", PROXY)]


def enumerate_policies(
    contenders: list[Contender], policies: list[Policy], scoring: list[Any], gatherer: Gatherer, settings: CompareStage
) -> Enumerated | None:
    """Probabilities and rewards of all completions, or ``None`` where there are too many.

    All ranks must call this: each works on its share of the prompts, which have equally many completions.
    """
    judges = asked(scoring)
    if not judges:
        return None
    reference, prompts, ranks = gatherer.reference, gatherer.prompts, gatherer.ranks
    ends = eos_token_ids(reference.model, reference.tokenizer)
    limit = settings.enumerate_up_to // len(prompts)
    space = space_of(reference.model, ends, settings.max_new_tokens, limit)
    if space is None:
        return None
    ranks.step = "enumeration of all completions"
    ids, finished = space.completions()
    texts = [decode_completion(reference.tokenizer, one) for one in ids]
    rewards = {judge.name: score_all_texts(judge, prompts, texts, finished, ranks) for judge in judges}
    pad, temperature = reference.tokenizer.pad_token_id, settings.temperature

    def laws(model) -> list[np.ndarray]:
        rows = ranks.share(len(prompts))
        own = [log_probabilities(model, reference.prompt_ids[row], space, pad, temperature) for row in rows]
        return [np.exp(one) for one in ranks.merge(own, len(prompts))]

    found = {REFERENCE: laws(reference.model)}
    by_name = {policy.name: policy for policy in policies}
    for contender in contenders:
        policy = by_name.get(contender.draws.policy) if contender.n is None else None
        if policy is not None and policy.model and contender.kl() is not None and policy.name != REFERENCE:
            frozen = ranks.load(load_policy, policy.model, gatherer.model_config)
            found[contender.name] = laws(frozen.model)
            frozen.release()
    return Enumerated(space, rewards, found)


def optimal_figures(
    contenders: list[Contender],
    draws: list[Draws],
    scoring: list[Any],
    enumerated: Enumerated | None,
    run: RunFolder,
    settings: CompareStage,
    how: Settings,
) -> dict[str, Any] | None:
    """The section ``optimum`` of the report, or ``None`` where nothing honest can be said."""
    judges = [judge.name for judge in asked(scoring)]
    if not judges:
        return None
    betas = coefficients_of(run, contenders)
    if enumerated is not None:
        return exact(enumerated, betas, how)
    return estimated(contenders, draws, judges, betas, settings, how)


def entry(how: Settings, **columns: np.ndarray) -> dict[str, Any]:
    """Means over prompts of ``(P,)`` columns, each with its interval."""
    interval = mean_interval(np.stack(list(columns.values()), axis=1), **how.kwargs())
    found = {}
    for number, name in enumerate(columns):
        found[name], found[f"{name}_ci"] = float(interval.mean[number]), interval.ci(number)
    return found


def estimated(
    contenders: list[Contender],
    draws: list[Draws],
    judges: list[str],
    betas: dict[str, float],
    settings: CompareStage,
    how: Settings,
) -> dict[str, Any] | None:
    """By importance weights on all draws of the reference.

    Points of the curve that hang on few draws are left out, and the curve is a lower estimate. J* is bounded from
    below, so that J* - J is *at least* what is given (``at_least``); the lower end of its interval holds, its upper
    end says nothing.
    """
    own = [d for d in draws if d.policy == REFERENCE and d.temperature == settings.temperature]
    n = sum(one.shape[1] for one in own)
    if n < FEW_DRAWS:
        return None
    curves, gaps = {}, []
    for judge in judges:
        rewards = np.concatenate([one.scores[judge] for one in own], axis=1)
        curves[judge] = [
            {
                "beta": one.beta,
                **entry(how, kl=one.kl, reward=one.reward),
                "ess": float(one.ess.mean()),
            }
            for one in usable_betas(rewards, BETAS)
        ]
        for contender in contenders:
            if contender.name not in betas or contender.kl() is None:
                continue
            beta = betas[contender.name]
            best = tilt(rewards, beta)
            about = {"policy": contender.name, "judge": judge, "beta": beta, "ess": float(best.ess.mean())}
            # From so few draws J* is known from below only: a lower bound holds for any rewards, an estimate does not.
            objective, optimum = contender.score(judge) - beta * contender.kl(), best.least_optimum
            found = entry(how, objective=objective, optimum=optimum, gap=optimum - objective)
            gaps.append({**about, **found, "at_least": True})
    return {"kind": "importance weights", "draws": n, "curves": curves, "gaps": gaps, "policies": None}


def exact(enumerated: Enumerated, betas: dict[str, float], how: Settings) -> dict[str, Any]:
    """From every completion of every prompt, its probability under every policy, its rewards."""
    measured, rewards = enumerated.laws, enumerated.rewards
    start = measured[REFERENCE]
    curves: dict[str, list[dict[str, Any]]] = {}
    gaps = []
    for judge, of_prompt in rewards.items():
        curves[judge] = []
        for beta in sorted(BETAS, reverse=True):
            best = [optimal_policy(p, r, beta) for p, r in zip(start, of_prompt, strict=True)]
            kl = np.array([kl_divergence(pi, p) for pi, p in zip(best, start, strict=True)])
            reward = np.array([pi @ r for pi, r in zip(best, of_prompt, strict=True)])
            curves[judge].append({"beta": float(beta), **entry(how, kl=kl, reward=reward), "ess": None})
        for name, beta in betas.items():
            if name in measured:
                rows = list(zip(measured[name], start, of_prompt, strict=True))
                gap = np.array([suboptimality(pi, p, r, beta) for pi, p, r in rows])
                objective = np.array([pi @ r - beta * kl_divergence(pi, p) for pi, p, r in rows])
                figures = entry(how, objective=objective, optimum=objective + gap, gap=gap)
                gaps.append({"policy": name, "judge": judge, "beta": beta, "ess": None, **figures})
    about = {}
    for name, pi in measured.items():
        kl = np.array([kl_divergence(one, p) for one, p in zip(pi, start, strict=True)])
        means = {judge: np.array([a @ b for a, b in zip(pi, r, strict=True)]) for judge, r in rewards.items()}
        about[name] = {"kl": float(kl.mean()), "rewards": {judge: float(m.mean()) for judge, m in means.items()}}
    return {"kind": "exact", "completions": enumerated.space.size, "curves": curves, "gaps": gaps, "policies": about}


def score_all_texts(
    judge: Any, prompts: Prompts, texts: list[str], finished: list[bool], ranks: Ranks
) -> list[np.ndarray]:
    """``P`` arrays ``(Y,)``: a judge's score of every completion of every prompt."""

    def of(rows: list[int]) -> list[np.ndarray]:
        return [np.asarray(judge.score([prompts.prompts[row]] * len(texts), texts, finished)) for row in rows]

    if judge.heavy:
        return ranks.merge(of(ranks.share(len(prompts))), len(prompts))
    return ranks.agree(lambda: of(list(range(len(prompts)))))
