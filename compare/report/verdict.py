"""The verdict in three sentences made from the decision, what would change it, and the report's warnings."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np

from ppo_vs_dpo.compare.config import KIND, METHODS, method_of
from ppo_vs_dpo.compare.report.decision import ENOUGH_SEEDS, FEWEST_DECIDED, find, head_to_head

JUDGE_NAMES = {"gold": "the gold reward", "reward_model": "the reward model that PPO was trained on"}
# A bound this wide says nothing that one did not know.
WORTH_SAYING = 0.45


def percent(x: float) -> str:
    """``0.5812`` -> ``58.1 %``."""
    return f"{100 * x:.1f} %"


def rate(entry: dict[str, Any]) -> str:
    """``58.1 % [54.0, 62.1]``."""
    return f"{percent(entry['win_rate'])} [{100 * entry['ci'][0]:.1f}, {100 * entry['ci'][1]:.1f}]"


def nats(value: float | None) -> str:
    """A KL with the digits it needs: ``3.17``, ``0.0030``; two digits of a small one, two decimals of a large one."""
    if value is None:
        return "–"
    if abs(value) >= 0.095 or value == 0:
        return f"{value or 0.0:.2f}".replace("-", "−")
    return f"{value:#.2g}".replace("-", "−") if abs(value) >= 1e-4 else f"{value:.1e}".replace("-", "−")


def of_hundred(entry: dict[str, Any]) -> str:
    """``62 of 100 prompts (58 to 66)``: as many digits as the interval's width deserves; a tie is half a win.

    Where rounding would put an end of the interval on 50 or on the other side of it there are two more at most; an end
    that is nearer to 50 than they show is "just over" or "just under" it.
    """
    rate, *ends = (100 * x for x in (entry["win_rate"], *entry["ci"]))
    digits = 0 if ends[1] - ends[0] >= 4 else 1 if ends[1] - ends[0] >= 0.4 else 2

    def hidden(x: float, digits: int) -> bool:
        return np.sign(round(x - 50, 9)) != np.sign(round(x, digits) - 50)

    for more in (digits, digits + 1, digits + 2):
        if not any(hidden(x, more) for x in ends):
            digits = more
            break
    shown = [f"just {'over' if x > 50 else 'under'} 50" if hidden(x, digits) else f"{x:.{digits}f}" for x in ends]
    return f"{rate:.{digits}f} of 100 prompts ({shown[0]} to {shown[1]})"


# Levels that a p-value is read against: it is never rounded onto one, or across it.
LEVELS = (0.1, 0.05, 0.01)


def points(x: float) -> str:
    """``3.7``, ``0.04``: a difference of win rates in points, with the digits that a small one needs."""
    return f"{100 * x:.1f}" if x >= 0.001 else f"{100 * x:.1g}"


def p_text(p: float) -> str:
    """``p = 0.031``, ``p < 0.0001``, ``p = 0.0496``: two digits, more where they would hide the side of a level."""
    if p < 1e-4:
        return "p < 0.0001"
    if p >= 0.995:
        return "p = 1"
    for digits in (2, 3, 4):
        text = f"{p:.{digits}g}"
        if all(np.sign(float(text) - level) == np.sign(p - level) for level in LEVELS):
            return f"p = {text}"
    level = min(LEVELS, key=lambda one: abs(one - p))
    return f"p just {'over' if p > level else 'under'} {level:g}"


# Names under which policies are shown, where they are not their own: the reference of a comparison of given policies.
_shown: ContextVar[dict[str, str] | None] = ContextVar("shown", default=None)


@contextlib.contextmanager
def names_of(report: dict[str, Any]) -> Iterator[None]:
    """Inside the block `label` calls policies as this report does."""
    token = _shown.set(report.get("names") or {})
    try:
        yield
    finally:
        _shown.reset(token)


def label(name: str) -> str:
    """``ppo`` -> ``PPO``, ``ppo,kl_coef=0.0`` -> ``PPO kl_coef 0.0``, ``best_of_16`` -> ``best-of-16``.

    ``best_of_4,policy=ppo`` -> ``best-of-4 of PPO``, ``ppo,advantage=rloo,lam=1`` -> ``RLOO lam 1``.
    """
    if name in (_shown.get() or {}):
        return _shown.get()[name]
    method, _, point = name.partition(",")
    if point.startswith("policy="):
        return f"{label(method)} of {label(point.removeprefix('policy='))}"
    parts = dict(part.partition("=")[::2] for part in point.split(",") if part)
    if method == "ppo" and (kind := method_of(method, parts)) != method:
        method, parts = kind, {key: value for key, value in parts.items() if key not in KIND["ppo"]}
    method = "SFT" if method == "sft" else METHODS.get(method) or method.replace("best_of_", "best-of-")
    return f"{method} {', '.join(f'{key} {value}' for key, value in parts.items())}" if parts else method


def one_run(report: dict[str, Any], name: str) -> str:
    """``this PPO run``, ``these two PPO runs``, or the method's name where there are seeds enough to speak of it."""
    seeds = len(report["settings"]["seeds"])
    if seeds >= ENOUGH_SEEDS or report.get("names") or name not in ("ppo", "dpo"):
        return label(name)  # a policy that was given is itself
    return f"this {label(name)} run" if seeds == 1 else f"these two {label(name)} runs"


def flipped(entry: dict[str, Any]) -> dict[str, Any]:
    """A figure seen from the other side."""
    turned = {"policy": entry["versus"], "versus": entry["policy"], "win_rate": 1 - entry["win_rate"]}
    return {**entry, **turned, "ci": [1 - entry["ci"][1], 1 - entry["ci"][0]]}


def _capital(text: str) -> str:
    """At the start of a sentence; a policy's own name stays as it is."""
    return text[0].upper() + text[1:] if " " in text else text


def _judge(name: str) -> str:
    return JUDGE_NAMES.get(name, f"the judge {name}")


def sentences(report: dict[str, Any]) -> list[str]:
    """Three sentences: the two methods as they are; at one KL; against the reference, and what is not known."""
    with names_of(report):
        found = [_head_to_head(report), _matched(report), _against_reference(report), *_selected(report)]
        # Policies that were given are single points: that they have no curve says nothing about them.
        return [found[0], found[2]] if report.get("names") else found


def _head_to_head(report: dict[str, Any]) -> str:
    decision = report["decision"]
    judge, found = decision["judge"], decision["primary"]
    if found is None:
        have = ", ".join(label(name) for name in report["policies"])
        policy, versus = map(label, head_to_head(report))
        return f"There is no verdict between {policy} and {versus}: this run has {have} only."
    entry = find(report, found["policy"], found["versus"], judge)
    if entry["win_rate"] < 0.5:
        entry = flipped(entry)
    first, second = (one_run(report, entry[key]) for key in ("policy", "versus"))
    delta = f"{100 * decision['delta']:.3g} points"
    says = (
        f"{label(entry['policy'])}'s answer is the better one on {of_hundred(entry)}, {p_text(entry['p'])}, "
        f"n = {entry['n']}"
    )
    if entry.get("units", entry["n"]) < entry["n"]:
        says += f" ({entry['units']} units of evidence)"
    if len(entry.get("per_seed") or []) > 1:
        turned = entry["policy"] != found["policy"]
        rates = [100 * (1 - rate if turned else rate) for rate in entry["per_seed"]]
        says += f", by seed {', '.join(f'{rate:.0f}' for rate in rates)}"
    raw = entry.get("raw")
    if raw and entry.get("test") != "reweighted":
        seen = 1 - raw["win_rate"] if entry["policy"] != found["policy"] else raw["win_rate"]
        says += f"; on these prompts it was {100 * seen:.0f} of 100, which is more than their KLs allow"
    by = _judge(judge)
    if found["outcome"] == "beats":
        text = f"{_capital(first)} {'beat' if first.startswith('these') else 'beats'} {second} by {by}: {says}"
    elif found["outcome"] == "equal":
        text = f"{_capital(first)} and {second} are equal within {delta} by {by}: {says}"
        text += "; so small a lead is shown, and it is smaller than what was said to matter" if found["lead"] else ""
    else:
        text = f"Undecided between {first} and {second}: by {by} {says}"
        why = list(decision["objections"])
        if not why and entry.get("decided", FEWEST_DECIDED) < FEWEST_DECIDED:
            why.append(f"the judge preferred one of them on {entry['decided']} prompts, fewer than {FEWEST_DECIDED}")
        if (entry.get("allowed") or {}).get("outside"):
            why.append("that lies outside of what their KLs allow")
        text += f"; {'; '.join(why)}" if why else ""
    kls = [report["policies"][entry[key]]["kl"]["mean"] for key in ("policy", "versus")]
    if None not in kls:
        text += f". Their KLs to {label('sft')} are {nats(kls[0])} and {nats(kls[1])} nats"
        allowed = entry.get("allowed")
        if allowed and not allowed["outside"] and allowed["at_most"] < WORTH_SAYING:
            text += f": whatever the judge, they are at most {points(allowed['at_most'])} points apart"
    if report["judges"][judge]["in_sample"]:
        text += " (an in-sample judge favours PPO)"
    return text + "."


def _matched(report: dict[str, Any]) -> str:
    matched, decision = report["matched_kl"], report["decision"]
    if "refused" in matched:
        return f"At one KL nothing can be said: {matched['refused']}."
    if matched["kind"] == "equal":
        return f"Their KLs are alike, about {nats(matched['kl'])} nats: the first sentence is at one KL already."
    primary = decision["primary"] or {"outcome": "undecided", "winner": None}
    if matched["kind"] == "one-sided":
        less, more = label(matched["policy"]), label(matched["versus"])
        both = f"{nats(matched['kl'])} against {nats(matched['kl_versus'])} nats"
        if primary["outcome"] == "beats" and primary["winner"] == matched["policy"] and matched["kl_apart"]:
            return f"{less} does so with less KL, {both}."
        lower = (
            f"{less} has the lower KL, {both}" if matched["kl_apart"] else f"Which KL is lower is not shown ({both})"
        )
        nothing = f"{more} has no point at or below {nats(matched['kl'])} nats"
        if (runs := matched.get("runs", 1)) > 1:
            nothing = f"in {matched['without']} of {runs} runs the farther one has no point below the nearer's KL"
        return f"{lower}, and {nothing}: who is better at one KL is not decided."
    found = next(one for one in decision["secondary"] if one["kind"] == "matched KL")
    entry = matched if matched["win_rate"] >= 0.5 else flipped(matched)
    first, second = (one_run(report, entry[key]) for key in ("policy", "versus"))
    says = (
        f"{label(entry['policy'])}'s answer is the better one on {of_hundred(entry)}, {p_text(found['p_holm'])} (Holm)"
    )
    at = f"At one KL of {nats(matched['kl'])} nats"
    if found["outcome"] == "beats":
        return f"{at} {first} {'beat' if first.startswith('these') else 'beats'} {second}: {says}."
    if found["outcome"] == "equal":
        return f"{at} {first} and {second} are equal within {100 * decision['delta']:.3g} points: {says}."
    return f"{at} it is undecided between {first} and {second}: {says}."


def _against_reference(report: dict[str, Any]) -> str:
    decision = report["decision"]
    judge, parts, reference = decision["judge"], [], label("sft")
    for found in decision["secondary"]:
        if found["kind"] != "win rate":
            continue
        entry = find(report, found["policy"], found["versus"], judge)
        name, says = one_run(report, found["policy"]), of_hundred(entry)
        many = name.startswith("these")
        if found["outcome"] == "beats":
            won = found["winner"] == found["policy"]
            verb = ("beat" if won else "lose to") if many else ("beats" if won else "loses to")
            parts.append(f"{name} {verb} {reference} (better on {says})")
        elif found["outcome"] == "equal":
            within = f"within {100 * decision['delta']:.3g} points"
            parts.append(f"{name} {'equal' if many else 'equals'} {reference} {within} (better on {says})")
        else:
            why = "for the reason in the first sentence" if decision["objections"] else "after Holm's correction"
            # Where the interval alone says something else.
            after = "" if entry["ci"][0] <= 0.5 <= entry["ci"][1] else f" {why}"
            parts.append(f"{name} {'are' if many else 'is'} undecided{after} (better on {says})")
    seeds = report["settings"]["seeds"]
    spread = (
        f"pooled over {len(seeds)} seeds"
        if len(seeds) > 1
        else f"one run (seed {seeds[0]}), so what another seed would give is not in these intervals"
    )
    if report.get("names"):
        # Nothing was trained here: the draws are all that chance had a hand in.
        spread = "another training of the same policies may come out differently"
    if not parts:
        return f"{_capital(spread)}." if report.get("names") else f"No policy was judged against SFT; {spread}."
    return f"Against {reference}, by {_judge(judge)}: {', '.join(parts)}; {spread}."


def _selected(report: dict[str, Any]) -> list[str]:
    """How each method's point was chosen, where `compare.select` chose."""
    tuning = {name: one for name, one in (report["settings"].get("tuning") or {}).items() if one.get("by")}
    parts, about = [], next(iter(tuning.values()), None)
    for name, one in tuning.items():
        chosen = one["chosen"] if isinstance(one["chosen"], list) else [one["chosen"]]
        points = list(dict.fromkeys(label(point).removeprefix(label(name)).strip() for point in chosen))
        parts.append(f"{label(name)} {' or '.join(points)} of {one['settings']}")
    if about is None:
        return []
    return [
        f"Each method's point was chosen on {about['prompts']} validation prompts by {_judge(about['by'])}, and is "
        f"reported on others: {', '.join(parts)} settings."
    ]


def would_change(report: dict[str, Any]) -> list[str]:
    """What would change this verdict, a sentence each."""
    with names_of(report):
        return _would_change(report)


def _would_change(report: dict[str, Any]) -> list[str]:
    decision, power, settings = report["decision"], report["power"], report["settings"]
    found, primary, judge = [], decision["primary"], decision["judge"]
    if primary is None:
        return found
    entry = find(report, *head_to_head(report), judge)
    if decision["objections"]:
        name = _judge(judge)
        found.append(f"A judge against which nothing stands; against {name}: {'; '.join(decision['objections'])}.")
    allowed = entry.get("allowed")
    if allowed and not allowed["outside"] and allowed["at_most"] <= max(decision["delta"], 0.02):
        found.append(
            f"More training: at these KLs no judge and no number of prompts can show more than "
            f"{points(allowed['at_most'])} points between them."
        )
    elif primary["outcome"] == "undecided" and power and power["detectable_gap"]:
        what = f"{power['runs']} such runs" if power.get("runs") else f"{power['n']} prompts"
        if power["detectable_gap"] >= 0.5:
            text = f"More of them: {what} show no difference, however large, in four of five experiments"
        else:
            gap = f"{100 * power['detectable_gap']:.1f} points"
            text = f"A larger difference: {what} show one of {gap} in four of five experiments"
        if power["prompts_for_equality"]:
            text += f"; {power['prompts_for_equality']:,} prompts would show equal policies to be equal within "
            text += f"{100 * decision['delta']:.3g} points"
        found.append(text + ".")
    if len(settings["seeds"]) < ENOUGH_SEEDS and not report.get("names"):
        number = {1: "this is one run", 2: "these are two runs"}[len(settings["seeds"])]
        found.append(
            f"Other seeds: {number} of each, and {ENOUGH_SEEDS} or more say something about the methods "
            f"(ppo-vs-dpo compare RUN RUN RUN)."
        )
    if (matched := report["matched_kl"]).get("kind") == "one-sided":
        wanted = f"{label(matched['versus'])}'s sweep at or below {nats(matched['kl'])} nats"
        if matched.get("runs", 1) > 1:
            wanted = "the farther one's sweep at or below the nearer one's KL, in each run"
        found.append(f"A point of {wanted}, for a comparison at one KL.")
    cut = [p["eos_rate"] for name, p in report["policies"].items() if name in head_to_head(report)]
    if cut and min(cut) < 0.5:
        found.append("A longer budget: most answers are cut off, so beginnings of answers are compared.")
    return found


def warnings(report: dict[str, Any]) -> list[str]:
    """What a reader must know before quoting a figure."""
    with names_of(report):
        return _warnings(report)


def _warnings(report: dict[str, Any]) -> list[str]:
    found, settings = [], report["settings"]
    units = settings["units"]
    if settings["n_prompts"] < 30:
        found.append(f"Only {settings['n_prompts']} prompts: all but large differences stay unseen.")
    if units < 0.99 * settings["n_prompts"]:
        found.append(
            f"{settings['n_prompts']} prompts are {units} units of evidence: prompts of one dialogue and near "
            f"duplicates count "
            f"as one."
        )
    if near := settings.get("near_training"):
        found.append(
            f"{near} of {settings['n_prompts']} prompts are near duplicates of training prompts, or of one dialogue "
            f"with them: what was learned by heart counts as quality there."
        )
    if settings["top_k"] or settings["top_p"] < 1:
        found.append(
            "Completions were drawn with top-k or top-p: they come from another policy than the model, and the KL "
            "shown is the model's, not that policy's (which may be infinite). No KL bounds these win rates."
        )
    found += (report["pair_set"] or {}).get("differences", [])
    for entry in report["control"]:
        if not entry["passed"]:
            found.append(
                f"The control failed: {label(entry['policy'])} against {label('sft')} is {rate(entry)} by "
                f"{entry['judge']} where "
                f"{percent(entry['expected'])} is known ({p_text(entry['p'])}). It touches every figure "
                f"against SFT by this "
                f"judge, and no verdict is given by it."
            )
    outside = [e for e in report["win_rates"] if e.get("allowed", {}).get("outside") and e["win_rate"] > 0.5]
    for entry in outside:
        found.append(
            f"{label(entry['policy'])} against {label(entry['versus'])} by {entry['judge']}, {rate(entry)}, "
            f"lies outside of what "
            f"their KLs allow ({points(entry['allowed']['at_most'])} points from 50): a KL, the sampling or "
            f"a judge is not "
            f"what it is taken for."
        )
    for point in report["frontier"]:
        if point.get("over_optimised"):
            found.append(
                f"{label(point['policy'])} is over-optimised: against {label(point['against'])} gold falls by "
                f"{-point['gold_change']:.2f} while proxy rises by {point['proxy_change']:.2f}."
            )
        elif point.get("gold_fell"):
            found.append(
                f"{label(point['policy'])} has less gold than {label(point['against'])}, by "
                f"{-point['gold_change']:.2f}; proxy did "
                f"not detectably rise."
            )
    for name, policy in report["policies"].items():
        if policy["eos_rate"] < 0.95:
            found.append(f"{label(name)} ends only {percent(policy['eos_rate'])} of its completions by itself.")
        empty = policy["quality"]["empty_rate"]
        if empty > 0.01:
            found.append(f"{label(name)} gives an empty completion in {percent(empty)} of its draws.")
    for judge in report["judges"]:
        ties = [entry["ties"] for entry in report["win_rates"] if entry["judge"] == judge]
        if ties and min(ties) > 0.99:
            found.append(f"The judge {judge} calls everything a tie: it decides nothing.")
    accuracy = (report.get("reward_model") or {}).get("accuracy")
    if accuracy is not None and accuracy < 0.6:
        found.append(f"The reward model is right in {percent(accuracy)} of held-out pairs only; PPO optimised that.")
    for name, one in (settings.get("tuning") or {}).items():
        if one["chosen_on"] == "heldout":
            found.append(f"{label(name)} was chosen on the prompts it is judged on: its figures are too good.")
    return found
