"""What the package says to a terminal holds no control characters of what it read."""

import ast
import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from ppo_vs_dpo.artifacts import errors

ROOT = Path(__file__).parents[2]
ROOMS = ["artifacts", "models", "preferences", "sft", "reward_model", "ppo", "dpo", "compare", "papers", "pipeline"]
# Clears the screen, sets the window's title, rings; as 8-bit control characters; turns the line around.
EVIL = "\x1b[2J\x1b]0;owned\x07 \x9b31m \u202eleft\r\x08"


def assert_harmless(text):
    assert not [c for c in text if not (c.isprintable() or c in "\n\t")], repr(text)


def test_texts_are_said_with_their_control_characters_as_escapes(capsys):
    errors.say(f"one{EVIL}\n")
    errors.warn(f"two{EVIL}\n")
    out, err = capsys.readouterr()
    assert_harmless(out + err)
    assert out == "one\\x1b[2J\\x1b]0;owned\\x07 \\x9b31m \\u202eleft\\r\\x08\n"
    assert errors.printable("Grüße, 世界\n\t1") == "Grüße, 世界\n\t1"


def test_a_console_s_texts_titles_and_cells(capsys):
    out = io.StringIO()
    console = errors.terminal(file=out, width=200)
    table = Table(f"head{EVIL}", title=f"title{EVIL}", caption=f"caption{EVIL}")
    table.add_row(f"cell{EVIL}")
    console.print(table)
    console.print(f"plain{EVIL}")
    console.print(f"[bold]{EVIL}[/]", markup=False)
    assert_harmless(out.getvalue())
    assert out.getvalue().count("owned") == 6


def calls(path):
    """Names of what a file calls, as they are written."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


@pytest.mark.parametrize("room", ROOMS)
def test_all_of_the_package_speaks_through_them(room):
    own = ("print", "sys.stdout.write", "sys.stderr.write", "traceback.print_exc", "Console", "rich.print")
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / room).rglob("*.py")
        if path != ROOT / "artifacts" / "errors.py"
        for name in calls(path)
        if name in own
    ]
    assert found == []


def test_the_overview_and_the_verdict(tmp_path, capsys):
    """Names, what a stage says of its progress, its warnings and the report's sentences come from files."""
    from omegaconf import OmegaConf

    from ppo_vs_dpo.artifacts.files import write_json
    from ppo_vs_dpo.artifacts.run import RunFolder
    from ppo_vs_dpo.pipeline.running import command as running
    from ppo_vs_dpo.pipeline.running.graph import Job
    from ppo_vs_dpo.pipeline.running.overview import Overview

    config = OmegaConf.create({"launch": {"workers": 1, "expected_seconds": {}}})
    folder = RunFolder(tmp_path / f"[red]{EVIL}", config)
    name = f"[b]dpo{EVIL}"
    job = Job(name, "dpo", state="todo")
    live, plain = io.StringIO(), io.StringIO()
    for out, terminal in ((live, True), (plain, False)):
        console = Console(file=out, width=300, force_terminal=terminal, color_system=None)
        overview = Overview(folder, [job], console)
        write_json(folder.stage_dir(name) / "progress.json", {"done": 1, "total": 2, "note": f"[i]drawing{EVIL}"})
        overview.started(job)
        console.print(overview.table())
        folder.finish(name, "f", 1.0, {"warnings": [f"[u]careful{EVIL}"]})
        overview.finished(job)
        (folder.stage_dir(name) / "done.json").unlink()
    for text in (live.getvalue(), plain.getvalue()):
        assert_harmless(text)
        assert "[i]drawing" in text
        assert "[u]careful" in text
        assert "[b]dpo" in text
    write_json(folder.path("compare", "report.json"), {"verdict": [f"DPO wins{EVIL}"]})
    folder.path("compare", "report.html").write_text("x")
    folder.finish("compare", "f", 1.0, {})
    running.say_verdict(folder)
    said = capsys.readouterr().out
    assert "DPO wins" in said
    assert_harmless(said)


def test_a_line_above_the_live_table_takes_no_colour_from_it(tmp_path):
    """A line that is printed without markup redraws the table beside it the same way: its states are no markup."""
    from omegaconf import OmegaConf

    from ppo_vs_dpo.artifacts.run import RunFolder
    from ppo_vs_dpo.pipeline.running.graph import Job
    from ppo_vs_dpo.pipeline.running.overview import Overview

    folder = RunFolder(tmp_path, OmegaConf.create({"launch": {"workers": 1, "expected_seconds": {}}}))
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True, color_system=None)
    with Overview(folder, [Job("sft", "sft", state="done"), Job("dpo", "dpo", state="todo")], console) as overview:
        overview.started(overview.jobs[1])
        overview.say("[u]careful")
        assert "so far, about" in out.getvalue()
        folder.finish("dpo", "f", 1.0, {})
        overview.finished(overview.jobs[1])
    assert "in all" in out.getvalue().rpartition("so far")[2]
    assert "[u]careful" in out.getvalue()
    assert "done" in out.getvalue()
    assert "[green]" not in out.getvalue()
    assert "[cyan]" not in out.getvalue()


def test_the_report_s_plain_page():
    from ppo_vs_dpo.compare.report.pages import render_markdown
    from tests.compare.report.test_browser import small_report

    report = small_report(["sft", "dpo", "ppo"], ["gold"])
    report["verdict"] = [f"DPO wins{EVIL}"]
    said = render_markdown(report)
    assert "DPO wins\\x1b" in said
    assert_harmless(said)
