"""What a run will cost, said before its first stage: responses, tokens, updates, time here, memory, disk."""

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.errors import UserError, say
from ppo_vs_dpo.artifacts.files import read_marker, sha256_of, write_json
from ppo_vs_dpo.artifacts.guards.fingerprints import needs_of
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.pipeline.planning.cost.counted import examples, ranks, some_texts
from ppo_vs_dpo.pipeline.planning.cost.measured import ask
from ppo_vs_dpo.pipeline.planning.cost.work import Work, work_of
from ppo_vs_dpo.ppo.stage.config import trains_values

# Starting a process, loading libraries and a model of the testbed's size, in a run that names its seconds.
STARTED = 8.0
# Bumped when an answer has other figures: it is then measured again.
LAYOUT = 4


def say_cost(run: RunFolder, names: Iterable[str], environment: dict[str, str]) -> tuple[str, dict[str, float]]:
    """The table that stands before the first stage, and the seconds that each job is expected to take.

    A run that says how long its stages take (``launch.expected_seconds``) is not measured.
    """
    configured = run.config.launch.expected_seconds
    speed = None if configured else speed_of(run, environment)
    works = [work_of(run, name, (speed or {}).get("characters")) for name in names]
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
    """Seconds a token on this machine, measured once for a model and kept in the run's cache.

    A run keeps to its data: once a tokenizer has read some of its texts, it is not asked about others of them.
    """
    model = run.config.model
    question = {
        "path": model.get("path"),
        "revision": model.get("revision"),
        "trust_remote_code": model.get("trust_remote_code"),
        "architecture": dict(model.get("architecture") or {}),
        "batch": int((run.config.get("compare") or {}).get("batch_size") or 16),
        "ranks": ranks(run),
        "sections": {
            name: OmegaConf.to_container(run.config[name], resolve=True)
            for name in ("model", "sft", "reward_model", "dpo", "ppo", "deepspeed")
            if run.config.get(name) is not None
        },
        "threads": int(run.config.launch.threads),
        "host": os.uname().nodename,
    }
    texts = some_texts(run)
    kept = run.cache("speed.json")
    asked = sha256_of([LAYOUT, question])
    known = read_marker(kept, set_aside=True) or {}
    if known.get("asked") == asked and "answer" in known and (known["answer"].get("characters") or not texts):
        return known["answer"]
    say("timing two layers of the model on this machine, to say what this will take (up to a minute) ...\n")
    sys.stdout.flush()
    answer = ask({**question, "prompt": examples(run, "ppo")[1], "texts": texts}, environment)
    if answer is not None:
        write_json(kept, {"asked": asked, "answer": answer})
    return answer


# ------------------------------------------------------------------------------------------------------- what is said


def table(run: RunFolder, works: list[Work], seconds: dict[str, float], speed: dict[str, Any] | None) -> str:
    """The table as text."""
    memory = (speed or {}).get("memory") or {}
    head = f"{'stage':<22}{'updates':>9}{'responses':>11}{'tokens':>12}{'time':>12}"
    lines = [head + (f"{'memory':>10}" if memory else "")]
    for work in works:
        tokens, most = work.tokens, "<= " * work.at_most
        time = spell(seconds[work.name]) if work.name in seconds else ""
        cells = (
            "" if work.updates is None else f"{work.updates:,}",
            f"{work.responses:,}" if work.responses else "",
            most + short(tokens) if tokens else "",
            time or ("" if work.known else "?"),
        )
        line = f"{work.name[:21]:<22}{cells[0]:>9}{cells[1]:>11}{cells[2]:>12}{cells[3]:>12}"
        peak = memory.get(work.name.split(",")[0])
        lines.append(line + (f"{peak / 1e9:>7.1f} GB" if peak else ""))
    total = sum(seconds.values())
    if total:
        where = f", measured on {speed['device']}" if speed else ", from launch.expected_seconds"
        open_ = [work.name for work in works if not work.known]
        more = f", and {', '.join(open_)} once the data is read" if open_ else ""
        needs = lambda name: needs_of(run.config, name.split(",")[0])  # noqa: E731
        quick, slow = spell(at_once(seconds, needs, run.config.launch.workers)), spell(total)
        time = slow if quick == slow else f"{quick} to {slow}"
        lines.append(f"about {time} in all{where}{more}; Ctrl-C keeps what is done")
        if (speed or {}).get("device", "cpu") == "cpu" and (load := busy()):
            lines.append(f"that is beside no other work; this machine has some now ({load}): it will take longer")
    else:
        lines.append("how long that takes is known after the first update; Ctrl-C keeps what is done")
    if any(work.at_most for work in works):
        texts = ", and texts at the longest that data lets them be: how long they are is known once the data is read"
        texts = texts if any(work.longest and work.tokens for work in works) else ""
        so_is = "; the times follow from that" if speed else ""
        lines.append(f"<=: answers are counted at their full length, and many end earlier{texts}{so_is}")
    lines.append(requests(works).rstrip())
    if memory:
        where = "a stage's process" if speed["device"] == "cpu" else "each GPU"
        beside = f"; {run.config.launch.workers} stages run at once" if int(run.config.launch.workers) > 1 else ""
        lines.append(f"memory: the peak of {where}, estimated from above{beside}")
    lines.append(space(run, works, speed))
    return "\n".join(line for line in lines if line) + "\n"


def requests(works: list[Work]) -> str:
    """A line on what judges behind an endpoint are asked, where there are any: it may cost money."""
    asked = [f"{work.name} {work.requests:,}" for work in works if work.requests]
    return f"requests to LLM judges, at most: {', '.join(asked)}; each reply is paid once\n" if asked else ""


def at_once(seconds: dict[str, float], needs: Callable[[str], Iterable[str]], workers: int) -> float:
    """Seconds from the first job to the last, where ``workers`` of them find a core each and none waits but for what
    it reads.

    Args:
        seconds: of every job, in the order in which they start.
        needs: the jobs that one reads; those without seconds are there already.
    """
    places = [0.0] * max(1, min(int(workers), os.cpu_count() or 1))
    ends: dict[str, float] = {}
    for name, takes in seconds.items():
        begins = max([min(places), *(ends.get(need, 0.0) for need in needs(name))])
        ends[name] = places[places.index(min(places))] = begins + takes
    return max(ends.values(), default=0.0)


def busy() -> str:
    """``load 5.1 on 2 cores`` where processes want more cores than there are, else nothing."""
    try:
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
    except (AttributeError, OSError):
        return ""  # a system that does not count it
    return f"load {load:.1f} on {cores} core{'s' * (cores > 1)}" if load >= cores else ""


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
    if total < 1e6:
        return ""  # links, and tables
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
