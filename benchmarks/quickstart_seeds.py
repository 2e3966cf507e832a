"""The quickstart on several seeds, held against its bars.

    python -m benchmarks.quickstart_seeds --seeds 1 2 3 4 5 --markdown docs/quickstart-seeds.md
    python -m benchmarks.quickstart_seeds --reward-model --seeds 6 7 8 -- reward_model.weight_decay=0.05

Prints a row and the verdict for each seed, a line for each bar, and the verdict over all seeds; ends with exit code 1
where a bar was missed. ``--compare-again`` compares finished runs anew (their completions are kept by content): for
another version's statistics without training again. ``--reward-model`` runs that stage and what it needs alone.
"""

import argparse
import itertools
import subprocess
import sys
from pathlib import Path

from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.files import read_json, write_text
from ppo_vs_dpo.compare.estimates.win_rates import Settings
from ppo_vs_dpo.compare.pooled.reading import load_all
from ppo_vs_dpo.compare.pooled.runs import pool, pooled_samples
from ppo_vs_dpo.compare.report.pages import write_pages

COLUMNS = (
    "seed",
    "seconds",
    "RM accuracy",
    "ceiling",
    "share",
    "PPO win",
    "PPO KL",
    "PPO EOS",
    "DPO win",
    "DPO KL",
    "DPO EOS",
    "best-of-16 win",
    "SFT vs SFT",
    "proxy at 0",
    "gold at 0",
)


# The reward model's share of the way from chance to its ceiling: the least on any seed, and the mean.
LEAST, MEAN = 0.77, 0.80


def reward_models(seeds: list[int], output_dir: str, overrides: list[str]) -> int:
    """Train the quickstart's reward model on each seed; prints a row for each and the bars."""
    columns = ("accuracy", "expected_accuracy", "ceiling", "of_ceiling", "train_accuracy", "loss", "label_entropy")
    rows = []
    for seed in seeds:
        name = f"quickstart-seed{seed}"
        settings = ["experiment=quickstart", f"seed={seed}", f"output_dir={output_dir}", f"name={name}", *overrides]
        command = [*settings, "stages=[data,sft,pairs,reward_model]"]
        subprocess.run([sys.executable, "-m", "ppo_vs_dpo.pipeline.cli", *command], check=True)
        rows.append(read_json(Path(output_dir) / name / "reward_model" / "report.json"))
    found = [[str(seed), *(f"{row[key]:.3f}" for key in columns)] for seed, row in zip(seeds, rows, strict=True)]
    shares = [row["of_ceiling"] for row in rows]
    mean, least = sum(shares) / len(shares), min(shares)
    lines = [["seed", *columns], ["---"] * (1 + len(columns)), *found]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    words = f"share of the ceiling: mean {mean:.3f} (bar {MEAN}), least {least:.3f} (bar {LEAST})"
    sys.stdout.write(f"{table}\n\n{words}\n")
    return 0 if mean >= MEAN and least >= LEAST else 1


def run_seed(seed: int, output_dir: str, compare_again: bool = False) -> tuple[Path, float]:
    """Run one seed (a finished run is reused, its comparison too unless it is wanted again).

    Returns:
        Its folder, and the seconds of its four trainings, without the points of its sweeps.
    """
    folder = Path(output_dir) / f"quickstart-seed{seed}"
    module = [sys.executable, "-m"]
    if compare_again and (folder / "compare" / "done.json").is_file():
        subprocess.run([*module, "ppo_vs_dpo.compare", str(folder)], check=True)
    else:
        settings = ["experiment=quickstart", f"seed={seed}", f"output_dir={output_dir}"]
        subprocess.run([*module, "ppo_vs_dpo.pipeline.cli", *settings], check=True)
    stages = read_json(folder / "compare" / "report.json")["cost"]["stages"]
    return folder, sum(stage["seconds"] or 0.0 for stage in stages.values())


def pooled_verdict(folders: list[Path], output: Path) -> list[str]:
    """The verdict over several seeds; none of one seed alone."""
    if len(folders) < 2:
        return []
    runs, notes = load_all([str(folder) for folder in folders])
    own = runs[0].report["settings"]
    report = pool(runs, Settings(own["resamples"], own["seeds"][0], own["confidence"]), notes)
    write_pages(output, report, pooled_samples(runs, list(report["policies"]), list(report["judges"])), "quickstart")
    return report["verdict"]


def win(report: dict, policy: str, versus: str = "sft", judge: str = "gold") -> dict:
    """The entry of ``win_rates`` for a pair and a judge."""
    return next(
        row for row in report["win_rates"] if (row["policy"], row["versus"], row["judge"]) == (policy, versus, judge)
    )


def spread(row: dict) -> str:
    """``.85 [.83, .88]``."""
    low, high = row["ci"]
    return f"{row['win_rate']:.3f} [{low:.3f}, {high:.3f}]"


def judge_seed(report: dict, main_kl_coef: float) -> tuple[dict[str, str], dict[str, bool]]:
    """Figures and bars of one seed's report; ``main_kl_coef`` is the coefficient of the main PPO run."""
    model, policies = report["reward_model"], report["policies"]
    share = model["of_ceiling"]
    wins = {name: win(report, name) for name in ("ppo", "dpo", "best_of_16")}
    control = win(report, "sft", "sft")
    zero = next(policy for name, policy in policies.items() if name.startswith("ppo") and name.endswith("kl_coef=0.0"))
    frontier = report["frontier"]
    # Checkpoints stand on the frontier too; the bar is about the sweep of coefficients.
    ppo_points = [point for point in frontier if point["method"] == "ppo" and point["along"] == "sweep"]
    ppo_points.sort(key=lambda point: point["point"].get("kl_coef", main_kl_coef))
    kls = [point["kl"]["mean"] for point in ppo_points]
    figures = {
        "RM accuracy": f"{model['accuracy']:.3f}",
        "ceiling": f"{model['ceiling']:.3f}",
        "share": f"{share:.2f}",
        "PPO win": spread(wins["ppo"]),
        "DPO win": spread(wins["dpo"]),
        "best-of-16 win": spread(wins["best_of_16"]),
        "SFT vs SFT": spread(control),
        "proxy at 0": f"{zero['proxy_reward']:.2f} (main {policies['ppo']['proxy_reward']:.2f})",
        "gold at 0": f"{zero['gold_reward']:.2f} (main {policies['ppo']['gold_reward']:.2f})",
    }
    for name in ("ppo", "dpo"):
        figures[f"{name.upper()} KL"] = f"{policies[name]['kl']['mean']:.2f}"
        figures[f"{name.upper()} EOS"] = f"{policies[name]['eos_rate']:.3f}"
    bars = {
        f"RM share of the way from chance to the ceiling >= {LEAST}": share >= LEAST,
        "n >= 512 held-out prompts": wins["ppo"]["n"] >= 512,
        "PPO beats SFT, lower end >= 0.60": wins["ppo"]["ci"][0] >= 0.60,
        "DPO beats SFT, lower end >= 0.60": wins["dpo"]["ci"][0] >= 0.60,
        "best-of-16 beats SFT, lower end >= 0.70": wins["best_of_16"]["ci"][0] >= 0.70,
        "KL of PPO and DPO in 0.5 to 15 nats": all(0.5 <= policies[n]["kl"]["mean"] <= 15 for n in ("ppo", "dpo")),
        "EOS rate of PPO and DPO >= 0.95": all(policies[n]["eos_rate"] >= 0.95 for n in ("ppo", "dpo")),
        "SFT against SFT is level (its control passes)": control["passed"],
        "PPO's KL falls as its coefficient rises": all(a > b for a, b in itertools.pairwise(kls)),
        "at KL coefficient 0: proxy >= main - 0.05": zero["proxy_reward"] >= policies["ppo"]["proxy_reward"] - 0.05,
        "at KL coefficient 0: gold <= main - 0.5": zero["gold_reward"] <= policies["ppo"]["gold_reward"] - 0.5,
        "3 points each for PPO, DPO, best-of-n": all(
            sum(point["method"] == method for point in frontier) >= 3 for method in ("ppo", "dpo", "best_of_n")
        ),
        "one pair set in both branches": bool(report["pair_set"]["hash"]),
    }
    return figures, bars


def main() -> int:
    """Run, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--output-dir", default="runs")
    parser.add_argument("--compare-again", action="store_true", help="compare finished runs anew")
    parser.add_argument("--markdown", type=Path, help="write the table there as well")
    parser.add_argument("--reward-model", action="store_true", help="the reward model alone, with its bars")
    parser.add_argument("overrides", nargs="*", help="with --reward-model: key=value of the run")
    arguments = parser.parse_args()
    if arguments.reward_model:
        return reward_models(arguments.seeds, arguments.output_dir, arguments.overrides)
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    missed: dict[str, list[int]] = {}
    folders, said = [], []
    for seed in arguments.seeds:
        folder, seconds = run_seed(seed, arguments.output_dir, arguments.compare_again)
        report = read_json(folder / "compare" / "report.json")
        folders.append(folder)
        said += [f"**Seed {seed}.** {' '.join(report['verdict'])}"]
        figures, bars = judge_seed(report, OmegaConf.load(folder / "config.yaml").ppo.kl_coef)
        figures |= {"seed": str(seed), "seconds": f"{seconds:.0f}"}
        lines.append("| " + " | ".join(figures[column] for column in COLUMNS) + " |")
        for bar, met in bars.items():
            missed.setdefault(bar, [])
            if not met:
                missed[bar].append(seed)
    table = "\n".join(lines)
    verdicts = "\n".join(
        f"- {bar}: " + (f"MISSED on seeds {seeds}" if seeds else f"met on seeds {arguments.seeds}")
        for bar, seeds in missed.items()
    )
    together = pooled_verdict(folders, Path(arguments.output_dir) / "quickstart-pooled")
    said += [f"**All seeds.** {' '.join(together)}"] if together else []
    words = "\n\n".join(said)
    sys.stdout.write(f"{table}\n\n{verdicts}\n\n{words}\n")
    if arguments.markdown:
        command = f"python -m benchmarks.quickstart_seeds --seeds {' '.join(map(str, arguments.seeds))}"
        write_text(
            arguments.markdown,
            f"# The quickstart on {len(arguments.seeds)} seeds\n\n"
            f"Printed by `{command}`. Win rates are against SFT by gold; seconds are those of the four trainings of "
            f"the main run, without the sweeps.\n\n"
            f"{table}\n\n{verdicts}\n\n## Verdicts\n\n{words}\n",
        )
    return 1 if any(missed.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
