"""The frame around a stage: settings, points, done.json, exit codes."""

import contextlib
import gc
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass

import pytest
from omegaconf import MISSING, OmegaConf

from ppo_vs_dpo.artifacts import resources
from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import write_json
from ppo_vs_dpo.artifacts.run import RunFolder, point_name
from ppo_vs_dpo.artifacts.settings import split
from ppo_vs_dpo.artifacts.stage import StageContext, begin, parse_point
from ppo_vs_dpo.pipeline.composing.compose import load


@dataclass
class Own:
    size: int = 3
    needed: str = MISSING


@dataclass
class Arguments:
    learning_rate: float = 0.1
    seed: int = 0


def test_split_gives_each_its_own():
    own, passed = split({"size": 4, "needed": "x", "learning_rate": 0.5}, Own, Arguments, "sft")
    assert own == Own(4, "x")
    assert passed == {"learning_rate": 0.5}


def test_split_says_everything_that_is_wrong_at_once():
    with pytest.raises(UserError) as error:
        split({"sise": 4, "learning_rat": 0.5, "seed": 1}, Own, Arguments, "sft")
    text = str(error.value)
    assert "sft.sise: no such key. Did you mean size?" in text
    assert "sft.learning_rat: no such key. Did you mean learning_rate?" in text
    assert "sft.seed: set by the stage itself" in text
    assert "sft.needed: required" in text
    with pytest.raises(UserError, match=r"sft.size.*'many'"):
        split({"size": "many", "needed": "x"}, Own, Arguments, "sft")


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 5\nppo:\n  kl_coef: 0.1\n  sweep:\n    kl_coef: [0.0]\n")
    return tmp_path


def test_context_applies_a_point(run):
    context = StageContext(RunFolder(run), "ppo", {"kl_coef": 0.0})
    assert context.config == {"kl_coef": 0.0}
    assert context.seed == 5
    assert context.dir == run / "sweep" / "ppo,kl_coef=0.0"
    with pytest.raises(UserError, match="beta"):
        StageContext(RunFolder(run), "ppo", {"beta": 1})


def test_a_point_that_no_sweep_has_is_trained_and_said(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(load(["experiment=quickstart"])))
    for coefficient, said in ((9.0, True), (0.0, False)):
        with contextlib.ExitStack() as held:
            begin(StageContext(RunFolder(tmp_path), "ppo", {"kl_coef": coefficient}), held)
        assert ("ppo.sweep has no such point" in capsys.readouterr().err) == said


def test_points_of_an_earlier_sweep_are_none_of_this_one(run):
    """They may be of other settings: a report would show them as this run's."""
    done = {"stage": "ppo", "fingerprint": "f", "finished": "-", "seconds": 1.0, "figures": {}}
    for coefficient in (0.0, 9.0):
        write_json(run / "sweep" / f"ppo,kl_coef={coefficient}" / "done.json", done)
    assert RunFolder(run).points("ppo") == ["ppo,kl_coef=0.0"]
    (run / "config.yaml").write_text("seed: 5\nppo:\n  kl_coef: 0.1\n  sweep: null\n")
    assert RunFolder(run).points("ppo") == []
    (run / "config.yaml").write_text("seed: 5\n")  # made by nobody's sweep: all there is
    assert RunFolder(run).points("ppo") == ["ppo,kl_coef=0.0", "ppo,kl_coef=9.0"]


def test_points_read_back_as_written():
    assert parse_point("kl_coef=0.0,n=3,name=x") == {"kl_coef": 0.0, "n": 3, "name": "x"}
    assert point_name("ppo", {"b": 1, "a": 0.5}) == "ppo,a=0.5,b=1"
    assert point_name("ppo", {}) == "ppo"
    for point in ({"score_clip": None, "lam": 1e-05}, {"loss_type": ["ipo"]}, {"whiten_rewards": True, "mode": "x"}):
        assert parse_point(point_name("ppo", point).partition(",")[2]) == point


STAGE = """
    import errno
    from ppo_vs_dpo.artifacts.errors import UserError
    from ppo_vs_dpo.artifacts.stage import stage_main

    def run_stage(context):
        what = context.config["do"]
        if what == "user":
            raise UserError("the pairs file has no column chosen")
        if what == "interrupt":
            raise KeyboardInterrupt
        if what == "disk":
            raise OSError(errno.ENOSPC, "No space left on device", "weights")
        if what == "defect":
            raise RuntimeError("a defect")
        context.finish(accuracy=0.75)

    stage_main("toy", run_stage)
"""


@pytest.mark.parametrize(
    ("what", "code", "words"),
    [
        ("finish", 0, ""),
        ("user", 2, "error in stage toy: the pairs file has no column chosen"),
        ("interrupt", 130, "goes on from its last checkpoint"),
        ("disk", 2, "the disk is full"),
        ("defect", 1, "RuntimeError: a defect"),
    ],
)
def test_exit_codes_and_words(tmp_path, what, code, words):
    (tmp_path / "config.yaml").write_text(f"toy:\n  do: {what}\n")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STAGE), str(tmp_path), "--fingerprint", "abc"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert words in done.stderr
    assert ("Traceback" in done.stderr) == (what == "defect")
    assert (tmp_path / "toy" / "done.json").exists() == (what == "finish")
    if what == "finish":
        written = json.loads((tmp_path / "toy" / "done.json").read_text())
        assert written["figures"] == {"accuracy": 0.75}
        assert written["fingerprint"] == "abc"


def test_a_folder_without_a_configuration_is_not_a_run(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        RunFolder(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match=r"stage sft of .* has not finished"):
        RunFolder(tmp_path).require("sft")


def test_seconds_belong_to_the_inner_part_and_to_the_main_thread(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(resources.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(resources, "_spent", {})

    def work(seconds):
        now[0] += seconds

    @resources.part("sampling")
    def sample():
        work(3.0)

    @resources.part("saving")
    def save():
        work(0.25)
        raise ValueError("full")

    with resources.part("training"):
        work(1.0)
        sample()
        work(0.5)
        with pytest.raises(ValueError, match="full"):
            save()
    elsewhere = threading.Thread(target=sample)
    elsewhere.start()
    elsewhere.join()
    assert resources.seconds_by_part() == {"training": 1.5, "sampling": 3.0, "saving": 0.25}


def test_no_garbage_is_looked_for_while_libraries_load(monkeypatch):
    frozen = gc.get_freeze_count()
    with resources.libraries():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen  # nothing was loaded
    with resources.libraries():
        monkeypatch.setitem(sys.modules, "a_new_library", sys)
    assert gc.get_freeze_count() > frozen
    gc.disable()
    try:
        with resources.libraries():
            pass
        assert not gc.isenabled()  # as it was
    finally:
        gc.enable()


def test_cost_is_counted_apart_from_the_figures(run):
    context = StageContext(RunFolder(run), "ppo")
    context.count(flops=10.0)
    context.count(flops=5.0, tokens_generated=3)
    context.finish(updates=2)
    done = RunFolder(run).done("ppo")
    assert done["figures"] == {"updates": 2}
    assert done["cost"]["flops"] == 15.0
    assert done["cost"]["tokens_generated"] == 3
    assert done["cost"]["peak_memory_mb"] > 5


def test_time_of_an_interrupted_attempt_counts(run, monkeypatch):
    monkeypatch.setattr("ppo_vs_dpo.artifacts.stage.SPENT_EVERY", -1.0)
    first = StageContext(RunFolder(run), "ppo")
    first._started -= 100
    first.progress(1, 2)  # killed after this
    second = StageContext(RunFolder(run), "ppo")
    assert second.seconds >= 100
    second.finish()
    assert RunFolder(run).done("ppo")["seconds"] >= 100
    # Run again after its end: a new account.
    assert StageContext(RunFolder(run), "ppo").seconds < 50


def toy(folder, what, ago=None):
    """The stage above, which its command started ``ago`` seconds before."""
    (folder / "config.yaml").write_text(f"toy:\n  do: {what}\n")
    environment = {**os.environ, **({resources.BEGAN: str(time.monotonic() - ago)} if ago else {})}
    words = [sys.executable, "-c", textwrap.dedent(STAGE), str(folder), "--fingerprint", "abc"]
    return subprocess.run(words, capture_output=True, text=True, check=False, env=environment)


def test_a_stage_s_seconds_are_its_process_s_from_its_start_on(tmp_path, monkeypatch):
    """Start-up and imports come before a stage's first line, and its launcher's before that."""
    monkeypatch.delenv(resources.BEGAN, raising=False)
    monkeypatch.setattr(resources, "age", lambda: 3.0)
    assert resources.lived() == 3.0  # started by hand
    monkeypatch.setenv(resources.BEGAN, str(time.monotonic() - 7))
    assert resources.lived() == pytest.approx(7, abs=0.1)
    monkeypatch.setenv(resources.BEGAN, "soon")
    assert resources.lived() == 3.0
    assert toy(tmp_path, "finish", ago=50).returncode == 0
    done = RunFolder(tmp_path).done("toy")
    assert 50 <= done["seconds"] < 60
    assert sum(done["cost"]["times"].values()) == pytest.approx(done["seconds"], abs=0.1)


@pytest.mark.parametrize(("how", "code"), [("interrupt", 130), ("user", 2)])
def test_what_an_attempt_took_that_ended_early_is_noted(tmp_path, how, code):
    """Of both clocks, also where it made no progress."""
    assert toy(tmp_path, how, ago=50).returncode == code
    spent = json.loads((tmp_path / "toy" / "spent.json").read_text())
    assert 50 <= spent["seconds"] < 60
    assert spent["cpu_seconds"] > 0
    (tmp_path / "toy" / "spent.json").write_text(json.dumps({**spent, "cpu_seconds": 20}))
    assert toy(tmp_path, "finish", ago=5).returncode == 0
    done = RunFolder(tmp_path).done("toy")
    assert 55 <= done["seconds"] < 65
    assert 20 < done["cost"]["cpu_seconds"] < 25
    assert not (tmp_path / "toy" / "spent.json").exists()


def test_a_run_of_another_age_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "config.yaml").write_text("name: old\n")
    write_json(tmp_path / "manifest.json", {"versions": {"ppo-vs-dpo": "0.1.0"}})
    with pytest.raises(UserError, match=r"made by ppo-vs-dpo 0\.1\.0.*cannot go on with it.*name="):
        RunFolder(tmp_path)
    write_json(tmp_path / "manifest.json", {"versions": {"ppo-vs-dpo": "0.2.0"}})
    assert RunFolder(tmp_path).config.name == "old"
