"""Log-probabilities of one policy's completions under another: what mixtures, direct KLs and reweighting
are made of.
"""

import numpy as np

from ppo_vs_dpo.compare.estimates.reweighted import LOW_KL
from ppo_vs_dpo.compare.frontier.matched import curve, neighbours
from ppo_vs_dpo.compare.sampling.completions import Draws
from ppo_vs_dpo.compare.sampling.contenders import Contender
from ppo_vs_dpo.compare.sampling.gather import Gatherer
from ppo_vs_dpo.compare.sampling.kl import sequence_logprobs
from ppo_vs_dpo.compare.sampling.policies import REFERENCE, Policy
from ppo_vs_dpo.models.loading.pretrained import load_policy


def wanted(contenders: list[Contender], draws: list[Draws], main: tuple[str, str] = ("ppo", "dpo")) -> dict:
    """Policy -> the draws whose log-probabilities under it are wanted.

    Of policies near the reference (KL below `LOW_KL`) those of the reference's own draws: their win rates are
    estimated by reweighting them. Of the two main policies each other's, and of the two points of the farther method
    that enclose the nearer KL each other's: their mixture is found with them.
    """
    known = {c.name: c for c in contenders if c.kl() is not None}
    if not known:
        return {}
    temperature = next(iter(known.values())).draws.temperature
    own = [d for d in draws if d.policy == REFERENCE and d.temperature == temperature]
    found: dict[str, list[Draws]] = {}

    def want(name: str, of: list[Draws]) -> None:
        already = found.setdefault(name, [])
        already += [one for one in of if not any(one is other for other in already)]

    low = [c for c in known.values() if c.name != REFERENCE and c.kl().mean() < LOW_KL]
    for contender in low:
        want(contender.name, own)
    if low:
        want(REFERENCE, [one for one in own if one.role != "baseline"])
    if set(main) <= set(known):
        one, other = (known[name] for name in main)
        near, far = sorted((one, other), key=lambda c: c.kl().mean())
        pair = neighbours(curve(contenders, far.method), float(near.kl().mean())) or ()
        for a, b in [(one, other), pair] if pair else [(one, other)]:
            want(a.name, [b.draws])
            want(b.name, [a.draws])
    return found


def cross_logprobs(
    contenders: list[Contender], policies: list[Policy], draws: list[Draws], gatherer: Gatherer
) -> None:
    """Fill ``draws[i].under[policy]`` with ``(P, D)`` log-probabilities in nats, at the draws' temperature.

    All ranks must call this: each works on its share.

    Args:
        contenders: all points of the frontier at the main temperature.
        policies: where their models are, under the names of their draws.
        draws: of all of them.
        gatherer: has the reference policy.
    """
    reference, ranks = gatherer.reference, gatherer.ranks
    by_name = {policy.name: policy for policy in policies}
    drawn_from = {contender.name: contender.draws.policy for contender in contenders}
    for name, of in wanted(contenders, draws).items():
        policy = by_name.get(drawn_from.get(name, name))
        if policy is None or policy.model is None:
            continue
        ranks.step = f"log-probabilities under {name}"
        own = name == REFERENCE
        frozen = reference.frozen if own else ranks.load(load_policy, policy.model, gatherer.model_config)
        for one in of:
            rows = ranks.share(len(one.token_ids))
            per = one.shape[1]
            measured = sequence_logprobs(
                frozen.model,
                [reference.prompt_ids[row // per] for row in rows],
                [one.token_ids[row] for row in rows],
                reference.tokenizer.pad_token_id,
                temperature=one.temperature,
            )
            merged = ranks.merge(measured, len(one.token_ids))
            one.under[name] = np.asarray(merged, dtype=np.float64).reshape(one.shape)
        if not own:
            frozen.release()
