"""Every command of the README is run, line by line as it is written there, on small models where a run is long."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_vs_dpo.pipeline.cli import COMMANDS, with_config_dir
from ppo_vs_dpo.pipeline.composing.compose import load
from ppo_vs_dpo.pipeline.composing.words import with_experiment
from ppo_vs_dpo.preferences.testbed.tokenizer import build_tokenizer
from tests.pipeline import mini
from tests.pipeline.chat_model import save_chat_model
from tests.pipeline.whole.test_real_input import FEW

ROOT = Path(__file__).parents[3]

# What makes a command of the README small; the line itself is typed as it stands.
SMALLER = {
    "ppo-vs-dpo data inspect my_pairs.jsonl": [],
    "ppo-vs-dpo try model.path=my_model data.path=my_pairs.jsonl data.conversational=true": FEW,
    "ppo-vs-dpo compare --prompts prompts.jsonl --policy mine=my_dpo_model --policy theirs=theirs.jsonl "
    "--reference my_model --judge my_judge.py:polite": ["compare.max_new_tokens=8"],
    "ppo-vs-dpo show quickstart": [],
    "ppo-vs-dpo -m quickstart seed=1,2,3": [
        *mini.SMALL[1:], "dpo.sweep=null", "ppo.sweep=null", "data.sft_examples=320", "sft.num_train_epochs=1",
        "data.pairs=128", "ppo.max_steps=2", "compare.n_prompts=32", "compare.pool_size=2", "compare.best_of_n=[2]",
        "compare.best_of={}", "compare.checkpoints={}",
    ],
    "ppo-vs-dpo compare runs/quickstart-seed1 runs/quickstart-seed2 runs/quickstart-seed3": [],
    "ppo-vs-dpo plan hh model.path=my_model deepspeed=zero3 --gpus 8 --gpu h100-80gb": [],
    "ppo-vs-dpo hh name=two model.path=my_model launch.processes=2 deepspeed=zero2": [
        *FEW, "data=files", "data.path=my_pairs.jsonl", "data.conversational=true",
        "ppo.per_device_train_batch_size=4",
    ],
}  # fmt: skip


def commands() -> list[str]:
    """The commands in the README's shell blocks, without their comments."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def typed(line: str, folder: Path, *more: str, shell: bool = True) -> str:
    """Type a line into a shell in ``folder`` and return what it printed; it must end with exit code 0.

    A line that needs no shell (``shell=False``) is split as one would.
    """
    environment = {**mini.environment(), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    words = " ".join([line, *(f"'{word}'" for word in more)])
    ended = subprocess.run(
        ["bash", "-c", words] if shell else shlex.split(words),
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
    return make_desk(tmp_path_factory.mktemp("readme") / "desk")


def make_desk(folder: Path) -> Path:
    """A folder with what the README's reader has: a model, pairs, prompts, outputs and a judge."""
    folder.mkdir()
    save_chat_model(folder / "my_model")
    rows = [
        {"prompt": f"What is {a} plus {b}?", "chosen": f"It is {a + b}.", "rejected": f"It is {a * b + 1}, I think."}
        for a in range(12)
        for b in range(12)
    ]
    (folder / "my_pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my_dpo_model").symlink_to(folder / "my_model")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows[:16]))
    answers = [{"prompt": row["prompt"], "completion": "Thank you. " + row["chosen"]} for row in rows[:16]]
    (folder / "theirs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    (folder / "my_judge.py").write_text(
        "def polite(prompts, completions, **columns):\n    return [text.count('Thank') for text in completions]\n"
    )
    return folder


def test_no_command_of_the_readme_is_left_out():
    assert set(commands()) == {*SMALLER, "make quickstart", "make test"}


def test_the_readme_fits_on_two_screens_and_says_what_the_papers_page_says():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    found = [re.search(r"(\d+) papers, (\d+) claims.*?(\d+) held, (\d+) not held, (\d+) not decided", page, re.DOTALL)
             for page in (text, (ROOT / "docs" / "papers.md").read_text(encoding="utf-8"))]  # fmt: skip
    assert found[0].groups() == found[1].groups()


@pytest.mark.parametrize(
    ("word", "answer"),
    [("data inspect", "144"), ("show", "kl_coef:"), ("plan", "peak"), ("compare --prompts", "theirs beats mine")],
)
def test_commands_that_only_look(word, answer, desk, forked):
    line = next(line for line in commands() if line.startswith(f"ppo-vs-dpo {word}"))
    assert answer in typed(line, desk, *SMALLER[line], shell=False)


def test_the_ten_lines_end_in_a_saved_model(desk, monkeypatch):
    """The README's Python, less the updates."""
    monkeypatch.chdir(desk)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(block.replace("max_steps=20", "max_steps=1, report_to='none'"), {})
    AutoModelForCausalLM.from_pretrained("my_policy")
    AutoTokenizer.from_pretrained("my_policy")


@pytest.mark.parametrize("page", ["README.md", "docs/ppo.md"])
def test_example_prompts_are_words_that_the_quickstart_s_model_knows(page):
    """They are tried on it first: what it cannot read would be sampled from <unk>."""
    text = (ROOT / page).read_text(encoding="utf-8")
    tokenizer = build_tokenizer()
    (prompts,) = re.findall(r'from_dict\(\s*\{"prompt": (\[.*?\])\}\s*\)', text)
    for prompt in json.loads(prompts):
        assert tokenizer.unk_token_id not in tokenizer(prompt)["input_ids"], prompt


def test_no_two_pages_write_into_one_folder():
    """Whoever tries one example after the other would go on with the first one's checkpoints."""
    used = []
    for page in (ROOT / "README.md", *PAGES):
        blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        used += {*re.findall(r'output_dir="(.*?)"', "\n".join(blocks))}
    assert len(used) >= 3
    assert len(used) == len({*used}), used


@pytest.mark.slow
def test_commands_that_train(desk):
    said = {line: typed(line, desk, *SMALLER[line]) for line in commands() if line in SMALLER}
    for name, word in (("try", " try "), ("two", "name=two")):
        assert f"runs/{name}/compare/report.html" in next(text for line, text in said.items() if word in line)
    for seed in (1, 2, 3):
        report = json.loads((desk / f"runs/quickstart-seed{seed}" / "compare" / "report.json").read_text())
        assert {"ppo", "dpo", "sft"} <= set(report["policies"])
    pooled = next(text for line, text in said.items() if line.startswith("ppo-vs-dpo compare runs"))
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


# ---------------------------------------------------------------------------------------------- the pages in docs/

PAGES = sorted((ROOT / "docs").glob("*.md"))


def lines_of(page: Path) -> list[str]:
    """The command lines in a page's code blocks and tables, continued lines joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL) + re.findall(r"^ {4}(ppo-vs-dpo .*)$", text, re.M)
    quoted = re.findall(r"`(ppo-vs-dpo [^`]+)`", text)
    found = [line.split("   #")[0].split("  (")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in [*found, *quoted] if line.startswith("ppo-vs-dpo ")]


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_every_command_of_the_docs_is_understood(page, monkeypatch):
    """Runs are composed, with every key and value checked; other commands are known words."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("ppo_vs_dpo.pipeline.composing.words.TRACKERS", {})  # W&B need not be here
    for line in lines_of(page):
        if "..." in line or "[key=value" in line or "NAME" in line or "RUN" in line:
            continue  # a form, not a command
        if "my_configs" in line:
            continue  # a folder of the reader's
        first, *rest = shlex.split(line.split(" #")[0])[1:]
        if first.startswith("--") or (first in COMMANDS and first not in ("show", "check", "list")):
            assert first in (*COMMANDS, "--help", "--version"), line
            continue
        words = rest if first in ("show", "check", "run", "-m") else [first, *rest]
        if not words or first == "list":
            continue
        overrides = with_experiment(with_config_dir([w for w in words if not w.startswith(("hydra", "--accept"))]))
        load(
            [one.split(",")[0] if first == "-m" and "[" not in one else one for one in overrides], check_missing=False
        )


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_every_link_of_the_docs_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"
