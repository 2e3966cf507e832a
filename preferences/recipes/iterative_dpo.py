"""Iterative DPO (Xu et al. 2024, Table 2): sample the policy, score, pair best against worst, train, repeat.

    ppo-vs-dpo iterate runs/quickstart --rounds 3 dpo.beta=0.1

Each round is an ordinary run of ``experiment=rejection`` (``RUN-round1``, ``RUN-round2``, ...) whose SFT policy, and
so DPO's reference, is the policy of the round before; prompts and the reward model are those of the first run. A
finished round is skipped and an interrupted one resumed, like any run.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from rich.table import Table

from ppo_vs_dpo.artifacts.errors import UserError, in_help, terminal
from ppo_vs_dpo.artifacts.files import read_json, write_json
from ppo_vs_dpo.artifacts.run import RunFolder


def command(start: RunFolder, round: int, rounds: int, overrides: list[str]) -> list[str]:
    """The command line of one round; the one after the last only samples and scores."""
    folder = round_folder(start, round)
    stages = "data,sft,pairs,dpo" if round <= rounds else "data,sft,pairs"
    mine = {
        "experiment": "rejection",
        "name": folder.name,
        "output_dir": folder.parent,
        "model": "pretrained",
        "model.path": policy_of(start, round),
        "sft.skip_training": "true",
        "stages": f"[{stages}]",
        "seed": int(start.config.get("seed", 0)) + 1000 * round,
        "data.prompts_path": start.path("data"),
        "data.reward_model": start.path("reward_model", "model"),
    }
    given = [item.split("=", 1)[0] for item in overrides]
    return [program(), *(f"{key}={value}" for key, value in mine.items() if key not in given), *overrides]


def policy_of(start: RunFolder, round: int) -> Path:
    """The policy that a round samples and trains further: SFT at first, then the DPO policy of the round before."""
    return start.path("sft", "model") if round == 1 else round_folder(start, round - 1) / "dpo" / "model"


def program() -> str:
    """The command ``ppo-vs-dpo`` that belongs to this Python."""
    beside = Path(sys.executable).with_name("ppo-vs-dpo")
    return str(beside) if beside.exists() else "ppo-vs-dpo"


def round_folder(start: RunFolder, round: int) -> Path:
    """Where a round is."""
    return start.root.with_name(f"{start.root.name}-round{round}")


def main(argv: list[str] | None = None) -> int:
    """Run the rounds and print what each policy's samples score.

    Raises:
        UserError: the first run lacks its SFT policy or reward model, or a round failed.
    """
    parser = argparse.ArgumentParser(prog="ppo-vs-dpo iterate", description=in_help(__doc__))
    parser.add_argument("run", help="a run whose stages data, sft and reward_model are done")
    parser.add_argument("--rounds", type=int, default=2, help="how often to sample and train")
    parser.add_argument("overrides", nargs="*", help="settings of every round, e.g. dpo.beta=0.1 data.samples=16")
    options = parser.parse_intermixed_args(argv)
    if options.rounds < 1:
        raise UserError(f"--rounds is {options.rounds}; at least 1 is needed.")
    start = RunFolder(options.run)
    for stage in ("data", "sft", "reward_model"):
        start.require(stage)
    rows = []
    for round in range(1, options.rounds + 2):
        done = subprocess.run(command(start, round, options.rounds, options.overrides))
        if done.returncode == 130:
            raise KeyboardInterrupt
        if done.returncode:
            raise UserError(
                f"round {round} failed (see above); finished rounds are kept, and the same command goes on."
            )
        figures = read_json(round_folder(start, round) / "pairs" / "done.json")["figures"]
        rows.append(
            {
                "round": round,
                "policy": str(policy_of(start, round)),
                "mean_score": figures["best_of_n"]["policy_mean_score"],
                "best_of_n": figures["best_of_n"]["mean_score"],
                "pairs": figures["pair_set"]["n_train"],
            }
        )
    write_json(start.root.with_name(f"{start.root.name}-iterative-dpo.json"), rows)
    table = Table("samples of", "mean score", f"best of {figures['samples']}", "pairs made of them")
    for row in rows:
        name = "SFT" if row["round"] == 1 else f"DPO, round {row['round'] - 1}"
        table.add_row(name, f"{row['mean_score']:.3f}", f"{row['best_of_n']:.3f}", str(row["pairs"]))
    terminal().print(table)
    return 0
