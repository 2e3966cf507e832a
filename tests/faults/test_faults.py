"""The campaign of faults in its short form: the same program, fewer cases (`make faults` for all)."""

import random
import signal
import subprocess
import sys

import pytest

from tests.faults import disks, kills, small, spoilt, wrong_settings
from tests.faults.__main__ import BEGIN, END, main, table


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all parts find the undisturbed run."""
    return tmp_path_factory.mktemp("faults")


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "some"), [(1, 12), (2, 6)])
def test_killed_again_and_again(folder, ranks, some):
    seen = kills.campaign(folder, seed=1, kills=some, ranks=ranks)
    assert seen["kills"] >= some
    assert {name: seen[name] for name in kills.BARS if seen[name]} == {}


@pytest.mark.slow
def test_spoilt_files_are_named_or_made_again(folder):
    found = spoilt.campaign(folder, only=spoilt.cases()[::8])
    assert {end: cases for end, cases in found.items() if cases and end not in ("mended", "named")} == {}
    assert len(found["mended"]) > 4


@pytest.mark.slow
@pytest.mark.skipif(not disks.possible(), reason="mounting a small disk needs root")
def test_full_disks_are_said(folder):
    assert [row for row in disks.campaign(folder, seed=1, number=3) if disks.bad(row)] == []


@pytest.mark.slow
def test_wrong_settings_are_refused_before_a_stage_starts():
    found = wrong_settings.campaign(some=4)
    assert found["taken"] == []
    assert len(found["refused"]) > 40


def test_what_was_seen_is_added_up_and_a_bar_that_is_not_met_is_said(tmp_path):
    kill = {
        "stage": "sft",
        "moment": "work",
        "mode": "rank KILL",
        "orphans": [],
        "hang": False,
        "unsaid": "",
        "took": 2,
    }
    row = {"episode": 0, "seed": 1, "ranks": 1, "stages": ["sft"], "kills": [kill, kill], "end": 0, "source": "s"}
    row |= {"lost": [], "leftovers": [], "orphans": [], "paid_twice": 0, "on_the_way": 1, "tracebacks": 0}
    kills.append_jsonl(tmp_path / "kills.jsonl", row)
    text, met = table(tmp_path)
    assert met
    assert "| 2 kills in 1 runs, ranks: 1 | 0 bits lost, 0 orphans" in text
    for name in kills.BARS:
        other = {**row, "kills": [{**kill, "orphans": ["a"], "hang": True, "unsaid": "what?"}]}
        other |= {"lost": ["sft/model"], "leftovers": ["x.tmp"], "paid_twice": 1, "tracebacks": 1}
        counted = kills.tally([other])[name]
        assert counted == 1 if isinstance(counted, int) else len(counted) == 1, name
    kills.append_jsonl(tmp_path / "kills.jsonl", other)
    text, met = table(tmp_path)
    assert not met
    assert "1 bits lost, 1 orphans" in text
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main(["--folder", str(tmp_path), "--table-only", "--write", str(page)]) == 1
    assert "1 bits lost" in page.read_text()
    assert "old" not in page.read_text()
    assert page.read_text().endswith(f"{END}\nafter\n")


def test_a_reply_is_paid_twice_where_it_had_come_before_the_kill():
    judge = small.Judge.__new__(small.Judge)
    judge.answers = [("a", 1.0), ("b", 9.8), ("c", 11.0), ("a", 20.0), ("b", 20.0), ("d", 20.0)]
    assert kills.paid_twice(judge, 0, [10.0]) == {"paid_twice": 1, "on_the_way": 1}
    assert kills.paid_twice(judge, 1, [10.0]) == {"paid_twice": 0, "on_the_way": 1}


def test_signals_reach_a_command_whoever_started_the_campaign():
    """Behind ``nohup make faults &`` Ctrl-C and SIGHUP are ignored, and kills by them would kill nothing."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    words = [sys.executable, "-c", "import signal; print(*map(signal.getsignal, (signal.SIGINT, signal.SIGHUP)))"]
    try:
        ended = subprocess.run(words, preexec_fn=small.as_typed, capture_output=True, text=True, check=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert "SIG_IGN" not in ended.stdout
    assert "default_int_handler" in ended.stdout


def test_every_mode_moment_and_way_is_one_that_there_is():
    assert len(spoilt.cases()) == len(set(spoilt.cases())) == 66
    assert {case.way for case in spoilt.cases()} == set(spoilt.WAYS)
    random_ = random.Random(0)
    assert {random_.choices(list(kills.MODES), kills.MODES.values())[0] for _ in range(500)} == set(kills.MODES)
