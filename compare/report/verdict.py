"""The verdict in three sentences that claim no more than was measured, and the report's warnings."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

JUDGE_NAMES = {"gold": "the gold reward", "reward_model": "the reward model that PPO was trained on"}


def percent(x: float) -> str:
    """``0.5812`` -> ``58.1 %``."""
    return f"{100 * x:.1f} %"


def rate(entry: dict[str, Any]) -> str:
    """``58.1 % [54.0, 62.1]``."""
    return f"{percent(entry['win_rate'])} [{100 * entry['ci'][0]:.1f}, {100 * entry['ci'][1]:.1f}]"


def find(report: dict[str, Any], policy: str, versus: str, judge: str) -> dict[str, Any] | None:
    """A win rate of the report."""
    for entry in report["win_rates"]:
        if (entry["policy"], entry["versus"], entry["judge"]) == (policy, versus, judge):
            return entry
    return None


def main_judge(report: dict[str, Any]) -> str | None:
    """The judge the verdict quotes: gold where it is known, else the first that no policy was trained on."""
    heard = {entry["judge"] for entry in report.get("win_rates", [])}
    judges = {name: judge for name, judge in report["judges"].items() if "win_rates" not in report or name in heard}
    if "gold" in judges:
        return "gold"
    return next((name for name, judge in judges.items() if not judge["in_sample"]), next(iter(judges), None))


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

    ``best_of_4,policy=ppo`` -> ``best-of-4 of PPO``.
    """
    if name in (_shown.get() or {}):
        return _shown.get()[name]
    method, _, point = name.partition(",")
    if point.startswith("policy="):
        return f"{label(method)} of {label(point.removeprefix('policy='))}"
    method = method.upper() if method in ("ppo", "dpo", "sft") else method.replace("best_of_", "best-of-")
    return f"{method} {point.replace('=', ' ').replace(',', ', ')}" if point else method


def head_to_head(report: dict[str, Any]) -> tuple[str, str]:
    """The two policies that the verdict is about: PPO and DPO, or the first two that were given."""
    return tuple(report.get("head_to_head") or ("ppo", "dpo"))


def _who_wins(entry: dict[str, Any]) -> str:
    first, second = label(entry["policy"]), label(entry["versus"])
    if entry["ci"][0] > 0.5:
        return f"{first} beats {second}"
    if entry["ci"][1] < 0.5:
        return f"{second} beats {first}"
    return f"{first} and {second} cannot be told apart"


def sentences(report: dict[str, Any]) -> list[str]:
    """Three sentences: the two methods as they are; at matched KL; against the reference, and what is not known."""
    with names_of(report):
        found = [_head_to_head(report), _matched(report), _against_reference(report)]
        # Policies that were given are single points: that they have no curve says nothing about them.
        return [found[0], found[2]] if report.get("names") else found


def _head_to_head(report: dict[str, Any]) -> str:
    judge = main_judge(report)
    policy, versus = head_to_head(report)
    entry = find(report, policy, versus, judge)
    if entry is None:
        have = ", ".join(label(name) for name in report["policies"])
        return f"There is no verdict between {label(policy)} and {label(versus)}: this run has {have} only."
    if entry["ci"][1] < 0.5:
        entry = find(report, versus, policy, judge)
    kl = [report["policies"][name]["kl"]["mean"] for name in (entry["policy"], entry["versus"])]
    at = f", at KL {kl[0]:.1f} against {kl[1]:.1f} nats" if None not in kl else ""
    told_apart = not entry["ci"][0] <= 0.5 <= entry["ci"][1]
    text = f"{_who_wins(entry)} by {JUDGE_NAMES.get(judge, f'the judge {judge}')}: "
    text += f"{label(entry['policy'])} wins {rate(entry)}, n = {entry['n']} prompts{at}"
    power = report.get("power")
    if power and not told_apart:
        runs = power.get("runs")
        text += f"; {f'{runs} such runs' if runs else 'so many prompts'} show a gap of "
        text += f"{100 * power['detectable_gap']:.1f} points"
        needed = power.get("runs_needed") if runs else power["prompts_needed"]
        if needed:
            text += f", the observed one needs {needed:,}"
    if report["judges"][judge]["in_sample"]:
        text += " (an in-sample judge: PPO was trained to please it, so this favours PPO)"
    return text + "."


def _matched(report: dict[str, Any]) -> str:
    matched = report["matched_kl"]
    if "refused" in matched:
        return f"At matched KL nothing can be said: {matched['refused']}."
    if matched["ci"][1] < 0.5:
        matched = {
            **matched,
            "policy": matched["versus"],
            "versus": matched["policy"],
            "win_rate": 1 - matched["win_rate"],
            "ci": [1 - matched["ci"][1], 1 - matched["ci"][0]],
        }
    return (
        f"At matched KL ({matched['kl']:.1f} nats, interpolated along both sweeps) {_who_wins(matched)}: "
        f"{label(matched['policy'])} wins {rate(matched)}."
    )


def _against_reference(report: dict[str, Any]) -> str:
    judge = main_judge(report)
    best = [
        name for name, p in report["policies"].items() if p["method"] == "best_of_n" and "policy" not in p["point"]
    ]
    given = [name for name, p in report["policies"].items() if p["method"] == "other"]
    names = [name for name in (*dict.fromkeys(["ppo", "dpo", *given]), *best[-1:]) if name != "sft"]
    found = [(name, find(report, name, "sft", judge)) for name in names]
    if head_to_head(report)[1] == "sft":
        found = []  # the first sentence has said it
    parts = [f"{label(name)} wins {rate(entry)}" for name, entry in found if entry is not None]
    seeds = report["settings"]["seeds"]
    spread = (
        f"pooled over {len(seeds)} seeds"
        if len(seeds) > 1
        else f"one run (seed {seeds[0]}), so what another seed would give is not in these intervals"
    )
    reference = label("sft")
    if report.get("names"):
        # Nothing was trained here: the draws are all that chance had a hand in.
        spread = "another training of the same policies may come out differently"
    if not parts:
        said = f"{spread[0].upper()}{spread[1:]}."
        return said if report.get("names") else f"No policy was judged against SFT; {spread}."
    return f"Against {reference} {', '.join(parts)}; {spread}."


def warnings(report: dict[str, Any]) -> list[str]:
    """What a reader must know before quoting a figure."""
    with names_of(report):
        return _warnings(report)


def _warnings(report: dict[str, Any]) -> list[str]:
    found = []
    settings = report["settings"]
    if settings["n_prompts"] < 30:
        found.append(f"Only {settings['n_prompts']} prompts: intervals this wide decide nothing.")
    if settings["top_k"] or settings["top_p"] < 1:
        found.append(
            "Completions were drawn with top-k or top-p: they come from another policy than the model, and the KL "
            "shown is the model's, not that policy's (which may be infinite)."
        )
    found += (report["pair_set"] or {}).get("differences", [])
    for entry in report["control"]:
        if not entry["contains_half"]:
            found.append(
                f"The control failed: {label('sft')} against {label('sft')} is {rate(entry)} by {entry['judge']}; "
                f"do not trust small differences."
            )
    for point in report["frontier"]:
        if point.get("over_optimised"):
            found.append(
                f"{label(point['policy'])} is over-optimised: against {label(point['against'])} gold falls by "
                f"{-point['gold_change']:.2f} while proxy changes by {point['proxy_change']:+.2f}."
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
    return found
