"""What a run will cost, said before its first stage: responses, tokens, updates, time here, memory, disk."""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, write_json
from ppo_vs_dpo.artifacts.guards.fingerprints import point_name, points_of
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.pipeline.planning.measured import ask
from ppo_vs_dpo.ppo.stage.config import reward_models, trained_share, trains_values

# trl's and transformers' defaults where a section says nothing.
BATCH, EPOCHS = 8, 3
# Characters of a token, about; only for texts that nobody has tokenised yet.
CHARACTERS = 4
# A pass through adapters alone leaves out the gradients of the frozen weights: 4 N instead of 6 N FLOPs a token.
ADAPTERS = 2 / 3
# Starting a process, loading libraries and models.
START = 15.0
# The same with a model of the testbed's size, in a run that names its seconds.
STARTED = 5.0


@dataclass
class Work:
    """What one job does.

    Attributes:
        name: of the job.
        updates: optimizer steps.
        trained: tokens with gradients.
        read: tokens of passes without.
        sampled: tokens decoded.
        responses: texts sampled.
        known: whether the number of examples is known; else the data must be read first.
    """

    name: str
    updates: int | None = None
    trained: float = 0.0
    read: float = 0.0
    sampled: float = 0.0
    responses: int = 0
    adapters: bool = False
    known: bool = True

    @property
    def tokens(self) -> float:
        """All of them."""
        return self.trained + self.read + self.sampled

    def seconds(self, speed: dict[str, Any]) -> float | None:
        """On this machine; ``None`` where the work is not known."""
        if not self.known:
            return None
        trained = self.trained * speed["train"] * (ADAPTERS if self.adapters else 1.0)
        return START + trained + self.read * speed["forward"] + self.sampled * speed["decode"]


def say_cost(run: RunFolder, names: Iterable[str], environment: dict[str, str]) -> tuple[str, dict[str, float]]:
    """The table that stands before the first stage, and the seconds that each job is expected to take.

    A run that says how long its stages take (``launch.expected_seconds``) is not measured.
    """
    works = [work_of(run, name) for name in names]
    configured = run.config.launch.expected_seconds
    speed = None if configured else speed_of(run, environment)
    shares = shares_of_usual(run, [work.name for work in works]) if configured else {}
    seconds: dict[str, float] = {}
    for work in works:
        guess = configured.get(work.name.split(",")[0]) if configured else speed and work.seconds(speed)
        if guess and configured:
            start = min(float(guess), STARTED)
            guess = start + (float(guess) - start) * shares.get(work.name, 1.0)
        if guess:
            seconds[work.name] = float(guess)
    return table(run, works, seconds, speed), seconds


def shares_of_usual(run: RunFolder, names: list[str]) -> dict[str, float]:
    """Tokens of each job beside those of the experiment as its file has it: whose seconds are the ones it names."""
    from ppo_vs_dpo.pipeline.composing.compose import load

    name = str(run.config.experiment)
    word = f"paper={name.removeprefix('paper/')}" if name.startswith("paper/") else f"experiment={name}"
    try:
        usual = load([word], check_missing=False)
    except UserError:
        return {}  # an experiment of somebody's own folder
    # By the two configurations alone: what has been made so far was made from this one.
    nowhere = run.root / "nowhere"
    shares = {}
    for one in names:
        here, there = (work_of(RunFolder(nowhere, config), one) for config in (run.config, usual))
        if here.known and there.known and there.tokens:
            shares[one] = here.tokens / there.tokens
    return shares


def speed_of(run: RunFolder, environment: dict[str, str]) -> dict[str, Any] | None:
    """Seconds a token on this machine, measured once for a model and kept in the run's cache."""
    model = run.config.model
    question = {
        "path": model.get("path"),
        "revision": model.get("revision"),
        "trust_remote_code": model.get("trust_remote_code"),
        "architecture": dict(model.get("architecture") or {}),
        "batch": int((run.config.get("compare") or {}).get("batch_size") or 16),
        "ranks": ranks(run),
        "prompt": examples(run, "ppo")[1],
        "sections": {
            name: OmegaConf.to_container(run.config[name], resolve=True)
            for name in ("model", "sft", "reward_model", "dpo", "ppo", "deepspeed")
            if run.config.get(name) is not None
        },
        "host": os.uname().nodename,
    }
    kept = run.cache("speed.json")
    if kept.is_file():
        known = read_json(kept)
        if isinstance(known, dict) and known.get("question") == question:
            return known["answer"]
    answer = ask(question, environment)
    if answer is not None:
        write_json(kept, {"question": question, "answer": answer})
    return answer


# ------------------------------------------------------------------------------------------------- what each job does


def work_of(run: RunFolder, name: str) -> Work:
    """What a job does, from the configuration and what has been done."""
    stage = name.split(",")[0]
    section = run.config.get(stage) or {}
    if stage in ("data", "pairs"):
        return _made(run, stage)
    if stage == "ppo":
        return _ppo(run, name, section)
    if stage == "compare":
        return _compare(run, section)
    if section.get("skip_training") or section.get("path"):
        return Work(name, updates=0)
    rows, length = examples(run, stage)
    sides = 1 if stage == "sft" else 2
    batch = int(section.get("per_device_train_batch_size") or BATCH)
    batch *= int(section.get("gradient_accumulation_steps") or 1) * ranks(run)
    steps = int(section.get("max_steps") or -1)
    if steps <= 0 and rows is None:
        return Work(name, known=False)
    if steps <= 0:
        steps = math.ceil(math.ceil(rows / batch) * float(section.get("num_train_epochs") or EPOCHS))
    length = min(length, int(section.get("max_length") or length))
    trained = steps * batch * sides * length
    # DPO reads every pair once under the reference; the reward model's report scores test pairs and samples.
    read = (rows or steps * batch) * sides * length if stage == "dpo" else 0.0
    # At the end both sides of the test pairs, by the reward model also of as many training pairs, by DPO's two models.
    read += 4 * min(int(section.get("test_pairs") or 1000), rows or 1000) * length if stage != "sft" else 0.0
    if stage == "reward_model":
        steps, trained = (int(section.get("ensemble") or 1) * one for one in (steps, trained))
    responses = int(section.get("samples") or 0) if stage == "reward_model" else 0
    sampled = responses * int(section.get("sample_max_new_tokens") or 64)
    adapters = bool(section.get("lora"))
    return Work(name, steps, trained, read, sampled, responses, adapters)


def _made(run: RunFolder, stage: str) -> Work:
    pairs = run.config.data.get("pairs")
    if stage == "pairs" and isinstance(pairs, int) and run.config.data.get("max_new_tokens"):
        responses = 2 * (pairs + int(run.config.data.get("test_pairs") or 0))
        return Work(stage, sampled=responses * int(run.config.data.max_new_tokens), responses=responses)
    return Work(stage)


def _ppo(run: RunFolder, name: str, section: Any) -> Work:
    point = next((one for one in points_of(run.config, "ppo") if point_name("ppo", one) == name), {})
    section = {**section, **point}
    batch = int(section.get("per_device_train_batch_size") or BATCH)
    rollout = section.get("rollout_batch_size") or batch * int(section.get("gradient_accumulation_steps") or 1)
    rollout = int(rollout) if section.get("rollout_batch_size") else int(rollout) * ranks(run)
    updates = int(section.get("max_steps") or -1)
    if updates <= 0:
        episodes = section.get("total_episodes")
        if not episodes:
            return Work(name, known=False)
        updates = math.ceil(int(episodes) / rollout)
    responses = updates * rollout
    response = int(section.get("response_length") or 53)
    prompt = min(examples(run, "ppo")[1], int(section.get("max_prompt_length") or 10**9))
    tokens = responses * (prompt + response)
    if section.get("eval_strategy") not in (None, "no", False):
        every = int(section.get("eval_steps") or 1)
        responses += math.ceil(updates / max(every, 1)) * int(section.get("validation_prompts") or 0)
    # Policy and value model (where there is one) are trained on each pass; they, reference and reward read once.
    values = trains_values(section)
    trained = (1.0 + values) * trained_share(section) * tokens * int(section.get("num_ppo_epochs") or 4)
    read = (2.0 + values + reward_models(run.config)) * tokens
    return Work(name, updates, trained, read, responses * response, responses, bool(section.get("lora")))


def _compare(run: RunFolder, section: Any) -> Work:
    prompts = int(section.get("n_prompts") or 512)
    best = {key: max(values) for key, values in (section.get("best_of") or {}).items() if values}
    policies = 2 + len(section.get("policies") or {})
    for stage in ("ppo", "dpo"):
        sweep = (run.config.get(stage) or {}).get("sweep") or {}
        policies += sum(len(values) for values in sweep.values())
        steps = (section.get("checkpoints") or {}).get(stage)
        policies += len(steps) if steps and steps != "all" else 0
    draws = int(section.get("baseline_draws") or 4) + int(section.get("pool_size") or 0)
    draws += policies * (int(section.get("samples") or 1) + len(section.get("other_temperatures") or []))
    draws += sum(2 * n for n in best.values())
    responses = prompts * draws
    new = int(section.get("max_new_tokens") or 64)
    length = examples(run, "ppo")[1] + new
    # KL: the policy and the reference read what was drawn; the reward model scores it.
    return Work("compare", read=3.0 * responses * length, sampled=responses * new, responses=responses)


def ranks(run: RunFolder) -> int:
    """Processes of a training stage."""
    return int(run.config.launch.processes) * int(run.config.launch.get("nodes") or 1)


def examples(run: RunFolder, stage: str) -> tuple[int | None, int]:
    """How many examples a stage trains on (``None``: not known yet), and tokens of one, about (ppo: of a prompt)."""
    data = run.config.data
    bound = int(data.get("max_prompt_tokens") or 128)
    if stage != "ppo":
        bound += int(data.get("max_response_tokens") or data.get("max_new_tokens") or 128)
    name = {"sft": ("data", "sft_train"), "ppo": ("data", "prompts_train")}.get(stage, ("pairs", "train"))
    table = run.path(name[0], f"{name[1]}.parquet")
    if table.is_file():
        import pyarrow.parquet

        file = pyarrow.parquet.ParquetFile(table)
        columns = [one for one in ("prompt", "completion", "chosen") if one in file.schema_arrow.names]
        first = next(file.iter_batches(batch_size=200, columns=columns), None)
        rows = first.to_pylist() if first is not None else []
        characters = [sum(_characters(row[one]) for one in columns) for row in rows]
        typical = math.ceil(sum(characters) / max(len(rows), 1) / CHARACTERS) or bound
        return file.metadata.num_rows, min(typical, bound) if data.get("max_prompt_tokens") else typical
    configured = {"sft": data.get("sft_examples"), "ppo": data.get("train_prompts")}.get(stage, data.get("pairs"))
    if isinstance(configured, int):
        return configured, bound
    path = Path(str(data.get("path")))
    if path.is_file() and path.suffix == ".jsonl":
        with path.open("rb") as lines:
            total, size = sum(1 for line in lines if line.strip()), path.stat().st_size
        share = 1 - float(data.get("test_fraction") or 0) - float(data.get("heldout_fraction") or 0)
        # A line holds a prompt and two answers.
        typical = math.ceil(size / max(total, 1) / CHARACTERS * (1 / 3 if stage == "ppo" else 2 / 3))
        return int(total * share), min(typical, bound) if data.get("max_prompt_tokens") else typical
    return None, bound


def _characters(value: Any) -> int:
    return len(value) if isinstance(value, str) else sum(len(one.get("content") or "") for one in value or [])


# ------------------------------------------------------------------------------------------------------- what is said


def table(run: RunFolder, works: list[Work], seconds: dict[str, float], speed: dict[str, Any] | None) -> str:
    """The table as text."""
    memory = (speed or {}).get("memory") or {}
    head = f"{'stage':<22}{'updates':>9}{'responses':>11}{'tokens':>10}{'time':>10}"
    lines = [head + (f"{'memory':>10}" if memory else "")]
    for work in works:
        tokens = work.tokens
        cells = (
            "" if work.updates is None else f"{work.updates:,}",
            f"{work.responses:,}" if work.responses else "",
            short(tokens) if tokens else "",
            spell(seconds[work.name]) if work.name in seconds else "?" if not work.known else "",
        )
        line = f"{work.name[:21]:<22}{cells[0]:>9}{cells[1]:>11}{cells[2]:>10}{cells[3]:>10}"
        peak = memory.get(work.name.split(",")[0])
        lines.append(line + (f"{peak / 1e9:>7.1f} GB" if peak else ""))
    total = sum(seconds.values())
    if total:
        where = f", measured on {speed['device']}" if speed else ", from launch.expected_seconds"
        open_ = [work.name for work in works if not work.known]
        more = f", and {', '.join(open_)} once the data is read" if open_ else ""
        together = total / max(1, min(int(run.config.launch.workers), 2))
        lines.append(f"about {spell(together)} to {spell(total)} in all{where}{more}; Ctrl-C keeps what is done")
    else:
        lines.append("how long that takes is known after the first update; Ctrl-C keeps what is done")
    if memory:
        where = "a stage's process" if speed["device"] == "cpu" else "each GPU"
        beside = f"; {run.config.launch.workers} stages run at once" if int(run.config.launch.workers) > 1 else ""
        lines.append(f"memory: the peak of {where}, estimated from above{beside}")
    lines.append(space(run, works, speed))
    return "\n".join(line for line in lines if line) + "\n"


def space(run: RunFolder, works: list[Work], speed: dict[str, Any] | None) -> str:
    """Disk, where the model's size is known: whole models, and the checkpoints that are kept."""
    if speed is None:
        return ""
    size = speed["parameters"] * (2 if str(run.config.model.get("dtype")) in ("bfloat16", "float16") else 4)
    total = 0.0
    for work in works:
        stage = work.name.split(",")[0]
        section = run.config.get(stage) or {}
        if stage in ("data", "pairs", "compare") or section.get("path"):
            continue
        if section.get("skip_training"):
            continue  # linked
        merged = section.get("merge_lora", True) or not work.adapters
        total += size if merged else 0.02 * size
        kept = int(section.get("save_total_limit") or 1) + 1
        models = 2 if stage == "ppo" and trains_values(section) else int(section.get("ensemble") or 1)
        # Weights, and AdamW's two moments in fp32.
        total += kept * models * (0.05 * size if work.adapters else 3 * size)
    disk = f"{total / 1e9:.1f} GB" if total > 1e8 else f"{total / 1e6:.0f} MB"
    return f"disk: about {disk} in {run.root} (`ppo-vs-dpo clean {run.root}` says later what may go)"


def short(count: float) -> str:
    """``12.3 M``."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f}"


def spell(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.5 h``, ``2.1 d``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} d"
