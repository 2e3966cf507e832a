"""Contenders: a policy as seen by judges, a weighted set of draws for each prompt. Best-of-n is one of them."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ppo_vs_dpo.compare.config import CompareStage
from ppo_vs_dpo.compare.judges.scores import preference_by_score
from ppo_vs_dpo.compare.sampling.best_of_n import beirami_kl, kl_bound, pool_weights
from ppo_vs_dpo.compare.sampling.completions import Draws
from ppo_vs_dpo.compare.sampling.policies import REFERENCE, Policy

PROXY = "reward_model"


@dataclass
class Contender:
    """A policy with its draws; all figures are weighted means over draws, then means over prompts.

    Attributes:
        name: as in the report.
        method: ``sft``, one of `METHODS`, ``best_of_n`` or ``other``.
        point: coefficient of the sweep, ``{"n": 16}`` for best-of-n, ``{"step": 8}`` along training.
        draws: completions with scores.
        weights: ``(P, D)``, rows sum to 1.
        n: of best-of-n.
        base: best-of-n: the policy it selects from.
        ends: a main run at its end: the line along its training ends here. ``None``: as its name says.
    """

    name: str
    method: str
    draws: Draws
    weights: np.ndarray
    point: dict[str, Any] = field(default_factory=dict)
    n: int | None = None
    base: str = REFERENCE
    ends: bool | None = None

    @property
    def is_end(self) -> bool:
        """Whether this is a main run at its end."""
        return self.name in ("ppo", "dpo") if self.ends is None else self.ends

    def per_prompt(self, values: np.ndarray) -> np.ndarray:
        """``(P, D)`` values as ``(P,)`` weighted means."""
        return (self.weights * values).sum(axis=1)

    def score(self, judge: str) -> np.ndarray | None:
        """``(P,)`` mean scores of a scoring judge, or ``None`` where it was not asked."""
        return self.per_prompt(self.draws.scores[judge]) if judge in self.draws.scores else None

    def length(self) -> np.ndarray:
        """``(P,)`` tokens, the end of sequence included."""
        return self.per_prompt(self.draws.tokens)

    def eos_rate(self) -> np.ndarray:
        """``(P,)`` share of completions that ended by themselves."""
        return self.per_prompt(self.draws.finished)

    def kl(self, measure: str = "kl") -> np.ndarray | None:
        """``(P,)`` KL to the reference in nats by one estimate, or ``None`` where it was not measured."""
        if self.method == "best_of_n" or not np.isfinite(self.draws.measures[measure]).all():
            return None
        return self.per_prompt(self.draws.measures[measure])


def main_pair(contenders: list[Contender]) -> tuple[str, str]:
    """The two policies that a comparison is about: PPO and DPO; else the first two that were given, or one of them
    and the reference."""
    names = [contender.name for contender in contenders]
    given = [contender.name for contender in contenders if contender.method == "other"]
    if {"ppo", "dpo"} <= set(names) or not given or {"ppo", "dpo"} & (set(names) - set(given)):
        return "ppo", "dpo"
    return given[0], given[1] if len(given) > 1 else REFERENCE


def uniform(draws: Draws) -> np.ndarray:
    """Equal weights on all draws of a prompt."""
    return np.full(draws.shape, 1 / draws.shape[1])


def contenders_of(policies: list[Policy], draws: list[Draws], settings: CompareStage) -> list[Contender]:
    """The contenders at the main temperature: reference, trained policies, best-of-n. No checkpoints."""
    by_role = {(d.policy, d.role): d for d in draws if d.temperature == settings.temperature}
    found = []
    for policy in policies:
        if not policy.checkpoint:
            own = by_role[policy.name, "baseline" if policy.name == REFERENCE else "sample"]
            found.append(Contender(policy.name, policy.method, own, uniform(own), policy.point))
    for base, ns in {REFERENCE: settings.best_of_n, **settings.best_of}.items():
        pool = by_role.get((base, "pool"))
        if pool is not None and PROXY in pool.scores:
            found += [best_of(pool, n) for n in ns]
    return found


def along_training(policies: list[Policy], draws: list[Draws], settings: CompareStage) -> list[Contender]:
    """Checkpoints of the main runs: points of the frontier, not of the matrix."""
    by_role = {(d.policy, d.role): d for d in draws if d.temperature == settings.temperature}
    found = []
    for policy in policies:
        if policy.checkpoint:
            own = by_role[policy.name, "sample"]
            found.append(Contender(policy.name, policy.method, own, uniform(own), policy.point))
    return found


def best_of(pool: Draws, n: int, columns: slice = slice(None)) -> Contender:
    """Best-of-n over (some columns of) a policy's pool, selected by the reward model."""
    weights = np.zeros(pool.shape)
    weights[:, columns] = pool_weights(pool.scores[PROXY][:, columns], n)
    name, point = f"best_of_{n}", {"n": n}
    if pool.policy != REFERENCE:
        name, point = f"{name},policy={pool.policy}", {"n": n, "policy": pool.policy}
    return Contender(name, "best_of_n", pool, weights, point, n, pool.policy)


def pair_preference(ours: Contender, theirs: Contender, judge: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Expected preference and ties on every prompt, the two contenders' draws independent.

    Two best-of-n of one pool are put on disjoint parts of it; ``None`` where the pool is too small for both.
    """
    if ours.draws is theirs.draws:
        if ours.n is None or theirs.n is None:
            return None
        first, size = ours.n, ours.draws.shape[1]
        if first + theirs.n > size:
            return None
        spare = size - first - theirs.n
        cut = first + round(spare * first / (first + theirs.n))
        ours, theirs = best_of(ours.draws, ours.n, slice(0, cut)), best_of(theirs.draws, theirs.n, slice(cut, None))
    return preference_by_score(ours.draws.scores[judge], theirs.draws.scores[judge], ours.weights, theirs.weights)


def realised_best(pool: Draws, n: int) -> np.ndarray:
    """``(P,)`` column of the best of the first ``n`` of the pool: one plain draw of best-of-n."""
    return pool.scores[PROXY][:, :n].argmax(axis=1)


def shown_columns(contender: Contender) -> np.ndarray:
    """``(P,)`` the draw of each prompt that is shown and read: the first, or the realised best of n."""
    if contender.n is None:
        return np.zeros(len(contender.weights), dtype=int)
    return realised_best(contender.draws, contender.n)


def best_of_n_kl(contender: Contender, log_probability: np.ndarray) -> dict[str, Any]:
    """What can be said of the KL of best-of-n to the reference: a bound, and an estimate ``(P,)``.

    Over a policy pi, KL(bon || ref) = KL(bon || pi) + E_bon log pi / ref. The first term is at most
    log n - (n-1)/n, and is estimated as Beirami et al. do; the second is measured on the pool, 0 over the reference.

    What counts as the chosen completion's mass is that of all completions that tie with it: among them best-of-n
    chooses as its base would, so only between the groups does it move. The other draws of the pool that tie say how
    large that is.

    Args:
        contender: a best-of-n.
        log_probability: ``(P,)`` under its base policy of one realised best-of-n completion a prompt.
    """
    scores = contender.draws.scores[PROXY]
    chosen = scores[np.arange(len(scores)), realised_best(contender.draws, contender.n)]
    tied = ((scores == chosen[:, None]).sum(axis=1) - 1) / max(scores.shape[1] - 1, 1)
    with np.errstate(divide="ignore"):
        log_probability = np.maximum(log_probability, np.log(tied))
    moved = np.zeros(len(contender.weights))
    if contender.base != REFERENCE:
        moved = contender.per_prompt(contender.draws.measures["k1"])
    return {
        "bound": kl_bound(contender.n) + float(moved.mean()),
        "estimate": beirami_kl(log_probability, contender.n) + moved,
    }
