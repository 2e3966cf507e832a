"""What one PPO update of ours consists of: matrix products, attention, element-wise work, copies, views, Python.

    python -m benchmarks.update_profile                  # the workload `real` of benchmarks.ppo_vs_trl
    python -m benchmarks.update_profile --only fixed

The first update warms up, the second is timed alone, the third under ``torch.profiler``; one thread. An operation's
time is its own, without that of the operations which it calls. The profiler takes wall-clock time, so shares are of
the profiled update's, and a busy machine stretches all kinds alike. Python is the rest: the interpreter, the trainer,
and what the profiler itself costs, which the two updates' CPU seconds show.
"""

import argparse
import contextlib
import sys
import tempfile
import time

import torch

from benchmarks import measure
from benchmarks.ppo_vs_trl import WORKLOADS, our_trainer

# Kind -> how the names of its operations begin, without "aten::"; the first that fits.
KINDS = {
    "attention": ("_scaled_dot_product", "scaled_dot_product", "_flash_attention"),
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "mkldnn", "einsum", "dot", "mv", "addmv"),
    "copies": (
        "copy_", "_to_copy", "to", "clone", "contiguous", "cat", "stack", "index", "gather", "scatter", "embedding",
        "masked", "fill_", "zero", "repeat", "take", "sort", "nonzero", "constant_pad", "new_", "full", "ones",
    ),
    "views and allocation": (
        "view", "_unsafe_view", "reshape", "_reshape", "transpose", "t", "permute", "expand", "slice", "select",
        "as_strided", "unsqueeze", "squeeze", "empty", "detach", "alias", "split", "narrow", "unbind", "resize",
        "set_", "item", "_local_scalar", "lift", "chunk",
    ),
    "optimizer and norms of gradients": ("_fused_adam", "_foreach", "linalg_vector_norm", "norm"),
}  # fmt: skip


def kind_of(name: str) -> str:
    """The kind of an operation by its name; what no kind names computes element by element."""
    plain = name.removeprefix("aten::")
    for kind, starts in KINDS.items():
        if any(plain == start or (len(start) > 2 and plain.startswith(start)) for start in starts):
            return kind
    return "element-wise work and reductions"


def table(profiler: torch.profiler.profile, seconds: float) -> list[list[str]]:
    """Seconds, share of the update, number of calls and the longest operations of each kind, the longest first."""
    kinds: dict[str, list[tuple[float, int, str]]] = {}
    for event in profiler.key_averages():
        if event.key.startswith("aten::") or event.key.startswith("mkldnn"):
            own = event.self_cpu_time_total / 1e6
            kinds.setdefault(kind_of(event.key), []).append((own, event.count, event.key.removeprefix("aten::")))
    sums = {kind: (sum(one[0] for one in found), sum(one[1] for one in found)) for kind, found in kinds.items()}
    rows = []
    for kind in sorted(sums, key=lambda kind: -sums[kind][0]):
        spent, calls = sums[kind]
        longest = ", ".join(f"{name} {own:.2f}" for own, _, name in sorted(kinds[kind], reverse=True)[:4])
        rows.append([kind, f"{spent:.2f}", f"{100 * spent / seconds:.0f} %", f"{calls:,}", longest])
    rest = seconds - sum(spent for spent, _ in sums.values())
    rows.append(["Python, autograd and the profiler", f"{rest:.2f}", f"{100 * rest / seconds:.0f} %", "", ""])
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(WORKLOADS), default="real", help="the workload")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = our_trainer(WORKLOADS[arguments.only], 3, folder, False, [])
        trainer.prepare()
        trainer.loop.score_bias = 0.0
        seconds = {}
        for number, name in enumerate(("warm-up", "alone", "profiled")):
            watching = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
            with watching if name == "profiled" else contextlib.nullcontext():
                began, started = time.perf_counter(), time.process_time()
                rollout = trainer.collect(number)
                collected = time.process_time()
                trainer.update(rollout, number)
                seconds[name] = (collected - started, time.process_time() - collected)
                wall = time.perf_counter() - began
    print(measure.machine())
    alone, profiled = (sum(seconds[name]) for name in ("alone", "profiled"))
    print(f"\n### One update of `{arguments.only}`: {alone:.2f} CPU s ({seconds['alone'][0]:.2f} for the rollout, "
          f"{seconds['alone'][1]:.2f} for the training passes), {profiled:.2f} under the profiler\n")  # fmt: skip
    print(measure.table(["kind", "seconds", "share", "calls", "longest"], table(watching, wall)))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
