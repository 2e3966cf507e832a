"""The verdict: what may be claimed, in which words, and no two sentences of a report that contradict each other."""

import re

import numpy as np
import pytest

from ppo_vs_dpo.compare.estimates.allowed import use_kl
from ppo_vs_dpo.compare.estimates.win_rates import PairTable, Settings, power_line, win_rates
from ppo_vs_dpo.compare.report.decision import decide, find, main_judge, objections
from ppo_vs_dpo.compare.report.verdict import (
    label,
    nats,
    of_hundred,
    p_text,
    sentences,
    warnings,
    would_change,
)
from ppo_vs_dpo.compare.sampling.completions import Draws
from ppo_vs_dpo.compare.sampling.contenders import Contender

NAMES = ("sft", "ppo", "dpo", "best_of_4")
PAIRS = [("ppo", "sft"), ("dpo", "sft"), ("dpo", "ppo"), ("best_of_4", "sft")]
JUDGES = {
    "gold": {"kind": "function", "in_sample": False},
    "reward_model": {"kind": "reward_model", "in_sample": True},
    "reader": {"kind": "llm", "in_sample": False},
}


def contender(name, kl):
    """A policy of given KLs by prompt."""
    n = len(kl)
    measures = dict.fromkeys(("kl", "k1", "k3"), kl[:, None])
    draws = Draws(name, "sample", 1.0, [], [], np.ones((n, 1)), np.ones((n, 1)), measures, {})
    return Contender(name, "sft" if name == "sft" else name[:3], draws, np.ones((n, 1)))


def report_of(preferences, judges, kls, *, seeds=(1,), failed=(), heldout=None, matched=None, delta=0.05):
    """A report as the stage puts it together, from preferences by judge ``{judge: (P, 4)}`` and KLs by
    policy ``(P,)``.
    """
    how = Settings(400)
    n = len(next(iter(preferences.values())))
    about = {name: dict(JUDGES[name]) for name in judges}
    for name, counts in (heldout or {}).items():
        about[name]["heldout"] = {"n": counts[1], "right": counts[0]}
    tables = {name: PairTable(PAIRS, preferences[name], (preferences[name] == 0.5).astype(float)) for name in judges}
    policies = {
        name: {
            **{"method": "best_of_n" if name.startswith("best") else name, "point": {}, "eos_rate": 1.0},
            **{"kl": {"mean": float(kls[name].mean()) if name in kls else None}, "quality": {"empty_rate": 0.0}},
        }
        for name in NAMES
    }
    known = {name: contender(name, kl) for name, kl in kls.items()}
    rates = []
    for judge, table in tables.items():
        entries = win_rates(table, judge, how)
        near = [e for e in entries if {e["policy"], e["versus"]} <= set(known)]
        far = [e for e in entries if not {e["policy"], e["versus"]} <= set(known)]
        rates += use_kl(near, lambda name: [known[name]], [[]], how) + far
    control = {"policy": "sft", "versus": "sft", "expected": 0.5, "win_rate": 0.6, "ci": [0.55, 0.65], "p": 0.001}
    report = {
        **{"policies": policies, "judges": about, "win_rates": rates, "frontier": [], "reward_model": None},
        "settings": {
            **{"seeds": list(seeds), "n_prompts": n, "units": n, "confidence": 0.95, "delta": delta, "tuning": {}},
            **{"top_k": 0, "top_p": 1.0},
        },
        "pair_set": {},
        "control": [{**control, "judge": name, "passed": name not in failed} for name in judges],
        "matched_kl": matched or {"policy": "ppo", "versus": "dpo", "refused": "there is no sweep"},
    }
    report["power"] = power_line(tables[main_judge(report)], "ppo", "dpo", how, delta)
    report["decision"] = decide(report)
    return report


def wins(n, rate, rng=None, ties=0.0):
    """Plain wins and losses of about this rate, ``(n, 1)``; as near to it as can be without a generator."""
    if rng is None:
        return (np.arange(n) < round(rate * n)).astype(float)[:, None]
    drawn = (rng.random((n, 1)) < rate).astype(float)
    return np.where(rng.random((n, 1)) < ties, 0.5, drawn)


def simple(rate, n=512, judge="gold", kl=(3.2, 2.1), **options):
    """A report in which PPO wins this share against DPO, and both win two in three against SFT."""
    columns = [wins(n, 0.67), wins(n, 0.67), 1 - wins(n, rate), wins(n, 0.8)]
    kls = {"sft": np.zeros(n), "ppo": np.full(n, kl[0]), "dpo": np.full(n, kl[1])}
    for noisy in ("ppo", "dpo"):
        kls[noisy] = kls[noisy] * np.random.default_rng(1).lognormal(-0.125, 0.5, n)
    return report_of({judge: np.concatenate(columns, axis=1)}, [judge], kls, **options)


def test_three_outcomes():
    assert simple(0.62)["decision"]["primary"]["outcome"] == "beats"
    assert simple(0.62)["decision"]["primary"]["winner"] == "ppo"
    assert simple(0.38)["decision"]["primary"]["winner"] == "dpo"
    assert simple(0.5, n=2048)["decision"]["primary"]["outcome"] == "equal"
    assert simple(0.52, n=128)["decision"]["primary"]["outcome"] == "undecided"
    # A lead that is shown and smaller than what matters is equality.
    lead = simple(0.52, n=6000)
    assert lead["decision"]["primary"] | {"p": 0} == {
        **{"policy": "ppo", "versus": "dpo", "p": 0},
        **{"outcome": "equal", "winner": None, "lead": True},
    }
    assert "smaller than what was said to matter" in sentences(lead)[0]


def test_words():
    says = sentences(simple(0.62))
    assert says[0].startswith(
        "This PPO run beats this DPO run by the gold reward: PPO's answer is the better one on 62 of"
    )
    assert "Their KLs to SFT are" in says[0]
    assert sentences(simple(0.62, seeds=(1, 2)))[0].startswith("These two PPO runs beat these two DPO runs")
    assert sentences(simple(0.62, seeds=(1, 2, 3)))[0].startswith("PPO beats DPO by")
    assert sentences(simple(0.52, n=128))[0].startswith("Undecided between this PPO run and this DPO run: by the gold")
    assert sentences(simple(0.5, n=2048))[0].startswith("This PPO run and this DPO run are equal within 5 points")
    assert "one run (seed 1)" in says[2]
    assert nats(0.00301) == "0.0030"
    assert nats(3.1704) == "3.17"
    assert nats(0.0) == "0.00"
    assert of_hundred({"win_rate": 0.62, "ci": [0.58, 0.66]}) == "62 of 100 prompts (58 to 66)"
    # An end is never rounded onto 50, or across it; the rate itself needs no more digits than its interval deserves.
    assert of_hundred({"win_rate": 0.58, "ci": [0.5012, 0.66]}) == "58.0 of 100 prompts (50.1 to 66.0)"
    assert of_hundred({"win_rate": 0.500001, "ci": [0.45, 0.55]}) == "50 of 100 prompts (45 to 55)"
    assert of_hundred({"win_rate": 0.55, "ci": [0.500001, 0.6]}) == "55 of 100 prompts (just over 50 to 60)"
    assert nats(-0.0) == "0.00"
    said = [p_text(p) for p in (0.0, 0.031, 0.0496, 0.0504, 0.05, 0.0500001, 1.0)]
    assert said == ["p < 0.0001", "p = 0.031", "p = 0.0496", "p = 0.0504", "p = 0.05", "p just over 0.05", "p = 1"]
    # One run is one run in every sentence, and units are not called prompts.
    assert "this PPO run beats SFT" in sentences(simple(0.62))[2]
    assert "these two PPO runs beat SFT" in sentences(simple(0.62, seeds=(1, 2)))[2]
    assert ": PPO beats SFT" in sentences(simple(0.62, seeds=(1, 2, 3)))[2]
    clustered = simple(0.62)
    for entry in clustered["win_rates"]:
        entry["units"] = 200
    assert "n = 512 (200 units of evidence)" in sentences(clustered)[0]


def test_an_estimate_lies_in_its_own_interval():
    """Half of all sound runs near SFT have a sample outside of what KL allows: it is cut, the sample beside it."""
    report = simple(9 / 29, n=29, judge="reader", kl=(0.02, 0.01), heldout={"reader": (160, 256)})
    for entry in report["win_rates"]:
        low, high = entry["ci"]
        assert low <= entry["win_rate"] <= high
        if {entry["policy"], entry["versus"]} == {"ppo", "dpo"}:
            assert not entry["allowed"]["outside"]
            assert abs(entry["raw"]["win_rate"] - 0.5) == pytest.approx(0.5 - 9 / 29)
            assert abs(entry["win_rate"] - 0.5) == pytest.approx(entry["allowed"]["at_most"])
    assert "on these prompts it was 69 of 100, which is more than their KLs allow" in sentences(report)[0]


def test_what_kl_does_not_allow_is_not_claimed():
    report = simple(0.5, n=64, kl=(1e-5, 1e-6))
    assert [one["outcome"] for one in report["decision"]["secondary"][:2]] == ["undecided", "undecided"]
    assert any("lies outside of what their KLs allow (0.1 points from 50)" in one for one in warnings(report))
    assert any("lies outside of what their KLs allow (0.04 points from 50)" in one for one in warnings(report))
    far = simple(0.8, n=200, kl=(1e-4, 1e-5))
    assert sentences(far)[0].startswith("Undecided between this PPO run and this DPO run")
    assert "that lies outside of what their KLs allow" in sentences(far)[0]


def test_what_forbids_a_verdict():
    """In-sample, no better than a coin, a failed control: undecided, and the sentence says why."""
    cases = [
        ("reward_model", {"heldout": {"reward_model": (180, 256)}}, "PPO was trained to please this judge"),
        ("reader", {}, "was not measured"),
        ("reader", {"heldout": {"reader": (13, 29)}}, "on 29 held-out pairs it is right in 45 %"),
        ("gold", {"failed": ("gold",)}, "its control failed"),
    ]
    for judge, options, why in cases:
        report = simple(0.7, judge=judge, **options)
        assert report["decision"]["primary"]["outcome"] == "undecided"
        assert {one["outcome"] for one in report["decision"]["secondary"]} == {"undecided"}
        assert why in sentences(report)[0]
        # An interval on one side of 50 beside "undecided": why is said there, too.
        assert "best-of-4 is undecided for the reason in the first sentence (better on 80" in sentences(report)[2]
        assert " beats " not in " ".join(sentences(report))
    assert simple(0.7, judge="reader", heldout={"reader": (160, 256)})["decision"]["primary"]["outcome"] == "beats"
    report = simple(0.7)
    report["settings"]["tuning"] = {"ppo": {"settings": 9, "chosen_on": "heldout"}}
    assert "PPO was chosen on the very prompts it is judged on" in objections(report, "gold")
    few = simple(0.9, n=9)
    assert few["decision"]["primary"]["outcome"] == "undecided"


def test_the_run_on_hh():
    """20 of 29, KLs of .0030 and .0010 nats, a judge that is right in 44 % of pairs: undecided, and at
    most 4 points apart.
    """
    report = simple(9 / 29, n=29, judge="reward_model", kl=(0.003, 0.001), heldout={"reward_model": (11, 25)})
    says = sentences(report)[0]
    assert says.startswith("Undecided between this DPO run and this PPO run")
    assert re.search(
        r"KLs to SFT are 0\.00\d+ and 0\.00\d+ nats: whatever the judge, they are at most [345]\.\d points apart", says
    )
    assert any("no judge and no number of prompts can show more than" in one for one in would_change(report))
    entry = find(report, "ppo", "dpo", "reward_model")
    assert entry["allowed"]["distance"] == pytest.approx(0.037, abs=0.008)
    assert 0.45 < entry["ci"][0] < entry["ci"][1] < 0.55


def test_families():
    """Primary at its own p, the verdict's others by Holm among themselves, the rest by Holm for all others
    of the judge.
    """
    rng = np.random.default_rng(0)
    both = {judge: np.concatenate([wins(200, 0.55, rng) for _ in PAIRS], axis=1) for judge in ("gold", "reward_model")}
    report = report_of(both, ["gold", "reward_model"], {})
    for entry in report["win_rates"]:
        if entry["judge"] == "reward_model":
            assert entry["family"] == "exploratory"
        elif {entry["policy"], entry["versus"]} == {"ppo", "dpo"}:
            assert (entry["family"], entry["p_holm"]) == ("primary", entry["p"])
        else:
            assert entry["family"] == "secondary"
    p = sorted(one["p"] for one in report["decision"]["secondary"])
    holm = sorted(one["p_holm"] for one in report["decision"]["secondary"])
    assert holm[0] == pytest.approx(min(1.0, len(p) * p[0]))


def claims(report):
    """(who, whom, where) -> outcome, as the sentences have it, and the sentences."""
    says, found = sentences(report), []
    head = says[0]
    if head.startswith("Undecided"):
        found.append(("head", "undecided", None))
    elif " equal within " in head:
        found.append(("head", "equal", None))
    elif match := re.match(r"(?:This|These two)? ?(\S+)(?: runs?)? beats? ", head):
        found.append(("head", "beats", match[1]))
    verbs = {"beats?": "beats", "loses? to": "loses", "equals?": "equal"}
    for verb, outcome in verbs.items():
        for name in re.findall(rf"(\S+)(?: runs?)? {verb} SFT", says[2]):
            found.append((name, outcome, None))
    for name in re.findall(r"(\S+)(?: runs?)? (?:is|are) undecided", says[2]):
        found.append((name, "undecided", None))
    return says, found


@pytest.mark.parametrize("seed", range(6))
def test_no_two_sentences_contradict_each_other(seed):
    """Random reports: every claim is what the figures beside it say, once, and nothing said elsewhere
    speaks against it.
    """
    rng = np.random.default_rng(seed)
    for _ in range(40):
        n = int(rng.choice([5, 12, 29, 64, 300, 2000]))
        judges = [name for name in JUDGES if rng.random() < 0.6] or ["gold"]
        tables = {}
        for judge in judges:
            tables[judge] = np.concatenate(
                [wins(n, float(rng.choice([0.5, 0.5, 0.55, 0.65, 0.9])), rng, rng.choice([0, 0.6])) for _ in PAIRS],
                axis=1,
            )
            flip = rng.random(4) < 0.5
            tables[judge][:, flip] = 1 - tables[judge][:, flip]
        scale = 10.0 ** rng.uniform(-3.5, 1, size=2)
        kls = {"sft": np.zeros(n)}
        kls |= {name: s * rng.lognormal(0, 0.5, n) for name, s in zip(("ppo", "dpo"), scale, strict=True)}
        failed = [judge for judge in judges if rng.random() < 0.2]
        held = {judge: (int(rng.integers(40, 90)), 100) for judge in judges if rng.random() < 0.7}
        seeds = list(range(int(rng.integers(1, 5))))
        kind = rng.choice(["refused", "equal", "one-sided", "matched"])
        near, far = sorted(("ppo", "dpo"), key=lambda name: kls[name].mean())
        rate = float(rng.uniform(0.3, 0.7))
        half = float(rng.uniform(0.005, 0.2))
        matched = {
            "refused": None,
            "equal": {"policy": "ppo", "versus": "dpo", "kind": "equal", "kl": 1.0},
            "one-sided": {
                **{"policy": near, "versus": far, "kind": "one-sided"},
                **{"kl": float(kls[near].mean()), "kl_versus": float(kls[far].mean()), "kl_apart": rng.random() < 0.5},
                **{"runs": len(seeds), "without": int(rng.integers(1, len(seeds) + 1))},
            },
            "matched": {"policy": far, "versus": near, "kind": "matched", "kl": float(kls[near].mean())},
        }[kind]
        if matched:
            decided = abs(rate - 0.5) > half
            matched |= {
                "win_rate": rate,
                "ci": [rate - half, rate + half],
                "p": 0.001 if decided else 0.5,
                "points": {},
            }
        report = report_of(tables, judges, kls, seeds=seeds, failed=failed, heldout=held, matched=matched)
        check(report, failed)


def check(report, failed):
    """All that must agree in one report."""
    says, found = claims(report)
    told = " ".join([*says, *warnings(report), *would_change(report)])
    decision, judge = report["decision"], report["decision"]["judge"]
    entry = find(report, "ppo", "dpo", judge)
    outcomes = {name: (outcome, who) for name, outcome, who in found}
    assert outcomes["head"][0] == decision["primary"]["outcome"]
    for one in decision["secondary"]:
        if one["kind"] == "win rate":
            said = outcomes[label(one["policy"])][0]
            expected = one["outcome"] if one["winner"] != "sft" else "loses"
            assert said == expected
    if outcomes["head"][0] == "beats":
        winner = decision["primary"]["winner"]
        loser = {"ppo": "dpo", "dpo": "ppo"}[winner]
        turned = find(report, winner, loser, judge)
        assert outcomes["head"][1] == label(winner)
        assert turned["ci"][0] > 0.5
        assert turned["p"] <= 0.05
        low = float(re.search(r"\((\d+\.?\d*) to", says[0])[1])
        assert low > 50
        # No bound, nor equality, speaks against it.
        assert turned["within"] > report["settings"]["delta"]
        bound = re.search(r"at most (\d+\.\d) points apart", says[0])
        assert bound is None or float(bound[1]) > 100 * report["settings"]["delta"] - 0.1
        assert f"The judge {judge} calls everything a tie" not in told
    for one in [decision["primary"], *decision["secondary"]]:
        figure = find(report, one["policy"], one["versus"], judge)
        if one.get("kind") != "matched KL" and (figure.get("allowed") or {}).get("outside"):
            assert one["outcome"] == "undecided"  # what is impossible is not claimed
    if decision["objections"]:
        assert " beats " not in told
        assert " beat " not in told
        assert "equal within" not in " ".join(says)
    if judge in failed:
        assert "no verdict is given by it" in told
    if len(report["settings"]["seeds"]) == 1 and outcomes["head"][0] != "undecided":
        assert "this PPO run" in says[0] or "This PPO run" in says[0]
    bound = re.search(r"at most (\d+\.\d) points apart", says[0])
    if bound:
        ends = [float(x) for x in re.search(r"\((\S+) to (\S+)\)", says[0]).groups()]
        assert max(abs(end - 50) for end in ends) <= float(bound[1]) + 0.51
        assert entry["allowed"]["at_most"] < 0.45
    if (matched := report["matched_kl"]).get("kind") == "one-sided" and "decided" in says[1] and matched["runs"] > 1:
        assert f"in {matched['without']} of {matched['runs']} runs the farther one has no point" in says[1]
    if "does so with less KL" in says[1]:
        assert outcomes["head"][0] == "beats"
        assert outcomes["head"][1] == label(report["matched_kl"]["policy"])
    if outcomes["head"][0] == "undecided":
        assert would_change(report)
    assert "decide nothing" not in told
