"""A small run of every stage with a judge that is paid by the reply, and how two ends of it are compared."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet

from ppo_vs_dpo.artifacts.files import read_json, write_json
from ppo_vs_dpo.artifacts.guards.versions import source_hash
from ppo_vs_dpo.preferences.judging.template import TEMPLATES
from tests.compare.server import Server

STAGES = ("data", "sft", "pairs", "reward_model", "dpo", "ppo", "compare")
TRAINING = ("sft", "reward_model", "dpo", "ppo")
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
# What is kept to go on from, or to save time: whether it is right shows in what is made of it.
KEPT_BESIDE = {"checkpoints", "tokens", "reference_logprobs"}
# In the environment of everything that a campaign starts.
TAG = "FAULTS_TAG"
TIMES = re.compile(r"time|seconds|per_second|runtime|memory|rss|throughput|tokens_per", re.IGNORECASE)


def command(out: Path, judge: str, *more: str) -> list[str]:
    """The command line of a run whose judge is at an address, and asks in the words of a file beside ``out``."""
    words = out.parent / "template.yaml"
    if not words.is_file():
        words.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TEMPLATES / "hh_helpfulness.yaml", words)
    entry = f"{{kind: llm, name: stub, model: stub, n_prompts: 8, base_url: '{judge}', concurrency: 2, retries: 0, "
    entry += f"template: '{words}'}}"
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
        if not path.is_file() or name.startswith((".replaced/", "cache/")) or KEPT_BESIDE.intersection(path.parts):
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
        if path.name.endswith((".tmp", ".unreadable"))
        or path.name.startswith((".lock", ".going", "unfit-", "unfinished-"))
        or "incomplete" in path.name
    )


def different(expected: dict[str, str], found: dict[str, str], stages: list[str]) -> list[str]:
    """Names of what differs between two runs, of some stages."""
    names = {name for name in (*expected, *found) if name.split("/")[0] in stages}
    return sorted(name for name in names if expected.get(name) != found.get(name))


def as_typed() -> None:
    """Signals as in a terminal: what was started in the background ignores Ctrl-C, under ``nohup`` SIGHUP as well."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(out: Path, judge: str, tag: str, *more: str) -> subprocess.Popen:
    """The command in a session of its own; what it says goes to ``out/said.txt``."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "said.txt").open("ab") as said:
        return subprocess.Popen(
            command(out, judge, *more),
            env=environment(tag),
            stdout=said,
            stderr=said,
            start_new_session=True,
            preexec_fn=as_typed,
        )


def whole(out: Path, judge: str, tag: str, *more: str, timeout: float = 1200) -> tuple[int, str]:
    """Run it to its end; exit code and words."""
    ended = subprocess.run(
        command(out, judge, *more), env=environment(tag), capture_output=True, text=True, check=False, timeout=timeout
    )
    return ended.returncode, ended.stdout + ended.stderr


# ------------------------------------------------------------------------------- a judge, and the undisturbed run


class Judge(Server):
    """An endpoint that remembers what it answered: its verdict depends on the words alone, and takes a moment.

    Attributes:
        answers: ``(question, when it was sent)``.
    """

    def __init__(self, port: int = 0, seconds: float = 0.1):
        self.answers: list[tuple[str, float]] = []

        def answer(question: str, number: int) -> str:
            time.sleep(seconds)
            self.answers.append((question, time.monotonic()))
            return f"Comparison: fine.\n{'A' if sum(question.encode()) % 2 else 'B'}"

        super().__init__(answer, port=port)
        self.http.handle_error = lambda *request: None  # whoever asked has been killed


def judge_of(folder: Path) -> Judge:
    """The judge of a campaign: at the same port each time, so that runs of an earlier call stay what they are."""
    kept = folder / "port.json"
    judge = Judge(read_json(kept)["port"] if kept.is_file() else 0)
    write_json(kept, {"port": judge.http.server_port})
    return judge


@dataclass
class Calm:
    """An undisturbed run.

    Attributes:
        root: its folder.
        ranks: processes of each training stage.
        price: replies that its judge was asked for.
        more: what its command had besides `SMALL`.
        expected: its bits.
    """

    root: Path
    ranks: int
    price: int
    more: list[str]
    expected: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def folder(folder: Path) -> Path:
        """Where the undisturbed run was made, and where all others are: a configuration names its folder."""
        return folder / "cut" / "quickstart"

    def seconds(self, stage: str) -> float:
        """What a stage took at work."""
        return float(read_json(self.root / stage / "done.json")["seconds"])

    def begin_at(self, stage: str, run: Path) -> None:
        """Make a run in which everything before a stage is done, and nothing of it has been drawn or asked yet."""
        shutil.rmtree(run.parent, ignore_errors=True)
        run.mkdir(parents=True)
        for name in ("config.yaml", "manifest.json", "cache", *STAGES[: STAGES.index(stage)]):
            source = self.root / name
            if source.is_dir():
                shutil.copytree(source, run / name, symlinks=True)
            elif source.is_file():
                shutil.copy2(source, run / name)
        shutil.rmtree(run / "cache" / "completions", ignore_errors=True)
        (run / "cache" / "judge_replies.jsonl").unlink(missing_ok=True)


def calm(folder: Path, judge: Judge, ranks: int, say: Callable[[str], object] = print) -> Calm:
    """The undisturbed run of a campaign, made once for each number of ranks and each version of the code."""
    more = [f"launch.processes={ranks}", "launch.workers=1"]
    root, note = folder / f"calm{ranks}" / "quickstart", folder / f"calm{ranks}" / "price.json"
    if not note.is_file() or read_json(note)["source"] != source_hash():
        say(f"an undisturbed run, ranks: {ranks}")
        asked, began, made = len(judge.answers), time.monotonic(), Calm.folder(folder)
        shutil.rmtree(made.parent, ignore_errors=True)
        shutil.rmtree(root.parent, ignore_errors=True)
        code, words = whole(made.parent, judge.url, f"calm{ranks}", *more)
        assert code == 0, words
        questions = [question for question, _ in judge.answers[asked:]]
        assert len(questions) == len(set(questions)), "an undisturbed run asks nothing twice"
        root.parent.mkdir(parents=True)
        made.rename(root)
        write_json(note, {"source": source_hash(), "price": len(questions), "seconds": time.monotonic() - began})
        say(f"it took {time.monotonic() - began:.0f} s and {len(questions)} replies")
    return Calm(root, ranks, read_json(note)["price"], more, bits(root))
