"""Training on the pretended device: ``python -m tests.device.work [JOB ...]`` prints what it counts.

Strict: the first operation that mixes host and device ends it, as a GPU would. Everything is done as in a run:
sampling, scoring, updates, evaluation, saving, going on.
"""

import argparse
import contextlib
import gc
import json
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import TrainerCallback
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from ppo_vs_dpo.artifacts.files import write_text
from ppo_vs_dpo.models.passes import packed
from ppo_vs_dpo.models.passes.logprobs import full_kl, pad_batch, response_logprobs
from ppo_vs_dpo.models.sampling import fixed
from ppo_vs_dpo.models.sampling.generation import SamplingConfig, generate
from ppo_vs_dpo.ppo.roles.trained import PolicyAndValue
from ppo_vs_dpo.ppo.rollouts.clock import Clock
from tests.device.jobs import llama, ppo, trained
from tests.device.pretended import ALLOCATED, DEVICE, Probe, Shadow, trainers_on_device
from tests.models.passes.test_packed import reference_kernel
from tests.models.sampling.recorded_graph import RecordedGraph

torch.set_num_threads(1)
RECORD = Path(__file__).parent / "counts.json"
# The pretended device is not one that accelerate would find.
ON_HOST = {"use_cpu": True}


class StandIn(torch.autograd.Function):
    """In the place of CUDA's attention for packed rows, which this device has not: what it is documented to do.

    Carried out beside the device, so that it counts for what it is there: one kernel forward, one backward.
    """

    @staticmethod
    def forward(ctx, query, key, value, bounds, longest, options):
        ctx.longest, ctx.options = longest, options
        inner = [x.inner for x in (query, key, value, bounds)]
        out = Shadow(reference_kernel(*inner, inner[-1], longest, longest, **options))
        # What the kernel keeps, too.
        ctx.save_for_backward(query, key, value, bounds, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        *given, bounds, _ = (x.inner for x in ctx.saved_tensors)
        with torch.enable_grad():
            given = [x.detach().requires_grad_() for x in given]
            out = reference_kernel(*given, bounds, bounds, ctx.longest, ctx.longest, **ctx.options)
        return *map(Shadow, torch.autograd.grad(out, given, grad.inner)), None, None, None


def stand_in(query, key, value, bounds, bounds_k, longest, longest_k, **options):
    """`StandIn` with the kernel's arguments."""
    assert bounds is bounds_k
    return StandIn.apply(query, key, value, bounds, longest, options)


class OneLaunch:
    """In the place of a Triton kernel of TRL's head: one operation that works in place, without memory of its own."""

    def __init__(self, tile: Callable):
        self.tile = tile

    def __getitem__(self, grid: tuple) -> Callable:
        return self.launch

    def launch(self, *args, **kwargs) -> None:
        """Carried out beside the device."""
        Probe.active.launched()
        self.tile(*(x.inner if isinstance(x, Shadow) else x for x in args), **kwargs)


@contextlib.contextmanager
def half_precision_kernel():
    """With that stand-in, and those of TRL's kernels: what a GPU takes instead of torch's own operations."""
    found = packed.varlen_kernel, packed.has_flash, dict(vars(chunked_logprob)), trl_utils._use_triton
    packed.varlen_kernel, packed.has_flash = lambda: stand_in, lambda device: device.type == DEVICE.type
    forward, backward = OneLaunch(chunked_logprob._forward_tile), OneLaunch(chunked_logprob._backward_tile)
    chunked_logprob._forward_kernel, chunked_logprob._backward_kernel = forward, backward
    chunked_logprob.triton = types.SimpleNamespace(cdiv=lambda a, b: -(-a // b))
    chunked_logprob._use_triton = trl_utils._use_triton = lambda device: device.type == DEVICE.type
    try:
        yield
    finally:
        packed.varlen_kernel, packed.has_flash, theirs, trl_utils._use_triton = found
        vars(chunked_logprob).clear()
        vars(chunked_logprob).update(theirs)


def run_ppo(probe: Probe, folder: Path, **settings: Any) -> dict[str, Any]:
    """One update, evaluated, saved and gone on from, counted by phase."""
    timed = Clock.__call__

    @contextlib.contextmanager
    def phase(self, name):
        with timed(self, name), probe.part(name.rpartition("/")[2]):
            yield

    Clock.__call__ = phase
    try:
        settings |= {**ON_HOST, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
        trainer = ppo(folder, **settings)
        trainer.prepare()
        trainer.train()
        with probe.part("evaluate"):
            trainer.evaluate()
        left = [name for name, p in trainer.model.named_parameters() if p.device != DEVICE]
        assert not left, left
        again = ppo(folder, **settings)
        again.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-1"))
        steps = [value["step"] for value in again.optimizer.state.values()]
        assert {step.device.type for step in steps} <= {"cpu", DEVICE.type}
    finally:
        Clock.__call__ = timed
    counted = {name: probe.parts[name] for name in ("generate", "score", "forward", "train", "evaluate")}
    # Two updates and one that was gone on with, of four micro-batches each.
    return {**figures(counted), "train, a micro-batch": per(counted["train"], 12)}


def run_trl(probe: Probe, folder: Path, stage: str, plain: bool = False) -> dict[str, Any]:
    """The second of two steps of a stage; ``plain``: with TRL's trainer as it is."""
    trainer = trained(folder, stage, plain, **ON_HOST)

    class FromSecond(TrainerCallback):
        """Counts the second step: the first makes the optimizer's state."""

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                self.part = probe.part("train")
                self.part.__enter__()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                self.part.__exit__(None, None, None)

    trainer.add_callback(FromSecond())
    trainer.train()
    return figures({"train": probe.parts["train"]})


class Launched(RecordedGraph):
    """A step of decoding as a CUDA graph: one launch. Its capture neither waits nor brings anything to the device."""

    def __init__(self, step: Callable[[], None]):
        before = self._moved()
        super().__init__(step)
        assert self._moved() == before

    @staticmethod
    def _moved() -> list[int]:
        counts = Probe.active.parts["all"]
        return [sum(moved.values()) for moved in (counts.waits, counts.uploads)]

    def __call__(self) -> None:
        Probe.active.launched()
        super().__call__()


def decode(probe: Probe, folder: Path, graphs: bool | None = None) -> dict[str, Any]:
    """Waits and operations a decoded token, by layers; rows end all the time."""
    found: dict[str, Any] = {}
    prompts = [[5, 6, 7, 8][: 1 + n % 4] for n in range(16)]
    for layers in (2, 8):
        model = llama(layers=layers, vocabulary=64, seed=3).to(DEVICE)
        seen = []
        # A model is looked at once.
        generate(model, prompts, SamplingConfig(12, cuda_graphs=graphs), eos_token_ids=[2], seeds=range(16))
        for tokens in (17, 33):
            with probe.part(f"{layers} layers, {tokens} tokens") as counts:
                sampling = SamplingConfig(tokens, cuda_graphs=graphs)
                drawn = generate(model, prompts, sampling, eos_token_ids=[2], seeds=range(16))
            assert len({len(one.token_ids) for one in drawn}) > 4
            assert max(len(one.token_ids) for one in drawn) == tokens
            seen.append(counts)
        more = [sum(c.waits.values()) for c in seen], [c.operations for c in seen]
        waits, operations = ((after - before) / 16 for before, after in more)
        found[f"{layers} layers, a token"] = {"waits": waits, "operations": operations}
    return found


def decode_as_a_graph(probe: Probe, folder: Path) -> dict[str, Any]:
    """`decode`, a step captured and repeated."""
    fixed.GRAPHS[DEVICE.type] = Launched
    try:
        return decode(probe, folder, graphs=True)
    finally:
        del fixed.GRAPHS[DEVICE.type]


def head(probe: Probe, folder: Path) -> dict[str, Any]:
    """Rows of logits at once, and how the peak grows with the response tokens, at a vocabulary of 8,192."""
    model, other = (llama(layers=1, vocabulary=8192, seed=s).to(torch.bfloat16).to(DEVICE) for s in (0, 1))
    found: dict[str, Any] = {}
    for what in ("train", "score", "exact kl"):
        peaks, tokens = [], []
        for rows in (12, 24):
            batch = pad_batch([[5, 6, 7]] * rows, [[7] * 230] * rows, 0, DEVICE)
            tokens.append(230 * rows)
            gc.collect()
            held = ALLOCATED.bytes
            with probe.part(f"{what}, {rows}") as counts, torch.set_grad_enabled(what == "train"):
                if what == "exact kl":
                    full_kl(model, other, batch)
                else:
                    total = response_logprobs(model, batch)[0].sum()
                    if what == "train":
                        total.backward()
                    del total
            model.zero_grad(set_to_none=True)
            peaks.append(counts.peak - held)
        assert tokens[0] > 2048
        growth = (peaks[1] - peaks[0]) / (tokens[1] - tokens[0]) / 8192
        found[what] = {"rows of logits": counts.largest[0] / 8192 / 4, "bytes a token and entry": growth}
    return found


def checkpointing(probe: Probe, folder: Path) -> dict[str, Any]:
    """Bytes kept for the backward pass of policy and value model, with and without checkpointing."""
    kept = {}
    batch = pad_batch([[5] * n for n in (20, 25, 30, 22)], [[7] * n for n in (6, 9, 4, 8)], 0, DEVICE)
    for switched in (False, True):
        model = PolicyAndValue(llama(layers=10), llama(True, layers=10)).train().to(DEVICE)
        if switched:
            model.gradient_checkpointing_enable()
        gc.collect()
        before = ALLOCATED.bytes
        out = model(batch, 1.0)
        kept["with" if switched else "without"] = ALLOCATED.bytes - before
        (out["logprobs"].sum() + out["values"].sum()).backward()
        del out, model
    return kept


def figures(parts: dict[str, Any]) -> dict[str, Any]:
    """Counts as numbers."""
    return {
        name: {"waits": sum(c.waits.values()), "uploads": sum(c.uploads.values()), "operations": c.operations,
               "largest": c.largest[0], "peak": c.peak, "products": dict(sorted(c.products.items()))}
        for name, c in parts.items()
    }  # fmt: skip


def per(counts: Any, number: int) -> dict[str, float]:
    """Of one of ``number``."""
    return {"waits": sum(counts.waits.values()) / number, "operations": counts.operations / number}


JOBS: dict[str, Callable[[Probe, Path], dict[str, Any]]] = {
    "ppo": run_ppo,
    "ppo bf16": lambda probe, folder: run_ppo(probe, folder, bf16=True),
    "ppo lora": lambda probe, folder: run_ppo(probe, folder, kind="lora", gradient_checkpointing=True),
    "ppo one base": lambda probe, folder: run_ppo(probe, folder, kind="one base"),
    "ppo engine": lambda probe, folder: run_ppo(probe, folder, kind="engine", score_bias="auto"),
    "sft": lambda probe, folder: run_trl(probe, folder, "sft"),
    "reward_model": lambda probe, folder: run_trl(probe, folder, "reward_model"),
    "dpo": lambda probe, folder: run_trl(probe, folder, "dpo"),
    "trl sft": lambda probe, folder: run_trl(probe, folder, "sft", plain=True),
    "trl reward_model": lambda probe, folder: run_trl(probe, folder, "reward_model", plain=True),
    "trl dpo": lambda probe, folder: run_trl(probe, folder, "dpo", plain=True),
    "decode": decode,
    "decode as a graph": decode_as_a_graph,
    "head": head,
    "checkpointing": checkpointing,
}


def main() -> None:
    """Run jobs and print their counts as JSON; with ``--lines`` also where the host waits and copies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jobs", nargs="*", default=list(JOBS))
    parser.add_argument("--lines", action="store_true")
    parser.add_argument("--record", action="store_true", help="write tests/device/counts.json and docs/gpu.md's table")
    given = parser.parse_args()
    found = {}
    for job in given.jobs or JOBS:
        started = time.monotonic()
        gc.collect()
        with tempfile.TemporaryDirectory() as folder, Probe() as probe, trainers_on_device(), half_precision_kernel():
            found[job] = JOBS[job](probe, Path(folder))
        sys.stderr.write(f"{job}: {time.monotonic() - started:.1f} s\n")
        if given.lines:
            for name, counts in probe.parts.items():
                sys.stderr.write(f"[{job}: {name}] largest {counts.largest}\n")
                for kind, lines in (("waits", counts.waits), ("uploads", counts.uploads)):
                    for where, times in lines.most_common(25):
                        sys.stderr.write(f"  {times:5} {kind} {where}\n")
    if given.record:
        record(found)
    sys.stdout.write(f"\nCOUNTS {json.dumps(found)}\n")


def record(found: dict[str, Any]) -> None:
    """Keep counts, and write the table of docs/gpu.md."""
    kept = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    write_text(RECORD, json.dumps({**kept, **found}, indent=1) + "\n")
    write_table({**kept, **found})


def write_table(counts: dict[str, Any]) -> None:
    """The table of docs/gpu.md."""
    head = ["one step of", "host waits", "operations", "largest tensor, kB", "peak, kB"]
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head))]
    for name, stage in (("SFT", "sft"), ("reward model", "reward_model"), ("DPO", "dpo")):
        for whose, job in (("ours", stage), ("TRL 1.16", f"trl {stage}")):
            one = counts[job]["train"]
            cells = [f"{one[key] / 1000:,.0f}" for key in ("largest", "peak")]
            lines.append(f"| {name}, {whose} | {one['waits']} | {one['operations']:,} | {' | '.join(cells)} |")
    micro, one = counts["ppo bf16"]["train, a micro-batch"], counts["ppo bf16"]["train"]
    cells = [f"{one[key] / 1000:,.0f}" for key in ("largest", "peak")]
    lines.append(f"| PPO, a micro-batch | {micro['waits']:g} | {micro['operations']:,.0f} | {' | '.join(cells)} |")
    for whose, side in (("ours", "ours"), ("TRL 1.12", "trl")):
        one = counts[f"ppo update, {side}"]
        cells = [f"{one[key] / 1000:,.0f}" for key in ("largest", "peak")]
        lines.append(f"| PPO, an update, {whose} | {one['waits']:,} | {one['operations']:,} | {' | '.join(cells)} |")
    for how, job in (("", "decode"), (", as a CUDA graph", "decode as a graph")):
        for layers in (2, 8):
            one = counts[job][f"{layers} layers, a token"]
            cells = [f"{one['waits']:.3g}", f"{one['operations']:,.0f}"]
            lines.append(f"| a decoded token, {layers} layers{how} | {' | '.join(cells)} | | |")
    page, begin, end = RECORD.parents[2] / "docs" / "gpu.md", "<!-- counts: begin -->", "<!-- counts: end -->"
    if page.is_file():
        before, _, rest = page.read_text(encoding="utf-8").partition(begin)
        table = "\n".join(lines)
        write_text(page, f"{before}{begin}\n\n{table}\n\n{end}{rest.partition(end)[2]}")


if __name__ == "__main__":
    main()
