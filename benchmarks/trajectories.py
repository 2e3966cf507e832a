"""Forty steps of every trained stage beside recorded ones: a refactor moves no number.

    OMP_NUM_THREADS=1 python -m benchmarks.trajectories                          compare with tests/trajectories/*.csv
    OMP_NUM_THREADS=1 python -m benchmarks.trajectories --record [--stage ppo]   write them anew

SFT, the reward model, DPO and PPO run as the stages that they are, one on the folder of the other, on a Llama of 16
units whose first weights come from a seed: fp32, one thread, nothing read from outside. Recorded is every figure that
a stage logs at a step, times aside, to the last bit. PPO trains policy and value model apart, in 2 epochs of 2
minibatches of 2 micro-batches, so that from the second minibatch on ratios leave 1 and clipping acts.

A difference is absolute; it is judged as a share of the largest recorded absolute value of its series, because a
figure may cross 0. On the machine of the record (same processor, same versions) the bound is 0: the same operations
in the same order give the same bits. Elsewhere it is `TOLERANCE`: another instruction set sums in another order, which
moves a figure by some 1e-7, and each of 40 steps (in PPO 160) starts from the rounding of those before, so it grows.
Four other sets of instructions were tried on the recording machine (``ATEN_CPU_CAPABILITY=default``, alone and with
``MKL_ENABLE_INSTRUCTIONS=SSE4_2``; AVX2 in torch, MKL and oneDNN; ``MKL_CBWR=COMPATIBLE``): the largest share was
1.5e-5. `ROUNDING` names the figures that are rounding and nothing else; they are judged where the bound is 0 only.

PPO samples: should a draw lie within the rounding of a boundary, one token comes out otherwise and the figures leave
the bound at once. None did on those four. Another version of torch, transformers or trl may draw other numbers from
the same seed, or compute otherwise: then the record proves nothing (`comparable`), and is made anew.
"""

import argparse
import contextlib
import csv
import io
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
import trl
from omegaconf import OmegaConf

import ppo_vs_dpo.dpo.train as dpo_train
import ppo_vs_dpo.ppo.stage.train as ppo_train
import ppo_vs_dpo.reward_model.train as reward_model_train
import ppo_vs_dpo.sft.train as sft_train
from benchmarks.measure import processor
from ppo_vs_dpo.artifacts.files import read_jsonl, write_text
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.artifacts.stage import StageContext
from tests.conftest import build_word_tokenizer
from tests.sft.tiny_run import ARCHITECTURE, context_of, make_run

RECORDED = Path(__file__).parents[1] / "tests" / "trajectories"
STEPS = 40
# Largest difference elsewhere, as a share of the largest recorded absolute value of the series.
TOLERANCE = 1e-4
# The ratio before the first step is 1, and the margin at the policy that is the reference 0: what is seen is the sign
# or the size of the last bit.
ROUNDING = ("val/first_ratio_deviation", "rewards/accuracies")

STAGES: dict[str, Callable[[StageContext], None]] = {
    "sft": sft_train.run_stage,
    "reward_model": reward_model_train.run_stage,
    "dpo": dpo_train.run_stage,
    "ppo": ppo_train.run_stage,
}
# What must have run before.
NEEDS = {"sft": [], "reward_model": ["sft"], "dpo": ["sft"], "ppo": ["sft", "reward_model"]}

# Smaller weights than the tests' own: the larger ones multiply rounding by a hundred on the way to the last step.
MODEL = {**ARCHITECTURE, "initializer_range": 0.2}
COMMON = {
    "max_steps": STEPS,
    # Adam divides by the gradient's size: with its usual 1e-8, gradients that are rounding alone make whole steps.
    "adam_epsilon": 1.0e-5,
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
}
SECTIONS = {
    # Two micro-batches a step: accumulation is part of the trajectory.
    "sft": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "reward_model": {"label_noise": 0.0},
    "dpo": {"precompute_ref_log_probs": True, "label_smoothing": 0.1, "learning_rate": 1.0e-3},
    "ppo": {
        "rollout_batch_size": 32,
        "num_ppo_epochs": 2,
        "num_mini_batches": 2,
        "per_device_train_batch_size": 8,
        "local_rollout_forward_batch_size": 16,
        "response_length": 8,
        "learning_rate": 3.0e-3,
        "value_learning_rate": 3.0e-3,
        "kl_coef": 0.1,
        "missing_eos_penalty": 1.0,
        "validation_prompts": 0,
        "diagnose": False,
    },
}
# Not figures of the training: how long it took.
TIMES = ("time/", "train_runtime", "train_samples_per_second", "train_steps_per_second")

# One list of numbers for each figure; "step" is the first.
Series = dict[str, list[float]]


def fresh(stages: list[str]) -> dict[str, Series]:
    """Train the stages, and those that they need, and return what the named ones logged."""
    torch.set_num_threads(1)
    needed = [stage for stage in STAGES if any(stage == name or stage in NEEDS[name] for name in stages)]
    trajectories = {}
    with tempfile.TemporaryDirectory() as folder:
        run = _run_folder(Path(folder) / "run")
        for stage in needed:
            started = time.perf_counter()
            with contextlib.redirect_stdout(sys.stderr):
                STAGES[stage](context_of(run, stage))
            print(f"{stage}: {STEPS} steps in {time.perf_counter() - started:.1f} s", file=sys.stderr)
            if stage in stages:
                trajectories[stage] = _logged(run.stage_dir(stage) / "metrics.jsonl")
    return trajectories


def _run_folder(folder: Path) -> RunFolder:
    """A run whose data and pairs are done, and whose stages are configured by `SECTIONS`."""
    sections = {stage: {**COMMON, **keys} for stage, keys in SECTIONS.items()}
    make_run(folder, build_word_tokenizer(), model={"path": None, "architecture": MODEL}, **sections)
    config = OmegaConf.load(folder / "config.yaml")
    config.ppo = sections["ppo"]
    OmegaConf.save(config, folder / "config.yaml")
    return RunFolder(folder)


def _logged(path: Path) -> Series:
    """The figures of ``metrics.jsonl`` at the training steps.

    Raises:
        ValueError: a step is missing, or a figure is missing or not a finite number at some step.
    """
    rows = [row for row in read_jsonl(path) if "loss" in row or "loss/policy_avg" in row]
    if [row["step"] for row in rows] != list(range(1, STEPS + 1)):
        raise ValueError(f"{path}: logged at steps {[row['step'] for row in rows]}, not at 1 to {STEPS}")
    names = ["step", *sorted(name for name in rows[0] if name != "step" and not name.startswith(TIMES))]
    for row in rows:
        wrong = [name for name in names if not isinstance(row.get(name), int | float) or not math.isfinite(row[name])]
        if wrong:
            raise ValueError(f"{path}: {wrong[0]} is {row.get(wrong[0])} at step {row['step']}")
    return {name: [float(row[name]) for row in rows] for name in names}


def machine() -> dict[str, str]:
    """What decides the last bits: architecture, processor, torch's instruction set, versions."""
    return {
        "architecture": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
    }


def comparable(recorded: dict[str, str], here: dict[str, str]) -> bool:
    """Whether the record holds here up to rounding: the same versions, on any processor."""
    return all(recorded.get(name) == here[name] for name in ("torch", "transformers", "trl"))


def write_record(path: Path, series: Series, made_on: dict[str, str]) -> None:
    """A comment for each fact about the machine, then a row for each step; Python's repr keeps every bit."""
    out = io.StringIO()
    out.writelines(f"# {name}: {value}\n" for name, value in made_on.items())
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(series)
    for row in zip(*series.values(), strict=True):
        writer.writerow([int(row[0]), *map(repr, row[1:])])
    write_text(path, out.getvalue())


def read_record(path: Path) -> tuple[Series, dict[str, str]]:
    """What `write_record` wrote: the series, and the machine."""
    lines = path.read_text(encoding="utf-8").splitlines()
    made_on = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    header, *rows = csv.reader(line for line in lines if not line.startswith("# "))
    return {name: [float(row[i]) for row in rows] for i, name in enumerate(header)}, made_on


def differences(recorded: Series, now: Series) -> dict[str, tuple[float, float]]:
    """For each recorded series ``(largest absolute difference, the same as a share of its largest absolute value)``.

    Infinite where the series is gone or has another length.
    """
    out = {}
    for name, old in recorded.items():
        new = now.get(name, [])
        if len(new) != len(old):
            out[name] = math.inf, math.inf
            continue
        largest = max(abs(a - b) for a, b in zip(old, new, strict=True))
        scale = max(map(abs, old))
        out[name] = largest, largest / scale if scale else (math.inf if largest else 0.0)
    return out


def compare(stage: str, now: Series, tolerance: float | None) -> bool:
    """Print the differences of one stage.

    Args:
        tolerance: bound on the shares; ``None``: 0 on the machine of the record, `TOLERANCE` elsewhere.

    Returns:
        Whether all are within it.
    """
    recorded, made_on = read_record(RECORDED / f"{stage}.csv")
    here = machine()
    bound = tolerance if tolerance is not None else (0.0 if made_on == here else TOLERANCE)
    print(f"{stage} ({STEPS} steps; bound {bound:g})")
    for name, value in here.items():
        before = made_on.get(name)
        print(f"  {name}: {value}" + ("" if value == before else f" (recorded: {before})"))
    if not comparable(made_on, here):
        print("  other versions may draw other numbers from the same seed: a difference proves nothing")
    good = True
    for name, (largest, share) in differences(recorded, now).items():
        judged = bound == 0 or name not in ROUNDING
        beyond = judged and share > bound
        good = good and not beyond
        remark = "  BEYOND THE BOUND" if beyond else "" if judged else "  (rounding: not judged)"
        print(f"  {name:<27} {largest:<11.5g} {share:.5g}{remark}")
    for name in now.keys() - recorded.keys():
        print(f"  {name:<27} not recorded")
    return good


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status: 1 where a difference is beyond the bound."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write the records instead of comparing with them")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES), help="these only")
    bounds = parser.add_mutually_exclusive_group()
    bounds.add_argument("--exact", action="store_true", help="the bound is 0, on any machine")
    bounds.add_argument("--tolerance", type=float, help=f"this bound, on any machine (elsewhere: {TOLERANCE:g})")
    args = parser.parse_args(argv)
    trajectories = fresh(args.stage)
    if args.record:
        for stage, series in trajectories.items():
            write_record(RECORDED / f"{stage}.csv", series, machine())
            print(f"tests/trajectories/{stage}.csv: {len(series) - 1} series of {STEPS} steps")
        return 0
    print("series, largest absolute difference, as a share of the series' largest absolute value")
    tolerance = 0.0 if args.exact else args.tolerance
    good = [compare(stage, series, tolerance) for stage, series in trajectories.items()]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
