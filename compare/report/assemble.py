"""Everything in a report that is computed from draws and judgements."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from ppo_vs_dpo.artifacts.resources import part
from ppo_vs_dpo.compare.config import CompareStage
from ppo_vs_dpo.compare.estimates.allowed import sampled_as_measured, use_kl
from ppo_vs_dpo.compare.estimates.controls import control, controls_of, positive_control
from ppo_vs_dpo.compare.estimates.ranking import ranking
from ppo_vs_dpo.compare.estimates.reweighted import reweighted
from ppo_vs_dpo.compare.estimates.win_rates import (
    PairTable,
    Settings,
    describe,
    describe_kl,
    judge_pairs,
    power_line,
    win_rates,
)
from ppo_vs_dpo.compare.frontier.points import Compared, frontier, matched_kl
from ppo_vs_dpo.compare.judges.agreement import agreement
from ppo_vs_dpo.compare.judges.scores import preference_by_score
from ppo_vs_dpo.compare.report.decision import find, main_judge
from ppo_vs_dpo.compare.report.verdict import label
from ppo_vs_dpo.compare.sampling.completions import Draws
from ppo_vs_dpo.compare.sampling.contenders import PROXY, Contender, main_pair, realised_best, shown_columns, uniform
from ppo_vs_dpo.compare.sampling.gather import Gatherer
from ppo_vs_dpo.compare.sampling.kl import sequence_logprobs
from ppo_vs_dpo.compare.sampling.policies import REFERENCE
from ppo_vs_dpo.compare.sampling.quality import quality
from ppo_vs_dpo.compare.statistics.intervals import mean_interval
from ppo_vs_dpo.compare.statistics.significance import label_permutation_p, win_rates_with_p


@part("statistics")
def figures(
    contenders: list[Contender],
    checkpoints: list[Contender],
    draws: list[Draws],
    scored: dict[str, PairTable],
    tables: dict[str, PairTable],
    logprobs: dict[str, np.ndarray],
    settings: CompareStage,
    how: Settings,
    learned: dict[str, dict[str, Any]],
    answers: Sequence[str | None],
) -> dict[str, Any]:
    """All figures of the report.

    ``scored`` are the pair tables of the judges that score every completion, ``tables`` those and the ones of
    judges that read; ``learned``: policy -> what was learned while its completions were drawn; ``answers``: ``P``
    chosen answers of held-out pairs to the same prompts, where there are any.
    """
    judges, all_judges = list(scored), list(tables)
    shown = {drawn_from(c): c.name for c in contenders if c.n is None}
    pool = pool_of(draws)
    baseline = next(one for one in draws if one.role == "baseline")
    policies = {c.name: describe(c, judges, how, logprobs.get(c.name)) for c in contenders}
    steps = {c.name: describe(c, judges, how, None) for c in checkpoints}
    for contender in contenders:
        policies[contender.name]["quality"] = quality(contender, shown_columns(contender), answers)
        policies[contender.name]["displacement"] = learned.get(drawn_from(contender), {}).get("displacement")
    many = controls_of(judges, contenders)
    controls = [found for judge in judges if (found := control(baseline, pool, judge, how, many))]
    lengths = {c.name: c.length() for c in contenders}
    difficult = settings.length_difficulty
    win = [entry for judge in all_judges for entry in win_rates(tables[judge], judge, how, lengths, difficult)]
    by_name = {c.name: c for c in contenders}
    if sampled_as_measured(settings):
        own = [one for one in draws if one.policy == REFERENCE and one.temperature == settings.temperature]
        win = use_kl(win, lambda name: [by_name[name]], [own], how, clusters=[how.clusters])
    known_wins = []
    if PROXY in scored and pool is not None:
        sizes = (pool.shape[1], baseline.shape[1])
        labels = [how.clusters]
        positive = positive_control(win, [scored[PROXY]], how, sizes, controls=many, clusters=labels)
        known_wins = [positive] if positive else []
    first = main_judge({"judges": {name: {"in_sample": name == PROXY} for name in all_judges}})
    policy, versus = main_pair(contenders)
    judged = first is not None and tables[first].has(policy, versus)
    given = any(c.method == "other" for c in contenders if c.name in (policy, versus))
    run = Compared(contenders, checkpoints, tables[first] if judged else None, how.clusters)
    if judged and first in scored and len(run.settings) > len(contenders):
        run = replace(run, table=judge_pairs(run.settings, first))
    matched = matched_kl([run], policy, versus, how, entry=find({"win_rates": win}, policy, versus, first))
    if not judged:
        matched = {
            "policy": policy,
            "versus": versus,
            "refused": f"no judge compared {label(policy)} with {label(versus)}",
        }
    elif given:
        why_not = "a policy that was given is one point, not a curve along which its KL could be matched"
        matched = {"policy": policy, "versus": versus, "refused": why_not}
    weighed = None
    if judged and (find({"win_rates": win}, policy, versus, first) or {}).get("test") == "reweighted":
        weighed = reweighted(by_name[policy], by_name[versus], own, first)
    return {
        "policies": policies,
        "win_rates": win + controls,
        "control": controls + known_wins,
        "head_to_head": [policy, versus],
        "power": power_line(tables[first], policy, versus, how, settings.delta, weighed) if judged else None,
        "matched_kl": matched,
        "frontier": frontier([run], {**policies, **steps}, how),
        "ranking": {judge: ranking_of(tables[judge], contenders, how) for judge in all_judges},
        "agreement": judge_agreement([verdict_sides(contenders, scored, tables)]),
        "temperatures": temperatures(draws, baseline, settings, judges, how, shown),
    }


def drawn_from(contender: Contender) -> str | None:
    """The policy that drew a contender's completions as its own; best-of-n only selects."""
    return contender.draws.policy if contender.n is None else None


def ranking_of(table: PairTable, contenders: list[Contender], how: Settings) -> dict[str, Any]:
    """Bradley-Terry ranking by one judge."""
    return ranking(
        table.pairs,
        [table.complete()],
        [contender.name for contender in contenders],
        clusters=[how.of_rows(table.whole()).clusters],
        confidence=how.confidence,
    )


def judge_agreement(sides: list[dict[tuple[str, str], list[np.ndarray]]]) -> list[dict[str, Any]]:
    """Agreement of every two judges over all comparisons that both judged, of one run or several (`verdict_sides`)."""
    found = []
    for judges in dict.fromkeys(pair for run in sides for pair in run):
        both = [run[judges] for run in sides if judges in run]
        found.append(
            {"judges": list(judges), **agreement(*(np.concatenate(side) for side in zip(*both, strict=True)))}
        )
    return found


def verdict_sides(
    contenders: list[Contender], scored: dict[str, PairTable], tables: dict[str, PairTable]
) -> dict[tuple[str, str], list[np.ndarray]]:
    """For every two judges their verdicts ``(N,)`` each on the completions that are shown, over all shared pairs."""
    shown = {judge: shown_table(contenders, judge) if judge in scored else table for judge, table in tables.items()}
    found = {}
    for first, second in combinations(shown, 2):
        shared = [pair for pair in shown[first].pairs if shown[second].has(*pair)]
        if shared:
            sides = [np.concatenate([shown[judge].of(*pair) for pair in shared]) for judge in (first, second)]
            found[first, second] = sides
    return found


def shown_table(contenders: list[Contender], judge: str) -> PairTable:
    """Verdicts 1, 1/2 or 0 of a judge that scores on the completions that are shown."""
    rows = np.arange(len(contenders[0].weights))
    scores = {c.name: c.draws.scores[judge][rows, shown_columns(c)] for c in contenders}
    pairs = list(combinations(scores, 2))
    verdicts = np.stack([(1 + np.sign(scores[one] - scores[two])) / 2 for one, two in pairs], axis=1)
    return PairTable(pairs, verdicts, (verdicts == 0.5).astype(float))


def temperatures(
    draws: list[Draws],
    baseline: Draws,
    settings: CompareStage,
    judges: list[str],
    how: Settings,
    shown: dict[str | None, str],
) -> list[dict[str, Any]]:
    """Every policy at the further temperatures, against the reference at the main one; ``shown``: their names."""
    found = []
    for one in draws:
        if one.temperature == settings.temperature:
            continue
        contender = Contender(one.policy, "other", one, uniform(one))
        entry = {
            "policy": shown.get(one.policy, one.policy),
            "temperature": one.temperature,
            "kl": describe_kl(contender, how, None),
            "length": float(contender.length().mean()),
            "eos_rate": float(contender.eos_rate().mean()),
            "scores": {},
            "win_rates": [],
        }
        for judge in (j for j in judges if j in one.scores):
            score = mean_interval(contender.score(judge), **how.kwargs())
            entry["scores"][judge] = {"mean": score.mean, "ci": score.ci()}
            preference, ties = preference_by_score(
                one.scores[judge], baseline.scores[judge], contender.weights, uniform(baseline)
            )
            exact = label_permutation_p(one.scores[judge], baseline.scores[judge])
            interval, _ = win_rates_with_p(preference[:, None], np.array([exact]), **how.kwargs())
            entry["win_rates"].append(
                {
                    "versus": f"{REFERENCE} at {settings.temperature}",
                    "judge": judge,
                    "n": len(preference),
                    "win_rate": float(interval.mean[0]),
                    "ci": interval.ci(0),
                    "ties": float(ties.mean()),
                }
            )
        found.append(entry)
    return found


def best_of_n_logprobs(contenders: list[Contender], draws: list[Draws], gatherer: Gatherer) -> dict[str, np.ndarray]:
    """Best-of-n -> log-probability under its base policy ``(P,)`` of one of its completions a prompt.

    All ranks must call this: the reference's are worked out here, each rank its share.
    """
    best = [contender for contender in contenders if contender.n is not None]
    chosen = {contender.name: realised_best(contender.draws, contender.n) for contender in best}
    found = {c.name: c.draws.measures["logprob"][np.arange(len(chosen[c.name])), chosen[c.name]] for c in best}
    pool = pool_of(draws)
    over_reference = [contender.name for contender in best if contender.draws is pool]
    if not over_reference:
        return found
    # The reference's pool is large, and its log-probabilities are needed here only: of what was chosen.
    slots = sorted({(row, int(column)) for name in over_reference for row, column in enumerate(chosen[name])})
    reference, ranks = gatherer.reference, gatherer.ranks
    ranks.step = "log-probabilities of best-of-n"
    own = [slots[number] for number in ranks.share(len(slots))]
    measured = sequence_logprobs(
        reference.model,
        [reference.prompt_ids[row] for row, _ in own],
        [pool.token_ids[row * pool.shape[1] + column] for row, column in own],
        reference.tokenizer.pad_token_id,
        temperature=pool.temperature,
    )
    of = dict(zip(slots, ranks.merge(measured, len(slots)), strict=True))
    for name in over_reference:
        found[name] = np.array([of[row, int(column)] for row, column in enumerate(chosen[name])])
    return found


def pool_of(draws: list[Draws]) -> Draws | None:
    """The draws of the reference that best-of-n selects from."""
    return next((one for one in draws if (one.policy, one.role) == (REFERENCE, "pool")), None)
