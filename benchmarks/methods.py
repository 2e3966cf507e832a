"""The table and the picture of docs/methods.md, from the pooled report of three seeds.

    ppo-vs-dpo -m methods seed=1,2,3
    ppo-vs-dpo compare runs/methods-seed1 runs/methods-seed2 runs/methods-seed3
    python benchmarks/methods.py runs/pooled

Writes what stands between the marks in docs/methods.md, and docs/images/methods.png.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from ppo_vs_dpo.artifacts.errors import UserError  # noqa: E402
from ppo_vs_dpo.artifacts.files import read_json, write_text  # noqa: E402
from ppo_vs_dpo.compare.config import METHODS  # noqa: E402
from ppo_vs_dpo.compare.report.verdict import label, names_of, nats, percent, rate  # noqa: E402

PAGE = ROOT / "docs" / "methods.md"
MARKS = ("<!-- python benchmarks/methods.py RUN: from here -->", "<!-- to here -->")


def of_seeds(entry: dict[str, Any], key: str) -> str:
    """``2.31 [2.10, 2.52] (2.2, 2.4, 2.3)``: the mean, its interval over seeds and prompts, and each seed."""
    value, ci, seeds = entry[key], entry[f"{key}_ci"], entry.get(f"{key}_per_seed") or []
    shown = f" ({', '.join(f'{one:.2f}' for one in seeds)})" if seeds else ""
    return f"{value:.2f} [{ci[0]:.2f}, {ci[1]:.2f}]{shown}".replace("-", "−")


def rows(report: dict[str, Any]) -> list[str]:
    """A line of the table for SFT, each method, and the largest best-of-n."""
    tuning, tuned = report["settings"]["tuning"], report["cost"].get("tuned") or {}
    best = [name for name in report["policies"] if name.startswith("best_of_")][-1:]
    against = {(e["policy"], e["versus"]): e for e in report["win_rates"] if e["judge"] == "gold"}
    found = [
        "| policy | chosen, by seed | gold reward, interval (seeds) | KL, nats | wins against SFT, gold | "
        "seconds, settings and choice included | M tokens sampled | TFLOPs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in ["sft", *(m for m in METHODS if m in report["policies"]), *best]:
        entry, spent, win = report["policies"][name], tuned.get(name, {}), against.get((name, "sft"))
        if name == "sft":
            win = None  # against itself is the control
        points = tuning.get(name, {}).get("chosen", [])
        points = [points] if isinstance(points, str) else points
        chosen = [label(point).removeprefix(label(name)).strip() for point in points]
        wins = "–" if win is None else rate(win)
        cells = [
            label(name), ", ".join(chosen) or "–", of_seeds(entry, "gold_reward"), nats(entry["kl"]["mean"]), wins,
            f"{spent['seconds']:,.0f}" if spent.get("seconds") else "–",
            f"{spent['tokens_generated'] / 1e6:.2f}" if spent.get("tokens_generated") else "–",
            f"{spent['flops'] / 1e12:.2f}" if spent.get("flops") else "–",
        ]  # fmt: skip
        found.append(f"| {' | '.join(cells)} |")
    return found


def pairs(report: dict[str, Any]) -> list[str]:
    """Every method against every other by gold, the row's wins in percent; starred where p (Holm) is below 0.05."""
    names = [method for method in METHODS if method in report["policies"]]
    by = {(e["policy"], e["versus"]): e for e in report["win_rates"] if e["judge"] == "gold"}
    found = [f"| wins of the row, % | {' | '.join(map(label, names))} |", f"|---|{'---|' * len(names)}"]
    for row in names:
        cells = []
        for column in names:
            entry = by.get((row, column))
            star = "*" if entry and row != column and entry["p_holm"] < 0.05 else ""
            cells.append("" if row == column or entry is None else f"{100 * entry['win_rate']:.1f}{star}")
        found.append(f"| {label(row)} | {' | '.join(cells)} |")
    return found


def section(report: dict[str, Any]) -> str:
    """What stands between the marks."""
    settings = report["settings"]
    says = [f"> {sentence}" for sentence in report["verdict"]]
    accuracy = report["reward_model"]
    seeds, right = ", ".join(map(str, settings["seeds"])), percent(accuracy["accuracy"])
    about = (
        f"{settings['n_prompts']} held-out prompts, seeds {seeds}; the reward model is right in {right} of test "
        f"pairs, where their labels allow {percent(accuracy['ceiling'])}."
    )
    return "\n".join(["", about, "", *rows(report), "", *pairs(report), "", "The report's verdict:", "", *says, ""])


def picture(report: dict[str, Any], path: Path) -> None:
    """Reward at equal KL beside reward at equal compute."""
    from ppo_vs_dpo.compare.report.plots import beside

    path.parent.mkdir(parents=True, exist_ok=True)
    beside(report, path)


def main() -> int:
    """Write the page's part and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pooled", type=Path, help="the folder of the pooled report, or of one run's")
    arguments = parser.parse_args()
    path = arguments.pooled / "report.json"
    if not path.is_file():
        raise UserError(f"{path} is not there: pool the runs first (ppo-vs-dpo compare RUN RUN RUN).")
    report = read_json(path)
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    with names_of(report):
        made = section(report)
    write_text(PAGE, f"{before}{MARKS[0]}\n{made}\n{MARKS[1]}{after}")
    picture(report, ROOT / "docs" / "images" / "methods.png")
    print(made)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
