"""The verdict in three sentences that claim no more than was measured, and the report's warnings."""

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


def label(name: str) -> str:
    """``ppo`` -> ``PPO``, ``ppo,kl_coef=0.0`` -> ``PPO kl_coef 0.0``, ``best_of_16`` -> ``best-of-16``.

    ``best_of_4,policy=ppo`` -> ``best-of-4 of PPO``.
    """
    method, _, point = name.partition(",")
    if point.startswith("policy="):
        return f"{label(method)} of {label(point.removeprefix('policy='))}"
    method = method.upper() if method in ("ppo", "dpo", "sft") else method.replace("best_of_", "best-of-")
    return f"{method} {point.replace('=', ' ').replace(',', ', ')}" if point else method


def _who_wins(entry: dict[str, Any]) -> str:
    first, second = label(entry["policy"]), label(entry["versus"])
    if entry["ci"][0] > 0.5:
        return f"{first} beats {second}"
    if entry["ci"][1] < 0.5:
        return f"{second} beats {first}"
    return f"{first} and {second} cannot be told apart"


def sentences(report: dict[str, Any]) -> list[str]:
    """Three sentences: the two methods as they are; at matched KL; against the reference, and what is not known."""
    return [_head_to_head(report), _matched(report), _against_reference(report)]


def _head_to_head(report: dict[str, Any]) -> str:
    judge = main_judge(report)
    entry = find(report, "ppo", "dpo", judge)
    if entry is None:
        have = ", ".join(label(name) for name in report["policies"])
        return f"There is no verdict between PPO and DPO: this run has {have} only."
    if entry["ci"][1] < 0.5:
        entry = find(report, "dpo", "ppo", judge)
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
    names = ["ppo", "dpo", *best[-1:]]
    found = [(name, find(report, name, "sft", judge)) for name in names]
    parts = [f"{label(name)} wins {rate(entry)}" for name, entry in found if entry is not None]
    seeds = report["settings"]["seeds"]
    spread = (
        f"pooled over {len(seeds)} seeds"
        if len(seeds) > 1
        else f"one run (seed {seeds[0]}), so what another seed would give is not in these intervals"
    )
    return f"Against SFT {', '.join(parts)}; {spread}." if parts else f"No policy was judged against SFT; {spread}."


def warnings(report: dict[str, Any]) -> list[str]:
    """What a reader must know before quoting a figure."""
    found = []
    settings = report["settings"]
    if settings["n_prompts"] < 30:
        found.append(f"Only {settings['n_prompts']} prompts: intervals this wide decide nothing.")
    if settings["top_k"] or settings["top_p"] < 1:
        found.append(
            "Completions were drawn with top-k or top-p: they come from another policy than the model, and the KL "
            "shown is the model's, not that policy's (which may be infinite)."
        )
    found += report["pair_set"].get("differences", [])
    for entry in report["control"]:
        if not entry["contains_half"]:
            found.append(
                f"The control failed: SFT against SFT is {rate(entry)} by {entry['judge']}; "
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
