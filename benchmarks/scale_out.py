"""PPO on 1, 2 and 4 processes under no sharding, ZeRO-2 and ZeRO-3: tokens/s, and what each rank holds.

    python -m benchmarks.scale_out [--rounds 2] [--ranks 1 2 4]

The same update everywhere: 32 responses of the `real` workload of `benchmarks.ppo_vs_trl`, 8 rows a pass, 4 epochs,
one thread a process. On a CPU with fewer cores than ranks the seconds say what sharding costs, not what it gains.
Beside the bytes that a rank holds stands what `ppo-vs-dpo plan` says it will hold.
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import floor, measure
from benchmarks.ppo_vs_trl import SHAPE, WORKLOADS, models, planned_lengths, planned_uniforms, prompt_ids, settings

WORKLOAD = WORKLOADS["real"]
ROWS = 8
ROLES = {"policy": True, "value": True, "reference": False, "reward": False}


def worker(deepspeed: str, rounds: int, out: Path) -> None:
    """One rank: train, then write down seconds and bytes."""
    from datasets import Dataset
    from omegaconf import OmegaConf
    from transformers import TrainerCallback

    from ppo_vs_dpo.models.sampling import generation
    from ppo_vs_dpo.models.sharding.deepspeed import start_deepspeed
    from ppo_vs_dpo.pipeline.planning.memory import Sharding, held
    from ppo_vs_dpo.ppo.config import PPOConfig
    from ppo_vs_dpo.ppo.trainer import PPOTrainer

    torch.set_num_threads(1)
    start_deepspeed(use_cpu=True)
    ranks = int(os.environ["WORLD_SIZE"])
    generation._uniforms = planned_uniforms(WORKLOAD, rounds + 1, generation._uniforms)
    policy, reference, reward, value, tokenizer = models(WORKLOAD)
    sizes = {role: sum(p.numel() for p in model.parameters())
             for role, model in zip(ROLES, (policy, value, reference, reward), strict=True)}  # fmt: skip
    ends: list[float] = []

    class Ends(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            ends.append(time.monotonic())

        on_step_end = on_train_begin

    given = settings(WORKLOAD, rounds + 1)
    given |= {"per_device_train_batch_size": ROWS, "gradient_accumulation_steps": WORKLOAD.rows // ROWS // ranks,
              "local_rollout_forward_batch_size": ROWS}  # fmt: skip
    if deepspeed != "none":
        path = measure.ROOT / "configs" / "deepspeed" / f"{deepspeed}.yaml"
        given["deepspeed"] = OmegaConf.to_container(OmegaConf.load(path))
        if deepspeed == "zero3":
            # Small layers are split like large ones.
            given["deepspeed"]["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=PPOConfig(output_dir=folder, missing_eos="subtract", logprobs_from_sampling=True, **given),
            processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward, value_model=value,
            train_dataset=Dataset.from_dict({"input_ids": prompt_ids(WORKLOAD)}), callbacks=[Ends()],
        )  # fmt: skip
        trainer.train()
        has = trainer.roles.held_bytes()
    sharding = Sharding(ranks=ranks, half=False, stage=int(deepspeed[4]) if deepspeed != "none" else None)
    parts = [held(role, sizes[role], trained * sizes[role], sharding) for role, trained in ROLES.items()]
    figures = {
        "seconds": [after - before for before, after in itertools.pairwise(ends[1:])],
        "weights": sum(has[role] for role in ROLES), "planned": sum(part.weights for part in parts),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }  # fmt: skip
    (out / f"{os.environ['RANK']}.json").write_text(json.dumps(figures))


def launch(deepspeed: str, ranks: int, rounds: int) -> list[dict]:
    """A job of ``ranks`` processes; what each wrote."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
            "-m", "benchmarks.scale_out", "--worker", deepspeed, "--rounds", str(rounds), "--out", folder,
        ]  # fmt: skip
        done = subprocess.run(command, cwd=measure.ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{deepspeed} on {ranks} ranks failed:\n{done.stderr[-3000:]}")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2, help="timed updates (default: %(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--worker", choices=("none", "zero2", "zero3"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return worker(given.worker, given.rounds, given.out)
    print(measure.machine(), flush=True)
    prompts = sum(map(len, prompt_ids(WORKLOAD))) / 4
    responses = [min(length, WORKLOAD.budget) for length in planned_lengths(WORKLOAD, 1)]
    tokens = prompts + sum(responses)
    mean = round(prompts / WORKLOAD.rows)
    needed = floor.update(SHAPE, [mean] * WORKLOAD.rows, responses, WORKLOAD.epochs)
    least = sum(needed[phase] for phase in ("generate", "score", "train")) / measure.matmul_rate()
    rows = []
    for deepspeed in ("none", "zero2", "zero3"):
        for ranks in given.ranks:
            if deepspeed == "none" or ranks > 1:
                all_ranks = launch(deepspeed, ranks, given.rounds)
                seconds = measure.statistics.median(all_ranks[0]["seconds"])
                # Ranks beyond the cores bring no arithmetic.
                cores = min(ranks, len(os.sched_getaffinity(0)))
                rows.append([
                    deepspeed, str(ranks), f"{seconds:.1f}", f"{tokens / seconds:.0f}",
                    f"{100 * least / cores / seconds:.0f} %",
                    f"{max(one['weights'] for one in all_ranks) / 1e6:.1f}",
                    f"{max(one['planned'] for one in all_ranks) / 1e6:.1f}",
                    f"{max(one['peak'] for one in all_ranks) / 2**20:.0f}",
                ])  # fmt: skip
                print(f"  {deepspeed}, {ranks}: {seconds:.1f} s", file=sys.stderr, flush=True)
    head = "sharding, ranks, s/update, tokens/s, share of floor, MB of weights a rank, as planned, peak MiB a rank"
    print(measure.table(head.split(", "), rows))


if __name__ == "__main__":
    main()
