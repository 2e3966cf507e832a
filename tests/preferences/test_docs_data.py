"""Every example of docs/data.md: the sources' rows through the commands below them; the settings it names exist."""

import re
import shlex

import pytest

from preferences.config import SOURCES
from preferences.inspect import main
from preferences.validation import PROBLEMS
from tests.preferences.conftest import ROOT

TEXT = (ROOT / "docs" / "data.md").read_text()
FILES = dict(re.findall(r"```json (\S+)\n(.*?)```", TEXT, re.DOTALL))
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


def test_there_is_one_for_each_file():
    assert {shlex.split(command)[0] for command in COMMANDS} == {*FILES, "pairs.jsonl"}
    assert len(FILES) == 8


def test_the_settings_that_the_page_names_exist():
    known = {name for cls in SOURCES.values() for name in cls.__dataclass_fields__}
    named = set(re.findall(r"data\.(\w+)(?=[=.`])", TEXT)) - {"md", "path", "py"}
    assert named <= known, named - known


def test_every_problem_is_in_the_table():
    assert all(f"`{kind}`" in TEXT for kind in PROBLEMS)
