"""What a report may claim: one primary comparison, a small family behind it, and what forbids a verdict.

Three outcomes: one side *beats* the other, the two are *equal* within delta, or it stays *undecided*. Every sentence
of the verdict is made from these; nothing else claims anything.
"""

from typing import Any

from ppo_vs_dpo.compare.config import METHODS
from ppo_vs_dpo.compare.statistics.significance import FEWEST_DECIDED, better_than_chance, holm

# Seeds of which one may speak of the method, not of the run.
ENOUGH_SEEDS = 3


def find(report: dict[str, Any], policy: str, versus: str, judge: str | None) -> dict[str, Any] | None:
    """A win rate of the report."""
    wanted = (policy, versus, judge)
    return next((e for e in report["win_rates"] if (e["policy"], e["versus"], e["judge"]) == wanted), None)


def head_to_head(report: dict[str, Any]) -> tuple[str, str]:
    """The two policies that the verdict is about: PPO and DPO, or the first two that were given."""
    return tuple(report.get("head_to_head") or ("ppo", "dpo"))


def main_judge(report: dict[str, Any]) -> str | None:
    """The judge the verdict quotes: gold where it is known, else the first that no policy was trained on."""
    heard = {entry["judge"] for entry in report.get("win_rates", [])}
    judges = {name: judge for name, judge in report["judges"].items() if "win_rates" not in report or name in heard}
    if "gold" in judges:
        return "gold"
    return next((name for name, judge in judges.items() if not judge["in_sample"]), next(iter(judges), None))


def objections(report: dict[str, Any], judge: str) -> list[str]:
    """Why this judge decides nothing in this report, a clause each; none, and it may."""
    about, found = report["judges"][judge], []
    if about["in_sample"]:
        found.append("PPO was trained to please this judge")
    checked = about.get("heldout")
    # The gold reward of a testbed is right by definition; a comparison of given policies has no held-out pairs.
    if judge != "gold" and not report.get("names"):
        if checked is None or not checked["n"]:
            found.append(
                "whether this judge is better than a coin on held-out pairs was not measured (compare.check_pairs)"
            )
        elif not better_than_chance(checked["right"], checked["n"]):
            share = 100 * checked["right"] / checked["n"]
            found.append(
                f"on {checked['n']} held-out pairs it is right in {share:.0f} %, no better than a coin is shown"
            )
    failed = [c for c in report["control"] if c["judge"] == judge and not c["passed"]]
    if failed:
        found.append("its control failed")
    chosen = [name for name, one in (report["settings"].get("tuning") or {}).items() if one["chosen_on"] == "heldout"]
    if chosen:
        found.append(
            f"{' and '.join(name.upper() for name in sorted(chosen))} was chosen on the very prompts it is judged on"
        )
    return found


def outcome(entry: dict[str, Any], p: float, alpha: float, delta: float, forbidden: bool) -> dict[str, Any]:
    """``beats`` (with ``winner``), ``equal`` or ``undecided`` for one win rate.

    Equal comes first: delta was set before as the smallest difference that matters, and a smaller one that is shown to
    be there (``lead``) is still smaller.

    ``p`` is corrected for its family; ``forbidden``: something stands against any verdict by this judge.
    """
    shown = p <= alpha and not entry["ci"][0] <= 0.5 <= entry["ci"][1]
    # What KL does not allow is no win: something is not what it is taken for.
    forbidden = forbidden or (entry.get("allowed") or {}).get("outside", False)
    if not forbidden and entry.get("within", 1.0) <= delta:
        return {"outcome": "equal", "winner": None, "lead": shown}
    if not forbidden and shown and entry.get("decided", FEWEST_DECIDED) >= FEWEST_DECIDED:
        return {
            "outcome": "beats",
            "winner": entry["policy"] if entry["win_rate"] > 0.5 else entry["versus"],
            "lead": True,
        }
    return {"outcome": "undecided", "winner": None, "lead": False}


def decide(report: dict[str, Any]) -> dict[str, Any]:
    """The section ``decision``: the primary comparison at alpha, the secondary ones by Holm, and the rest left to
    explore.

    Also sets ``family`` and ``p_holm`` of every win rate: primary p as it is, secondary corrected among themselves,
    all others corrected for all others of their judge.
    """
    alpha, delta = round(1 - report["settings"]["confidence"], 12), report["settings"]["delta"]
    judge = main_judge(report)
    against = [judge and objections(report, judge)][0] or []
    pair = head_to_head(report)
    primary = find(report, *pair, judge)
    best = [n for n, p in report["policies"].items() if p["method"] == "best_of_n" and "policy" not in p["point"]]
    given = [name for name, p in report["policies"].items() if p["method"] == "other"]
    names = [n for n in (*dict.fromkeys(["ppo", "dpo", *METHODS, *given]), *best[-1:]) if n in report["policies"]]
    names = [] if pair[1] == "sft" else names  # then the first sentence says it
    family = [entry for name in names if (entry := find(report, name, "sft", judge)) is not None]
    matched = report["matched_kl"] if report["matched_kl"].get("kind") == "matched" else None
    corrected = holm([entry["p"] for entry in family] + ([matched["p"]] if matched else []))
    p_of = {entry["policy"]: float(p) for entry, p in zip(family, corrected, strict=False)}
    _families(report, judge, p_of, None if primary is None else pair)
    secondary = [
        {
            **{key: entry[key] for key in ("policy", "versus")},
            **{"kind": "win rate", "p": entry["p"], "p_holm": p_of[entry["policy"]]},
            **outcome(entry, p_of[entry["policy"]], alpha, delta, bool(against)),
        }
        for entry in family
    ]
    if matched:
        p = float(corrected[-1])
        secondary.append(
            {
                **{key: matched[key] for key in ("policy", "versus")},
                **{"kind": "matched KL", "p": matched["p"], "p_holm": p},
                **outcome(matched, p, alpha, delta, bool(against)),
            }
        )
    found = {
        "judge": judge,
        "alpha": alpha,
        "delta": delta,
        "objections": against,
        "primary": None,
        "secondary": secondary,
    }
    if primary is not None:
        about = {"policy": primary["policy"], "versus": primary["versus"], "p": primary["p"]}
        found["primary"] = {**about, **outcome(primary, primary["p"], alpha, delta, bool(against))}
    return found


def _families(
    report: dict[str, Any], judge: str | None, p_of: dict[str, float], primary: tuple[str, str] | None
) -> None:
    first = set() if primary is None else {primary, primary[::-1]}
    second = {(name, "sft") for name in p_of} | {("sft", name) for name in p_of}
    rest: dict[str, list[dict[str, Any]]] = {}
    for entry in report["win_rates"]:
        pair = (entry["policy"], entry["versus"])
        if pair[0] == pair[1]:
            continue
        if entry["judge"] == judge and pair in first:
            entry["family"], entry["p_holm"] = "primary", entry["p"]
        elif entry["judge"] == judge and pair in second:
            entry["family"] = "secondary"
            entry["p_holm"] = p_of[pair[0] if pair[1] == "sft" else pair[1]]
        else:
            entry["family"] = "exploratory"
            rest.setdefault(entry["judge"], []).append(entry)
    for entries in rest.values():
        pairs = {frozenset((e["policy"], e["versus"])): e["p"] for e in entries}
        corrected = dict(zip(pairs, holm(list(pairs.values())), strict=True))
        for entry in entries:
            entry["p_holm"] = float(corrected[frozenset((entry["policy"], entry["versus"]))])
