"""Every command of the README is run, line by line as it is written there, on small models where a run is long."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline import mini
from tests.pipeline.chat_model import save_chat_model
from tests.pipeline.whole.test_real_input import FEW

ROOT = Path(__file__).parents[3]

# What makes a command of the README small; the line itself is typed as it stands.
SMALLER = {
    "ppo-vs-dpo data inspect my_pairs.jsonl": [],
    "ppo-vs-dpo experiment=hh name=mine model.path=my_model data=files data.path=my_pairs.jsonl "
    "data.conversational=true": FEW,
    "ppo-vs-dpo show experiment=quickstart": [],
    "ppo-vs-dpo -m experiment=quickstart seed=1,2,3": mini.SMALL[1:],
    "ppo-vs-dpo compare runs/quickstart-seed1 runs/quickstart-seed2 runs/quickstart-seed3": [],
    "ppo-vs-dpo plan experiment=hh model.path=my_model deepspeed=zero3 --gpus 8 --gpu h100-80gb": [],
    "ppo-vs-dpo experiment=hh name=two model.path=my_model launch.processes=2 deepspeed=zero2": [
        *FEW, "data=files", "data.path=my_pairs.jsonl", "data.conversational=true",
        "ppo.per_device_train_batch_size=4",
    ],
}  # fmt: skip


def commands() -> list[str]:
    """The commands in the README's shell blocks, without their comments."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def typed(line: str, folder: Path, *more: str) -> str:
    """Type a line into a shell in ``folder`` and return what it printed; it must end with exit code 0."""
    environment = {**mini.environment(), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    words = " ".join([line, *(f"'{word}'" for word in more)])
    ended = subprocess.run(
        ["bash", "-c", words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,
    )
    assert ended.returncode == 0, f"{words}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with what the README's reader has: a model and a file of pairs."""
    folder = tmp_path_factory.mktemp("desk")
    save_chat_model(folder / "my_model")
    rows = [
        {"prompt": f"What is {a} plus {b}?", "chosen": f"It is {a + b}.", "rejected": f"It is {a * b + 1}, I think."}
        for a in range(12)
        for b in range(12)
    ]
    (folder / "my_pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_no_command_of_the_readme_is_left_out():
    assert set(commands()) == {*SMALLER, "make quickstart", "make test"}


@pytest.mark.parametrize(("word", "answer"), [("data inspect", "144"), ("show", "kl_coef:"), ("plan", "peak")])
def test_commands_that_only_look(word, answer, desk):
    line = next(line for line in commands() if line.startswith(f"ppo-vs-dpo {word}"))
    assert answer in typed(line, desk)


@pytest.mark.slow
def test_commands_that_train(desk):
    said = {line: typed(line, desk, *SMALLER[line]) for line in commands() if line in SMALLER}
    for name in ("mine", "two"):
        assert f"runs/{name}/compare/report.html" in next(
            text for line, text in said.items() if f"name={name}" in line
        )
    for seed in (1, 2, 3):
        report = json.loads((desk / f"runs/quickstart-seed{seed}" / "compare" / "report.json").read_text())
        assert {"ppo", "dpo", "sft"} <= set(report["policies"])
    pooled = next(text for line, text in said.items() if line.startswith("ppo-vs-dpo compare"))
    assert "report.html" in pooled


@pytest.mark.slow
def test_make_quickstart_in_a_fresh_checkout(tmp_path):
    """The README's first command in full, in a clone; the installation alone is that of this environment."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tmp_path / "clone")], check=True)
    venv = Path(sys.prefix)
    line = f"make VENV={venv} --old-file={venv}/.installed quickstart"
    said = typed(line, tmp_path / "clone")
    assert "Against SFT" in said
    assert "Report: runs/quickstart/compare/report.html" in said
    assert "everything is done; nothing changed" in typed(line, tmp_path / "clone")
