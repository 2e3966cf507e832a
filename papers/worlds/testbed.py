"""What a run of the pipeline on the testbed says: the figures that several papers' claims are about.

The testbed is the written world of reviews (docs/data.md): real SFT, reward model, PPO and DPO, and a gold reward that
is known. One run serves several papers.
"""

from pathlib import Path
from typing import Any

import numpy as np

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, read_jsonl, read_parquet

GOLD, SFT = "gold", "sft"


def read(folder: Path, seed: int) -> dict[str, Any]:
    """The report of one run.

    Raises:
        UserError: its comparison is not there.
    """
    path = folder / "compare" / "report.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist: the run's comparison has not finished.")
    report = read_json(path)
    figures = {**_policies(report), **_lengths(folder), **_first_update(folder)}
    model = report["reward_model"]
    figures |= {"reward model accuracy": model["accuracy"], "reward model ceiling": model["ceiling"]}
    matched = report["matched_kl"]
    if matched.get("win_rate") is not None:
        # Of whichever is named first there.
        rate = matched["win_rate"] if matched["policy"] == "ppo" else 1.0 - matched["win_rate"]
        figures |= {"ppo beats dpo at one kl": rate, "matched kl": matched["kl"]}
    points = [
        {
            "method": point["method"],
            "along": point["along"],
            "kl": point["kl"]["mean"],
            "gold": point["gold_reward"],
            "proxy": point["proxy_reward"],
        }
        for point in report["frontier"]
    ]
    seconds = sum(read_json(one).get("seconds") or 0.0 for one in sorted(folder.glob("*/done.json")))
    return {"seed": seed, "figures": figures, "points": points, "seconds": round(seconds, 1)}


def _policies(report: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, policy in report["policies"].items():
        found |= {
            f"{name} gold": policy["gold_reward"],
            f"{name} proxy": policy["proxy_reward"],
            f"{name} kl": policy["kl"]["mean"],
            f"{name} length": policy["length"],
            f"{name} eos": policy["eos_rate"],
        }
        if policy.get("displacement"):
            found[f"{name} chosen"] = policy["displacement"]["chosen"]
    for entry in report["win_rates"]:
        if entry["judge"] == GOLD and entry["policy"] != entry["versus"]:
            found[f"{entry['policy']} beats {entry['versus']}"] = entry["win_rate"]
    return found


def _lengths(folder: Path) -> dict[str, float]:
    """How much of PPO's gain in the reward model's score remains between answers of equal length (Singhal 2023)."""
    columns = ["policy", "role", "temperature", "tokens", "reward_model"]
    table = read_parquet(folder / "compare" / "completions.parquet", columns).to_pandas()
    # Plain draws at the run's temperature; best-of-n selects from the pool afterwards.
    plain = table[table["temperature"] == table["temperature"].iloc[0]]
    before = plain[plain["policy"] == SFT]
    found = {}
    for method in ("ppo", "dpo"):
        after = plain[(plain["policy"] == method) & (plain["role"] == "sample")]
        gain = after["reward_model"].mean() - before["reward_model"].mean()
        found[f"{method} share within lengths"] = within_lengths(
            before["tokens"].to_numpy(),
            before["reward_model"].to_numpy(),
            after["tokens"].to_numpy(),
            after["reward_model"].to_numpy(),
        ) / float(gain)
        found[f"{method} length gain"] = float(after["tokens"].mean() - before["tokens"].mean())
    found["score and length"] = float(np.corrcoef(before["tokens"], before["reward_model"])[0, 1])
    return found


def within_lengths(
    tokens: np.ndarray, scores: np.ndarray, new_tokens: np.ndarray, new_scores: np.ndarray, width: int = 4
) -> float:
    """Mean gain in score between answers whose lengths lie in one bin, weighted by the new policy's lengths.

    Bins that only one side has say nothing and are left out (Singhal et al. 2023: "non-length reward gain").

    Args:
        tokens: ``(N,)`` lengths before.
        scores: ``(N,)`` their scores.
        new_tokens: ``(M,)`` lengths after.
        new_scores: ``(M,)`` their scores.
    """
    gains, weights = [], []
    for bin_ in np.unique(new_tokens // width):
        old, new = scores[tokens // width == bin_], new_scores[new_tokens // width == bin_]
        if len(old):
            gains.append(new.mean() - old.mean())
            weights.append(len(new))
    return float(np.average(gains, weights=weights)) if gains else float("nan")


def _first_update(folder: Path) -> dict[str, float]:
    """KL to the reference in the first rollout: nothing has been trained, so it is rounding."""
    rows = [row for row in read_jsonl(folder / "ppo" / "metrics.jsonl") if "objective/kl" in row]
    return {"first kl": abs(float(rows[0]["objective/kl"]))}


def draw(axes: Any, reports: Any) -> None:
    """Gold against the square root of KL: PPO and DPO by their coefficients, best-of-n."""
    styles = {"ppo": ("#0072B2", "o"), "dpo": ("#D55E00", "s"), "best_of_n": ("#009E73", "^")}
    for report in reports:
        for method, (colour, marker) in styles.items():
            chosen = [p for p in report["points"] if p["method"] == method and p["along"] in ("sweep", "n")]
            rows = sorted((np.sqrt(max(p["kl"], 0.0)), p["gold"]) for p in chosen if p["gold"] is not None)
            if rows:
                name = method.replace("_", "-")
                axes.plot(*zip(*rows, strict=True), marker=marker, color=colour, alpha=0.6, markersize=4, label=name)
    axes.set(xlabel="sqrt KL(policy, SFT), nats^½", ylabel="gold reward")
