"""docs/architecture.md names what is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_every_path_exists():
    paths = {path for path in re.findall(r"`([\w./]+)`", PAGE) if "/" in path}
    assert len(paths) > 40
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_the_table_names_ten_changes_and_the_test_of_each():
    rows = [line for line in PAGE.split("## To change ...")[1].splitlines() if line.startswith("| a")]
    assert len(rows) >= 10
    for row in rows:
        tests = re.findall(r"`(tests/[\w./]+\.py)`", row.split("|")[3])
        assert tests, row
        assert all("def test_" in (ROOT / test).read_text(encoding="utf-8") for test in tests)


ROOMS = ("artifacts", "models", "preferences", "reward_model", "sft", "dpo", "ppo", "compare", "papers", "pipeline")


@pytest.mark.parametrize("room", ROOMS)
def test_every_folder_says_in_a_line_what_it_is_and_holds_at_most_nine_things(room):
    for init in (ROOT / room).rglob("__init__.py"):
        said = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8")))
        assert said, init
        inside = [path for path in init.parent.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
        assert len([path for path in inside if not path.name.startswith("__")]) <= 9, init.parent
