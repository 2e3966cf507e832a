"""The optimal frontier of a report and how far from it each method ended: exact where the space can be enumerated.

pi*(y|x) = p(y|x) e^{r(x, y) / beta} / Z(x), with one beta for all prompts, has the highest mean reward of all policies
with its mean KL. J* - J = beta KL(pi || pi*) ranks methods with no judge (papers.md 3.1 and 3.8.5).
"""

from typing import Any

import numpy as np

from artifacts.run import RunFolder
from compare.completions import Draws, on_device
from compare.config import CompareStage
from compare.contenders import PROXY, Contender
from compare.enumeration import Space, log_probabilities, space_of
from compare.gather import Gatherer
from compare.measure import Settings
from compare.optimum import kl_divergence, optimal_policy, suboptimality
from compare.policies import REFERENCE, Policy, Prompts
from compare.statistics import mean_interval
from compare.tilted import tilt, usable_betas
from models.loading import eos_token_ids, load_policy
from models.prompts import decode_completion

# One grid for all runs, so that runs can be pooled beta by beta.
BETAS = np.geomspace(0.02, 50.0, 60)
# Fewer draws a prompt than this give no estimate.
FEW_DRAWS = 8
# Under which name a method's done.json has the beta it was trained with.
COEFFICIENT = {"ppo": "kl_coef", "dpo": "beta"}


def coefficients_of(run: RunFolder, contenders: list[Contender]) -> dict[str, float]:
    """Policy -> the beta of the objective it was trained on; PPO without a penalty and other policies have none."""
    found = {}
    for contender in contenders:
        figures = (run.done(contender.name) or {}).get("figures") or {}
        beta = figures.get(COEFFICIENT.get(contender.method, ""))
        if beta:
            found[contender.name] = float(beta)
    return found


def optimal_figures(
    contenders: list[Contender],
    policies: list[Policy],
    draws: list[Draws],
    scoring: list[Any],
    gatherer: Gatherer,
    settings: CompareStage,
    how: Settings,
) -> dict[str, Any] | None:
    """The section ``optimum`` of the report, or ``None`` where nothing honest can be said.

    Args:
        contenders: the policies at the main temperature.
        policies: where their models are.
        draws: all completions with their scores.
        scoring: the judges that score.
        gatherer: has the reference policy.
        settings: of the stage.
        how: of the intervals.
    """
    judges = [judge for judge in scoring if judge.name in ("gold", PROXY)]
    betas = coefficients_of(gatherer.context.run, contenders)
    if not judges:
        return None
    reference = gatherer.reference
    ends = eos_token_ids(reference.model, reference.tokenizer)
    limit = settings.enumerate_up_to // len(gatherer.prompts)
    space = space_of(reference.model, ends, settings.max_new_tokens, limit)
    if space is not None:
        return exact(space, contenders, policies, judges, betas, gatherer, settings, how)
    return estimated(contenders, draws, [judge.name for judge in judges], betas, settings, how)


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
    """By importance weights on all draws of the reference; points that hang on few draws are left out."""
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
            if not best.usable:
                gaps.append({**about, "refused": f"{about['ess']:.1f} effective draws of {n} a prompt"})
                continue
            objective = contender.score(judge) - beta * contender.kl()
            gaps.append(
                {**about, **entry(how, objective=objective, optimum=best.optimum, gap=best.optimum - objective)}
            )
    return {"kind": "importance weights", "draws": n, "curves": curves, "gaps": gaps, "policies": None}


def exact(
    space: Space,
    contenders: list[Contender],
    policies: list[Policy],
    judges: list[Any],
    betas: dict[str, float],
    gatherer: Gatherer,
    settings: CompareStage,
    how: Settings,
) -> dict[str, Any]:
    """By enumeration: every completion of every prompt, its probability under every policy, its rewards."""
    reference, prompts = gatherer.reference, gatherer.prompts
    ids, finished = space.completions()
    texts = [decode_completion(reference.tokenizer, one) for one in ids]
    rewards = {judge.name: score_all_texts(judge, prompts, texts, finished) for judge in judges}
    pad, temperature = reference.tokenizer.pad_token_id, settings.temperature

    def laws(model) -> list[np.ndarray]:
        found = [log_probabilities(model, prompt, space, pad, temperature) for prompt in reference.prompt_ids]
        return [np.exp(one) for one in found]

    start = laws(reference.model)
    by_name = {policy.name: policy for policy in policies}
    measured: dict[str, list[np.ndarray]] = {REFERENCE: start}
    for contender in contenders:
        policy = by_name.get(contender.name)
        if policy is not None and policy.model and contender.kl() is not None and policy.name != REFERENCE:
            measured[policy.name] = laws(on_device(load_policy(policy.model, gatherer.model_config)))
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
    return {"kind": "exact", "completions": space.size, "curves": curves, "gaps": gaps, "policies": about}


def score_all_texts(judge: Any, prompts: Prompts, texts: list[str], finished: list[bool]) -> list[np.ndarray]:
    """``P`` arrays ``(Y,)``: a judge's score of every completion of every prompt."""
    return [np.asarray(judge.score([prompt] * len(texts), texts, finished)) for prompt in prompts.prompts]
