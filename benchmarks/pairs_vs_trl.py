"""What `dpo_vs_trl` and `reward_vs_trl` share: pairs of real-like lengths, two sides that train on them, the table."""

import argparse
import copy
import random
import statistics
import sys
import tempfile
from collections.abc import Callable

import torch

from benchmarks import measure
from benchmarks.ppo_vs_trl import VOCABULARY, WORKLOADS, Workload, hazard, models

PAIRS, EPOCHS, ROWS = 64, 2, 32
REAL: Workload = WORKLOADS["real"]
# Of both trainers; the rest of what the stages set by default is given too, so that both do the same work.
SETTINGS = {
    "num_train_epochs": EPOCHS, "per_device_train_batch_size": ROWS, "learning_rate": 1e-5, "max_length": 256,
    "lr_scheduler_type": "linear", "max_grad_norm": 1.0, "bf16": False, "gradient_checkpointing": False,
    "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
    "dataloader_pin_memory": False, "seed": 1,
}  # fmt: skip


def pairs() -> dict[str, list[str]]:
    """Prompts of 8 to 96 words, answers that end after a third of 64 on average, as text in TRL's format."""
    draw = random.Random(0)
    chance = hazard(REAL.mean, REAL.budget)

    def words(length: int) -> str:
        return " ".join(f"w{draw.randrange(VOCABULARY - 3)}" for _ in range(length))

    def answer() -> str:
        length = next((n for n in range(1, REAL.budget) if draw.random() < chance), REAL.budget)
        return " " + words(length)

    prompts = [words(draw.randint(*REAL.prompts)) for _ in range(PAIRS)]
    return {"prompt": prompts, "chosen": [answer() for _ in prompts], "rejected": [answer() for _ in prompts]}


def work(build: Callable, rounds: int) -> None:
    """One side: whole training runs, one a turn, from building the trainer to its last step.

    Args:
        build: ``f(models, tokenizer, pairs, folder) -> trainer``.
        rounds: turns.
    """
    from datasets import Dataset

    turns = measure.Turns()
    build_now = turns.timed("prepare", build)
    *roles, tokenizer = models(REAL)
    for role in roles[:2]:
        # A plain head, without the bias that makes responses end.
        head = torch.nn.Linear(role.config.hidden_size, VOCABULARY, bias=False)
        head.weight.data.copy_(role.lm_head.weight)
        role.lm_head = head
    turns.ready()
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            trainer = build_now(copy.deepcopy(roles), tokenizer, Dataset.from_dict(pairs()), folder)
            turns.timed("train", trainer.train)()
            losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        turns.done(last=number + 1 == rounds, samples=PAIRS * EPOCHS, loss=losses[-1])


def compare(module: str, title: str, bound: float, run_trl: Callable, run_ours: Callable) -> None:
    """The command of a benchmark: runs both sides, or is one of them.

    Args:
        module: its name, to start the sides by.
        title: of the table.
        bound: samples/s of ours over TRL's that must be reached.
        run_trl: builds TRL's trainer.
        run_ours: builds ours.
    """
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each side")
    parser.add_argument("--side", choices=["trl", "ours"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.side:
        work(run_trl if arguments.side == "trl" else run_ours, arguments.rounds + 1)
        return
    sides = [
        measure.Side(name, ["-m", module, "--side", name, "--rounds", str(arguments.rounds)], [str(measure.ROOT)])
        for name in ("trl", "ours")
    ]
    steps = measure.alternate(sides, arguments.rounds)
    rows = []
    for name, label in (("trl", "TRL, plain"), ("ours", "ours, as configured")):
        side = steps[name]
        seconds = measure.median(side, "seconds")
        rows.append([
            label, f"{side[0]['samples'] / seconds:.1f}", f"{seconds:.1f}",
            *[f"{measure.median(side, 'phases.' + phase):.1f}" for phase in ("prepare", "train")],
            f"{max(step['peak'] for step in side):.0f}", f"{side[-1]['loss']:.4f}",
        ])  # fmt: skip
    print(f"\n### {title}: {PAIRS} pairs, {EPOCHS} epochs, {ROWS} pairs a step\n")
    head = "side, pairs/s, s/run, of it preparing, training, peak MiB, last loss"
    print(measure.table(head.split(", "), rows))
    ratios = sorted(measure.ratios(steps["trl"], steps["ours"]))
    print(f"\nrounds: {', '.join(f'{ratio:.2f}' for ratio in ratios)}\n")
    print(measure.bar(f"{title}, pairs/s over TRL's", statistics.median(ratios), bound))
    sys.stdout.flush()
