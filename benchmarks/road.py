"""From preference pairs to a verdict: our stages beside the same road made of stock parts, CPU seconds and memory.

    python -m benchmarks.road [key=value ...]           # the testbed, a sixth of the quickstart
    python -m benchmarks.road --stages dpo ppo FOLDER   # only these; what FOLDER has of the others is kept

Stock is what one would write with the libraries alone: TRL's SFTTrainer, RewardTrainer and DPOTrainer as they are,
the PPOTrainer of TRL 1.12 (its last; installed into a folder of its own), transformers' ``generate`` for completions,
a plain loop over batches for scores, KL and win rates. Both sides start from the same first weights and read the same
files with the same settings of the run's ``config.yaml``: examples, pairs, epochs, updates, prompts, draws, learning
rates, batch sizes. Ours are the stages of the command (``python -m ppo_vs_dpo.STAGE RUN``).

Each stage of each side is a process of one thread, from its start to its end (imports, loading and saving included),
stock first, then ours, in one run. Seconds are CPU seconds (user and system) of the process and all that it started:
what else the machine does hardly matters; a ratio is stock's over ours. What is sampled has its own length on each
side: the mean is printed, to see that both did the same work. Our ``compare`` also makes intervals, tests, the report.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import measure
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.pipeline.running.profile import profile

# A sixth of the quickstart, with two draws a prompt for the reference as for its control.
SMALL = [
    "data.sft_examples=1600", "data.pairs=1024", "data.test_pairs=128", "data.train_prompts=1600",
    "data.heldout_prompts=256", "sft.num_train_epochs=2", "ppo.max_steps=6", "compare.n_prompts=128",
]  # fmt: skip
# The same on both sides: no checkpoints on the way, no trackers, one extra draw of the reference.
SAME = [
    *(f"{stage}.{key}" for stage in ("sft", "reward_model", "dpo", "ppo")
      for key in ("save_strategy=no", "report_to=none")),
    "dpo.sweep=null", "ppo.sweep=null", "ppo.eval_strategy=no", "ppo.validation_prompts=0",
    "ppo.load_best_model_at_end=false", "launch.workers=1", "compare.baseline_draws=2", "compare.pool_size=0",
    "compare.best_of_n=[]", "compare.best_of={}", "compare.checkpoints={}",
]  # fmt: skip
STAGES = ("sft", "reward_model", "dpo", "ppo", "compare")
# Stock's CPU seconds over ours, of the whole road on the testbed.
BAR = 3.0
# Of a batch in stock's loops.
ROWS = 64


def section(run: Path, stage: str, cls: type) -> dict[str, Any]:
    """The settings of a stage that are fields of a library's argument class, and what a CPU needs."""
    import dataclasses

    from omegaconf import OmegaConf

    settings = OmegaConf.to_container(OmegaConf.load(run / "config.yaml")[stage], resolve=True)
    known = {field.name for field in dataclasses.fields(cls)}
    passed = {key: value for key, value in settings.items() if key in known and value is not None}
    return {**passed, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "seed": 1}


def rows_of(run: Path, table: str, *columns: str):
    """A table of the run, as a data set in memory."""
    from datasets import Dataset

    return Dataset.from_parquet(str(run / f"{table}.parquet"), columns=list(columns), keep_in_memory=True)


def stock_sft(run: Path, out: Path) -> dict[str, float]:
    """TRL's SFTTrainer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(out / "init"),
        args=SFTConfig(str(out / "sft"), **section(run, "sft", SFTConfig)),
        train_dataset=rows_of(run, "data/sft_train", "prompt", "completion"),
        processing_class=AutoTokenizer.from_pretrained(out / "init"),
    )
    return trained(trainer)


def stock_reward_model(run: Path, out: Path) -> dict[str, float]:
    """TRL's RewardTrainer, then scores of the test pairs: its accuracy."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    tokenizer = AutoTokenizer.from_pretrained(out / "sft")
    model = AutoModelForSequenceClassification.from_pretrained(out / "sft", num_labels=1)
    torch.nn.init.zeros_(model.score.weight)
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(str(out / "reward_model"), **section(run, "reward_model", RewardConfig)),
        train_dataset=rows_of(run, "pairs/train", "prompt", "chosen", "rejected"),
        processing_class=tokenizer,
    )
    figures = trained(trainer)
    test = rows_of(run, "pairs/test", "prompt", "chosen", "rejected")
    sides = [
        scores_of(model, tokenizer, [row["prompt"] + row[side] for row in test], [True] * len(test))
        for side in ("chosen", "rejected")
    ]
    return {**figures, "accuracy": sum(a > b for a, b in zip(*sides, strict=True)) / len(test)}


def stock_dpo(run: Path, out: Path) -> dict[str, float]:
    """TRL's DPOTrainer, with a reference model beside the policy."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    settings = {**section(run, "dpo", DPOConfig), "precompute_ref_log_probs": False}
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(out / "sft"),
        ref_model=AutoModelForCausalLM.from_pretrained(out / "sft"),
        args=DPOConfig(str(out / "dpo"), **settings),
        train_dataset=rows_of(run, "pairs/train", "prompt", "chosen", "rejected"),
        processing_class=AutoTokenizer.from_pretrained(out / "sft"),
    )
    return trained(trainer)


def stock_ppo(run: Path, out: Path) -> dict[str, float]:
    """The PPOTrainer of TRL 1.12."""
    from omegaconf import OmegaConf
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    ours = OmegaConf.load(run / "config.yaml").ppo
    tokenizer = AutoTokenizer.from_pretrained(out / "sft", padding_side="left")
    prompts = rows_of(run, "data/prompts_train", "prompt")
    data = prompts.map(
        lambda rows: {"input_ids": tokenizer(rows["prompt"])["input_ids"]}, batched=True
    ).select_columns(["input_ids"])
    lengths: list[int] = []
    truncate = ppo_trainer.truncate_response

    def truncated(stop_token_id, pad_token_id, responses):
        kept = truncate(stop_token_id, pad_token_id, responses)
        lengths.extend((kept != pad_token_id).sum(1).tolist())
        return kept

    ppo_trainer.truncate_response = truncated
    settings = section(run, "ppo", PPOConfig)
    rollout = int(ours.rollout_batch_size)
    settings |= {
        "gradient_accumulation_steps": rollout // int(settings["per_device_train_batch_size"]),
        "total_episodes": int(ours.max_steps) * rollout, "stop_token": "eos", "num_sample_generations": 0,
    }  # fmt: skip
    settings.pop("max_steps")
    scalar = lambda: AutoModelForSequenceClassification.from_pretrained(out / "reward_model")  # noqa: E731
    trainer = PPOTrainer(
        args=PPOConfig(output_dir=str(out / "ppo"), **settings), processing_class=tokenizer, train_dataset=data,
        model=AutoModelForCausalLM.from_pretrained(out / "sft"), reward_model=scalar(), value_model=scalar(),
        ref_model=AutoModelForCausalLM.from_pretrained(out / "sft"), eval_dataset=data.select(range(8)),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(out / "ppo"))
    tokenizer.save_pretrained(out / "ppo")
    return {"responses": len(lengths), "tokens": sum(lengths) / len(lengths)}


def stock_compare(run: Path, out: Path) -> dict[str, float]:
    """Completions by ``generate``, scores by the reward model and by gold, KL to the reference, win rates."""
    import torch
    from omegaconf import OmegaConf
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from ppo_vs_dpo.preferences.testbed.gold import gold_reward

    settings = OmegaConf.load(run / "config.yaml").compare
    tokenizer = AutoTokenizer.from_pretrained(out / "sft", padding_side="left")
    prompts = rows_of(run, "data/prompts_heldout", "prompt")["prompt"][: settings.n_prompts]
    reward = AutoModelForSequenceClassification.from_pretrained(out / "reward_model")
    reference = AutoModelForCausalLM.from_pretrained(out / "sft")
    gold, figures, count, tokens = {}, {}, 0, 0
    for name in ("sft", "ppo", "dpo"):
        policy = AutoModelForCausalLM.from_pretrained(out / name)
        wanted = list(prompts) * (settings.baseline_draws if name == "sft" else 1)
        texts, finished, kl = [], [], []
        for batch in batches(wanted):
            enc = tokenizer(batch, return_tensors="pt", padding=True)
            with torch.no_grad():
                ids = policy.generate(
                    enc["input_ids"], attention_mask=enc["attention_mask"], do_sample=True, temperature=1.0, top_k=0,
                    max_new_tokens=settings.max_new_tokens, pad_token_id=tokenizer.pad_token_id,
                )  # fmt: skip
                start = enc["input_ids"].shape[1]
                new = ids[:, start:]
                ended = new == tokenizer.eos_token_id
                real = (ended.cumsum(1) - ended.long()) == 0
                mask = torch.cat([enc["attention_mask"], real.long()], 1)
                sides = [logprobs(model, ids, mask, start) for model in (policy, reference)]
            kl += ((sides[0] - sides[1]) * real).sum(1).tolist()
            tokens += int(real.sum())
            count += len(batch)
            texts += tokenizer.batch_decode(new, skip_special_tokens=True)
            finished += ended.any(1).tolist()
        scores_of(reward, tokenizer, [p + t for p, t in zip(wanted, texts, strict=True)], finished)
        gold[name] = gold_reward(wanted, texts, finished=finished)
        figures[f"kl {name}"] = sum(kl) / len(kl)
    n = len(prompts)
    for name in ("ppo", "dpo"):
        pairs = list(zip(gold[name], gold["sft"][:n], strict=True))
        figures[f"win {name}"] = sum((a > b) + (a == b) / 2 for a, b in pairs) / n
    return {**figures, "responses": count, "tokens": tokens / count}


def batches(rows: list[str]) -> Iterator[list[str]]:
    """`ROWS` at a time."""
    for start in range(0, len(rows), ROWS):
        yield rows[start : start + ROWS]


def logprobs(model, ids, mask, start: int):
    """Log-probabilities of the tokens from ``start`` on, ``(B, T)``."""
    import torch

    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits[:, start - 1 : -1]
    return torch.log_softmax(logits, -1).gather(2, ids[:, start:, None])[..., 0]


def scores_of(model, tokenizer, texts: list[str], finished: list[bool]) -> list[float]:
    """The reward model's scores, a batch at a time."""
    import torch

    found: list[float] = []
    ends = [text + tokenizer.eos_token * end for text, end in zip(texts, finished, strict=True)]
    for batch in batches(ends):
        enc = tokenizer(batch, return_tensors="pt", padding=True)
        with torch.no_grad():
            found += model(input_ids=enc["input_ids"], attention_mask=enc["attention_mask"]).logits[:, 0].tolist()
    return found


def trained(trainer) -> dict[str, float]:
    """Train, save, and give the mean loss and the number of steps."""
    summary = trainer.train().metrics
    trainer.save_model()
    return {"steps": trainer.state.global_step, "train_loss": summary["train_loss"]}


STOCK = {
    "sft": stock_sft, "reward_model": stock_reward_model, "dpo": stock_dpo, "ppo": stock_ppo, "compare": stock_compare,
}  # fmt: skip


def first_weights(run: Path, out: Path) -> None:
    """The weights and the tokenizer that our SFT stage starts from, saved for stock."""
    from ppo_vs_dpo.artifacts.run import RunFolder
    from ppo_vs_dpo.artifacts.stage import StageContext
    from ppo_vs_dpo.models.training import model_settings
    from ppo_vs_dpo.sft.train import initial_policy

    context = StageContext(RunFolder(run), "sft")
    model, tokenizer = initial_policy(context, model_settings(context))
    model.save_pretrained(out / "init")
    tokenizer.save_pretrained(out / "init")


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
        return {"responses": figures["episodes"], "tokens": cost["tokens_generated"] / figures["episodes"]}
    if stage == "compare":
        report = json.loads((run / "compare" / "report.json").read_text())
        wins = {(row["policy"], row["versus"], row["judge"]): row["win_rate"] for row in report["win_rates"]}
        made = report["cost"]["generation"]
        prompts = figures["n_prompts"]
        count = prompts * (report["settings"]["baseline_draws"] + 2)
        return {
            **{f"kl {name}": report["policies"][name]["kl"]["mean"] for name in ("ppo", "dpo")},
            **{f"win {name}": wins[name, "sft", "gold"] for name in ("ppo", "dpo")},
            "responses": count,
            "tokens": sum(one["tokens"] for one in made.values()) / count,
        }
    return {key: figures[key] for key in ("steps", "train_loss", "accuracy") if key in figures}


def travel(out: Path, overrides: list[str], stages: list[str], trl: str) -> dict[str, dict[str, dict[str, float]]]:
    """Both sides, stage by stage; what was measured before and is not asked for again is kept."""
    run, place = out / "ours" / "road", out / "road.json"
    known = json.loads(place.read_text()) if place.is_file() else {}
    root = [str(measure.ROOT)]
    if not (run / "data" / "done.json").is_file():
        words = [*SMALL, *SAME, *overrides, f"output_dir={out / 'ours'}", "name=road", "stages=[data]"]
        out.mkdir(parents=True, exist_ok=True)
        measured(["-m", "ppo_vs_dpo.pipeline.cli", "quickstart", *words], root, out / "data.log")
        measured(["-m", "benchmarks.road", "--stock", "init", str(out)], root, out / "init.log")
    for stage in stages:
        if stage != "sft" and not (run / "pairs" / "done.json").is_file():
            measured(["-m", "ppo_vs_dpo.preferences", str(run), "--step", "pairs"], root, out / "pairs.log")
        path = [trl, *root] if stage == "ppo" else root
        stock = measured(["-m", "benchmarks.road", "--stock", stage, str(out)], path, out / f"stock-{stage}.log")
        ours = measured(["-m", f"ppo_vs_dpo.{stage}", str(run)], root, out / f"ours-{stage}.log")
        known[stage] = {
            "stock": {**stock, **json.loads((out / f"stock-{stage}.json").read_text())},
            "ours": {**ours, **ours_of(run, stage)},
        }
        place.write_text(json.dumps(known, indent=1))
        print(f"  {stage}: stock {stock['seconds']:.1f} s, ours {ours['seconds']:.1f} s", file=sys.stderr, flush=True)
    return known


def report(known: dict[str, dict[str, dict[str, float]]], bar: float) -> str:
    """The table: a row a stage, the sum, and the bars."""
    rows, sums = [], {"stock": 0.0, "ours": 0.0}
    for stage, sides in known.items():
        for side, one in sides.items():
            sums[side] += one["seconds"]
        theirs, mine = sides["stock"], sides["ours"]
        length = [f"{one['tokens']:.1f}" if "tokens" in one else "" for one in (theirs, mine)]
        rows.append([
            stage, f"{theirs['seconds']:.1f}", f"{mine['seconds']:.1f}", f"{theirs['seconds'] / mine['seconds']:.2f}",
            f"{theirs['peak']:.0f}", f"{mine['peak']:.0f}", " / ".join(length).strip(" /"),
        ])  # fmt: skip
    ratio = sums["stock"] / sums["ours"]
    rows.append(["together", f"{sums['stock']:.1f}", f"{sums['ours']:.1f}", f"{ratio:.2f}", "", "", ""])
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
    parser.add_argument("--stock", choices=["init", *STOCK], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folders = [word for word in arguments.words if "=" not in word]
    overrides = [word for word in arguments.words if "=" in word]
    if arguments.stock:
        import torch

        torch.set_num_threads(1)
        out = Path(folders[0])
        run = out / "ours" / "road"
        if arguments.stock == "init":
            return first_weights(run, out)
        figures = STOCK[arguments.stock](run, out)
        (out / f"stock-{arguments.stock}.json").write_text(json.dumps(figures))
        return None
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(folders[0] if folders else temporary).resolve()
        trl = arguments.trl
        if trl is None and "ppo" in arguments.stages:
            trl = measure.install_trl("1.12.0", str(Path(temporary) / "site"))
        known = travel(out, overrides, arguments.stages, trl or "")
        print(measure.machine())
        print(report({stage: known[stage] for stage in STAGES if stage in known}, BAR))
        print(f"\nWhere ours went. {profile(RunFolder(out / 'ours' / 'road'), [*STAGES])}")
    return None


if __name__ == "__main__":
    main()
