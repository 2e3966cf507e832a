"""Every example of docs/data.md: the sources' rows through the commands below them; the settings it names exist."""

import json
import re
import shlex
import subprocess

import pytest

from ppo_vs_dpo.artifacts.files import read_parquet
from ppo_vs_dpo.preferences.config import SOURCES
from ppo_vs_dpo.preferences.reading.inspect import arguments, inspect, main
from ppo_vs_dpo.preferences.reading.mappings import MAPPINGS
from ppo_vs_dpo.preferences.reading.validation import PROBLEMS
from ppo_vs_dpo.preferences.recipes.iterative_dpo import program
from ppo_vs_dpo.preferences.schema import text_of
from tests.preferences.conftest import ROOT

TEXT = (ROOT / "docs" / "data.md").read_text()
FILES = dict(re.findall(r"```json (\S+)\n(.*?)```", TEXT, re.DOTALL))
FORMATS = dict(re.findall(r"```jsonl (\S+)\n(.*?)```", TEXT, re.DOTALL))
WHOLE = TEXT.replace("\\\n", " ")
# Commands that only read: those of the sources that `data inspect` cannot show.
RUNS = re.findall(r"^    ppo-vs-dpo (.*'stages=\[data\]'.*?)(?: {2,}#.*)?$", WHOLE, re.MULTILINE)
COMMANDS = re.findall(r"^    ppo-vs-dpo data inspect (\S+\.json.*?)(?: {2,}#.*)?$", TEXT, re.MULTILINE)


@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.startswith("pairs.jsonl")])
def test_every_source_has_an_example_that_runs(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    assert main(shlex.split(command)) == 0
    said = capsys.readouterr().out
    assert "1 rows, 1 usable pairs" in said
    assert "No problems found." in said
    # In every example the animal is better than the car.
    assert re.search(r"chosen: .*(animal|spits)", said)


@pytest.mark.parametrize("command", RUNS)
def test_a_source_that_makes_its_pairs_has_one_too(command, tmp_path, byte_model, forked):
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    arguments = shlex.split(command.replace("MODEL", str(byte_model)))
    done = subprocess.run([program(), *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    name = next(item.removeprefix("name=") for item in arguments if item.startswith("name="))
    folder = tmp_path / "runs" / name
    prompts = read_parquet(folder / "data" / "prompts_train.parquet", ["prompt"])["prompt"][:]
    assert prompts
    if name == "inline":
        chosen = read_parquet(folder / "data" / "pairs_train.parquet")["chosen"][:]
        assert chosen == [[{"role": "assistant", "content": "An animal."}]]
    if name == "imdb":
        texts = [json.loads(line)["text"].replace("<br />", " ") for line in FILES["imdb.jsonl"].splitlines()]
        assert any(" ".join(text.split()).startswith(prompts[0]) for text in texts)
        assert 2 <= len(prompts[0].split()) <= 8


def test_there_is_one_for_each_source():
    named = [shlex.split(command)[0] for command in COMMANDS]
    assert set(named) == {*FILES, "pairs.jsonl"} - {"imdb.jsonl"}
    assert len(FILES) == 9
    assert [re.search(r"name=(\w+)", command)[1] for command in RUNS] == ["inline", "imdb", "world"]


@pytest.mark.parametrize("name", FORMATS)
def test_the_page_shows_every_format(name, tmp_path):
    """Each example is found by its columns (but the one that is only read when named), and the animal wins."""
    path = tmp_path / "example.jsonl"
    path.write_text(FORMATS[name])
    named = ["--format", name] if name == "implicit" else []
    report, first = inspect(arguments([str(path), *named]), lambda rows: None)
    assert (report.format, report.pairs, report.problems) == (name, 1, {})
    assert "animal" in text_of(first["chosen"])
    assert "car" in text_of(first["rejected"])


def test_no_format_is_missing_on_the_page():
    assert {*FORMATS, "pairs", "hh", "tldr", "ultrafeedback", "shp", "safe_rlhf", "alpaca_eval"} == set(MAPPINGS)


def test_the_settings_that_the_page_names_exist():
    known = {name for cls in SOURCES.values() for name in cls.__dataclass_fields__}
    named = set(re.findall(r"data\.(\w+)(?=[=.`])", TEXT)) - {"md", "path", "py"}
    assert named <= known, named - known


def test_every_problem_is_in_the_table():
    assert all(f"`{kind}`" in TEXT for kind in PROBLEMS)
