"""A small run of every stage with a judge that is paid by the reply, and how two ends of it are compared."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet

STAGES = ("data", "sft", "pairs", "reward_model", "dpo", "ppo", "compare")
SMALL = [
    "experiment=quickstart",
    "data.sft_examples=640", "data.train_prompts=128", "data.heldout_prompts=24", "data.pairs=128",
    "data.test_pairs=32", "data.max_new_tokens=16",
    "sft.num_train_epochs=1", "sft.save_steps=2", "sft.logging_steps=2", "sft.per_device_train_batch_size=32",
    "reward_model.num_train_epochs=1", "reward_model.save_steps=1", "reward_model.samples=32",
    "dpo.save_steps=1", "dpo.sweep=null",
    "ppo.max_steps=4", "ppo.rollout_batch_size=16", "ppo.per_device_train_batch_size=8", "ppo.save_steps=1",
    "ppo.eval_steps=2", "ppo.validation_prompts=8", "ppo.sweep=null",
    "compare.n_prompts=16", "compare.pool_size=2", "compare.best_of_n=[2]", "compare.resamples=100",
    "compare.checkpoints={}", "compare.best_of={}",
]  # fmt: skip
# In the environment of everything that a campaign starts.
TAG = "FAULTS_TAG"
TIMES = re.compile(r"time|seconds|per_second|runtime|memory|rss|throughput|tokens_per", re.IGNORECASE)


def command(out: Path, judge: str, *more: str) -> list[str]:
    """The command line of a run whose judge is at an address."""
    entry = f"{{kind: llm, name: stub, model: stub, n_prompts: 8, base_url: '{judge}', concurrency: 2, retries: 0}}"
    program = [sys.executable, "-m", "ppo_vs_dpo.pipeline.cli", *SMALL]
    return [*program, f"compare.judges=[{entry}]", f"output_dir={out}", *more]


def environment(tag: str) -> dict[str, str]:
    """One thread, no network but the loopback, and a mark by which survivors are found."""
    mine = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}
    return {**os.environ, **mine, TAG: tag}


def survivors(tag: str) -> dict[int, str]:
    """Processes that carry a tag, zombies left out: id -> command line."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            if f"{TAG}={tag}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:160]
        except OSError:
            continue
    return found


def without_times(value: Any) -> Any:
    """Figures without what differs between equal runs."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if not TIMES.search(key)}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def bits(run: Path) -> dict[str, str]:
    """Hash of every model file, table, log and report of a run, times left out."""
    found = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if not path.is_file() or name.startswith((".replaced/", "cache/")) or "/checkpoints/" in f"/{name}":
            continue
        if "/model/" in name and path.name != "README.md":
            content: Any = path.read_bytes()
        elif path.suffix == ".parquet":
            content = pyarrow.parquet.read_table(path).to_pydict()
        elif path.name == "metrics.jsonl":
            content = [without_times(json.loads(line)) for line in path.read_text().splitlines()]
        elif name == "compare/report.json":
            report = json.loads(path.read_text())
            content = {key: value for key, value in report.items() if key not in ("cost", "provenance")}
        elif path.name == "done.json":
            content = without_times(json.loads(path.read_text())["figures"])
        else:
            continue
        data = content if isinstance(content, bytes) else json.dumps(content, sort_keys=True, default=str).encode()
        data = re.sub(rb"127\.0\.0\.1:\d+", b"the judge", data)  # another port each time
        found[name] = hashlib.sha256(data).hexdigest()[:16]
    return found


def leftovers(run: Path) -> list[str]:
    """Temporary files and locks that nobody will ever use again."""
    return sorted(
        path.relative_to(run).as_posix()
        for path in run.rglob("*")
        if path.name.endswith(".tmp") or path.name.startswith((".lock", ".going")) or "incomplete" in path.name
    )


def start(out: Path, judge: str, tag: str, *more: str) -> subprocess.Popen:
    """The command in a session of its own; what it says goes to ``out/said.txt``."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "said.txt").open("ab") as said:
        return subprocess.Popen(
            command(out, judge, *more), env=environment(tag), stdout=said, stderr=said, start_new_session=True
        )


def whole(out: Path, judge: str, tag: str, *more: str, timeout: float = 1200) -> tuple[int, str]:
    """Run it to its end; exit code and words."""
    ended = subprocess.run(
        command(out, judge, *more), env=environment(tag), capture_output=True, text=True, check=False, timeout=timeout
    )
    return ended.returncode, ended.stdout + ended.stderr
