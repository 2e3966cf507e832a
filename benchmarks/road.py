"""From preference pairs to a verdict: our stages beside the same road made of stock parts, CPU seconds and memory.

    python -m benchmarks.road [key=value ...]           # the testbed, a sixth of the quickstart
    python -m benchmarks.road --size quickstart         # or 6m: a model of six million parameters
    python -m benchmarks.road --size hh model.path=SMOLLM2 data.path=harmless_base.jsonl.gz
    python -m benchmarks.road --stages dpo ppo FOLDER   # only these; what FOLDER has of the others is kept

Stock is what one would write with the libraries alone: TRL's SFTTrainer, RewardTrainer and DPOTrainer as they are,
the PPOTrainer of TRL 1.12 (its last; installed into a folder of its own), transformers' ``generate`` for completions,
a plain loop over batches for scores, KL and win rates. Both sides start from the same first weights and read the same
files with the same settings of the run's ``config.yaml``: examples, pairs, epochs, updates, prompts, draws, learning
rates, batch sizes; what the run leaves to our defaults, TRL's PPO is given, too. Nobody clips PPO's gradients, since
TRL's has no such thing, and TRL's is made to take every optimizer step that it is asked for (as it is, minibatches
beyond the first of a batch are accumulated). Ours are the stages of the command (``python -m ppo_vs_dpo.STAGE RUN``).

Each stage of each side is a process of one thread, from its start to its end (imports, loading and saving included),
stock first, then ours, in one run. Seconds are CPU seconds (user and system) of the process and all that it started:
what else the machine does hardly matters; a ratio is stock's over ours. What is sampled has its own length on each
side: the mean is printed, to see that both did the same work. Our ``compare`` also makes intervals, tests, the report,
and asks the models more than such a loop does; a second row has a loop that asks them as much.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import measure
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.pipeline.running.profile import profile

# With two draws a prompt for the reference as for its control: a sixth of the quickstart; the whole; six million
# parameters; a chat model on dialogues, all weights trained.
SIZES = {
    "small": [
        "data.sft_examples=1600", "data.pairs=1024", "data.test_pairs=128", "data.train_prompts=1600",
        "data.heldout_prompts=256", "sft.num_train_epochs=2", "ppo.max_steps=6", "compare.n_prompts=128",
    ],
    "quickstart": [],
    "6m": [
        "data.sft_examples=1600", "data.pairs=512", "data.test_pairs=128", "data.train_prompts=1600",
        "data.heldout_prompts=256", "sft.num_train_epochs=1", "reward_model.num_train_epochs=2",
        "reward_model.samples=128", "ppo.max_steps=4", "compare.n_prompts=64",
        "model.architecture.hidden_size=256", "model.architecture.intermediate_size=1024",
        "model.architecture.num_hidden_layers=6",
        *(f"{stage}.learning_rate=3e-4" for stage in ("sft", "reward_model", "dpo", "ppo")),
        "ppo.value_learning_rate=3e-4",
    ],
    "hh": [
        "experiment=hh", "model.dtype=float32", "data.max_pairs=400", "data.heldout_fraction=0.2",
        "data.max_prompt_tokens=96", "data.max_response_tokens=48", "sft.skip_training=false",
        *(f"{stage}.lora=null" for stage in ("sft", "reward_model", "dpo", "ppo")),
        *(f"{stage}.gradient_accumulation_steps=2" for stage in ("sft", "reward_model", "dpo")),
        *(f"{stage}.learning_rate=1e-5" for stage in ("sft", "reward_model", "dpo")),
        *(f"{stage}.max_steps=8" for stage in ("sft", "reward_model", "dpo")),
        "ppo.learning_rate=3e-6", "ppo.value_learning_rate=3e-6", "ppo.max_steps=2", "ppo.rollout_batch_size=16",
        "ppo.per_device_train_batch_size=8", "ppo.num_ppo_epochs=4", "ppo.response_length=24",
        "reward_model.samples=16", "reward_model.sample_max_new_tokens=24", "reward_model.test_pairs=32",
        "dpo.test_pairs=16", "compare.n_prompts=24", "compare.max_new_tokens=24",
    ],
}  # fmt: skip
# The same on both sides: no checkpoints on the way, no trackers, one extra draw of the reference, no clipping in PPO.
SAME = [
    "ppo.max_grad_norm=0",
    *(f"{stage}.{key}" for stage in ("sft", "reward_model", "dpo", "ppo")
      for key in ("save_strategy=no", "report_to=none")),
    "dpo.sweep=null", "ppo.sweep=null", "ppo.eval_strategy=no", "ppo.validation_prompts=0",
    "ppo.load_best_model_at_end=false", "launch.workers=1", "compare.baseline_draws=2", "compare.pool_size=0",
    "compare.best_of_n=[]", "compare.best_of={}", "compare.checkpoints={}",
]  # fmt: skip
STAGES = ("sft", "reward_model", "dpo", "ppo", "compare")
# Stock's CPU seconds over ours, of the whole road: on the testbed, and with a chat model on dialogues.
BAR, BAR_OF_HH = 3.0, 2.0


def measured(command: list[str], path: list[str], log: Path) -> dict[str, float]:
    """Run a process to its end: its CPU seconds, wall seconds and peak memory in MiB, its descendants' included.

    Raises:
        SystemExit: it failed; with its last words.
    """
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    started = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=tempfile.gettempdir(),
        )
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return {
        "seconds": used.ru_utime + used.ru_stime,
        "wall": time.perf_counter() - started,
        "peak": used.ru_maxrss / 1024,
    }


def ours_of(run: Path, stage: str) -> dict[str, float]:
    """What our stage did, in the words of stock's figures."""
    done = json.loads((run / stage / "done.json").read_text())
    figures, cost = done["figures"], done["cost"]
    if stage == "ppo":
        rows = [json.loads(line) for line in (run / "ppo" / "metrics.jsonl").read_text().splitlines()]
        return {
            "responses": figures["episodes"],
            "tokens": cost["tokens_generated"] / figures["episodes"],
            "kl of the last rollout": [row["objective/kl"] for row in rows if "objective/kl" in row][-1],
        }
    if stage == "compare":
        report = json.loads((run / "compare" / "report.json").read_text())
        wins = {(row["policy"], row["versus"], row["judge"]): row["win_rate"] for row in report["win_rates"]}
        judge = max((judge for _, _, judge in wins), key=lambda name: name == "gold")
        made = report["cost"]["generation"]
        prompts = figures["n_prompts"]
        count = prompts * (report["settings"]["baseline_draws"] + 2)
        return {
            **{f"kl {name}": report["policies"][name]["kl"]["mean"] for name in ("ppo", "dpo")},
            **{f"win {name}": wins[name, "sft", judge] for name in ("ppo", "dpo")},
            "responses": count,
            "tokens": sum(one["tokens"] for one in made.values()) / count,
        }
    return {key: figures[key] for key in ("steps", "train_loss", "accuracy") if key in figures}


def begin_anew(run: RunFolder, stage: str) -> None:
    """Take away what an earlier measurement left of a stage: ours would find it, and read what it should make."""
    kept = {
        "reward_model": run.path("pairs", "tokens"), "dpo": run.path("pairs", "reference_logprobs"),
        "compare": run.cache("completions"),
    }  # fmt: skip
    for folder in (run.stage_dir(stage), *([kept[stage]] if stage in kept else [])):
        shutil.rmtree(folder, ignore_errors=True)


def travel(out: Path, words: list[str], stages: list[str], trl: str) -> dict[str, dict[str, dict[str, float]]]:
    """Both sides, stage by stage; what was measured before and is not asked for again is kept."""
    run, place = out / "ours" / "road", out / "road.json"
    known = json.loads(place.read_text()) if place.is_file() else {}
    root = [str(measure.ROOT)]
    if not (run / "data" / "done.json").is_file():
        words = [*words, f"output_dir={out / 'ours'}", "name=road", "stages=[data]"]
        out.mkdir(parents=True, exist_ok=True)
        measured(["-m", "ppo_vs_dpo.pipeline.cli", *words], root, out / "data.log")
        measured(["-m", "benchmarks.stock", "init", str(out)], root, out / "init.log")
    for stage in stages:
        if stage != "sft" and not (run / "pairs" / "done.json").is_file():
            measured(["-m", "ppo_vs_dpo.preferences", str(run), "--step", "pairs"], root, out / "pairs.log")
        path = [trl, *root] if stage == "ppo" else root
        begin_anew(RunFolder(run), stage)
        stock = measured(["-m", "benchmarks.stock", stage, str(out)], path, out / f"stock-{stage}.log")
        ours = measured(["-m", f"ppo_vs_dpo.{stage}", str(run)], root, out / f"ours-{stage}.log")
        known[stage] = {
            "stock": {**stock, **json.loads((out / f"stock-{stage}.json").read_text())},
            "ours": {**ours, **ours_of(run, stage)},
        }
        place.write_text(json.dumps(known, indent=1))
        if stage == "compare":
            more = measured(["-m", "benchmarks.stock", "compare_more", str(out)], root, out / "stock-compare_more.log")
            known[stage]["more"] = {**more, **json.loads((out / "stock-compare_more.json").read_text())}
        place.write_text(json.dumps(known, indent=1))
        print(f"  {stage}: stock {stock['seconds']:.1f} s, ours {ours['seconds']:.1f} s", file=sys.stderr, flush=True)
    return known


def _row(name: str, theirs: dict[str, float], mine: dict[str, float]) -> list[str]:
    length = [f"{one['tokens']:.1f}" if "tokens" in one else "" for one in (theirs, mine)]
    return [
        name, f"{theirs['seconds']:.1f}", f"{mine['seconds']:.1f}", f"{theirs['seconds'] / mine['seconds']:.2f}",
        f"{theirs['peak']:.0f}", f"{mine['peak']:.0f}", " / ".join(length).strip(" /"),
    ]  # fmt: skip


def report(known: dict[str, dict[str, dict[str, float]]], bar: float) -> str:
    """The table: a row a stage, the sum, and the bars."""
    rows, last, sums = [], [], {"stock": 0.0, "ours": 0.0}
    for stage, sides in known.items():
        rows.append(_row(stage, sides["stock"], sides["ours"]))
        last += [_row("compare, as many passes", sides["more"], sides["ours"])] if "more" in sides else []
        for side in sums:
            sums[side] += sides[side]["seconds"]
    ratio = sums["stock"] / sums["ours"]
    rows.append(["together", f"{sums['stock']:.1f}", f"{sums['ours']:.1f}", f"{ratio:.2f}", "", "", ""])
    rows += last
    head = "stage, stock CPU s, ours CPU s, ratio, stock peak MiB, ours peak MiB, mean tokens"
    slower = [stage for stage, one in known.items() if one["stock"]["seconds"] < one["ours"]["seconds"]]
    return "\n".join([
        measure.table(head.split(", "), rows), "", measure.bar("the road, stock's CPU seconds over ours", ratio, bar),
        f"slower than stock: {', '.join(slower) or 'no stage'}",
        *(f"- {stage}, {side}: {', '.join(f'{key} {value:.3g}' for key, value in one.items())}"
          for stage, sides in known.items() for side, one in sides.items()),
    ])  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="key=value of the run; a folder to keep what is measured in")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--trl", help="folder with trl==1.12.0 installed")
    parser.add_argument("--size", choices=SIZES, default="small")
    arguments = parser.parse_args()
    folders = [word for word in arguments.words if "=" not in word]
    overrides = [word for word in arguments.words if "=" in word]
    words = ["experiment=quickstart", *SIZES[arguments.size], *SAME, *overrides]
    words = words[1:] if arguments.size == "hh" else words
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(folders[0] if folders else temporary).resolve()
        trl = arguments.trl
        if trl is None and "ppo" in arguments.stages:
            trl = measure.install_trl("1.12.0", str(Path(temporary) / "site"))
        known = travel(out, words, arguments.stages, trl or "")
        print(measure.machine())
        print(
            report(
                {stage: known[stage] for stage in STAGES if stage in known},
                BAR_OF_HH if arguments.size == "hh" else BAR,
            )
        )
        print(f"\nWhere ours went. {profile(RunFolder(out / 'ours' / 'road'), [*STAGES])}")
    return None


if __name__ == "__main__":
    main()
