"""Finished work is never lost: moved aside in one step, found again, and vouched for file by file."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from ppo_vs_dpo.artifacts.files import read_marker, write_json
from ppo_vs_dpo.artifacts.guards import outputs, replaced
from ppo_vs_dpo.artifacts.guards.fingerprints import Made
from ppo_vs_dpo.artifacts.run import RunFolder


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    return RunFolder(tmp_path)


def work(run, fingerprint, text, finish=True, name="ppo"):
    """One attempt at a stage."""
    aside = run.begin(name, Made(fingerprint, {"the settings of ppo": fingerprint}))
    folder = run.stage_dir(name)
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "weights").write_text(text)
    (folder / "checkpoints" / "checkpoint-1").mkdir(parents=True, exist_ok=True)
    if finish:
        run.finish(name, fingerprint, 1.0, {"text": text})
    return aside


def test_other_settings_move_the_result_aside_and_the_earlier_ones_find_it(run):
    assert work(run, "a", "one") is None
    aside = work(run, "b", "two")
    assert aside == run.root / ".replaced" / "ppo-1"
    assert (aside / "model" / "weights").read_text() == "one"
    assert run.done("ppo")["figures"] == {"text": "two"}
    kept = replaced.find(run.root, "ppo", "a")
    assert kept == aside
    second = replaced.bring_back(run.root, "ppo", kept, run.stage_dir("ppo"))
    assert run.done("ppo")["figures"] == {"text": "one"}
    assert replaced.find(run.root, "ppo", "b") == second
    assert replaced.find(run.root, "pp", "b") is None


def test_the_newest_finished_result_is_found_before_an_interrupted_one(run):
    for text, finish in (("one", True), ("two", True), ("three", False)):
        work(run, "a", text, finish)
        work(run, "b", "other")
    found = replaced.find(run.root, "ppo", "a")
    assert (found / "model" / "weights").read_text() == "two"


def test_what_took_no_work_is_deleted_and_a_killed_deletion_is_finished(run):
    run.begin("ppo", Made("a", {}))
    assert run.begin("ppo", Made("b", {})) is None
    assert not (run.root / ".replaced").exists()
    left = run.root / ".replaced" / f"{replaced.GOING}-1"
    left.mkdir(parents=True)
    replaced.sweep_up(run.root)
    assert not left.parent.exists()


def test_what_a_killed_process_was_writing_is_removed(run):
    work(run, "a", "one")
    kept = sorted(path for path in run.root.rglob("*"))
    for name in ("ppo/.progress.json.77.tmp", "cache/.checked.json.77.tmp"):
        run.path(name).parent.mkdir(exist_ok=True)
        run.path(name).write_text("{")
    for name in ("ppo/.model.77.tmp", "ppo/.model.77.old.tmp"):
        run.path(name).mkdir()
        (run.path(name) / "weights").write_text("half")
    replaced.sweep_up(run.root)
    assert sorted(path for path in run.root.rglob("*") if path.name != "cache") == kept


def test_moving_aside_is_one_step(run, monkeypatch):
    """A kill at any moment leaves the old folder whole, in its place or aside: nothing is deleted in it."""
    work(run, "a", "one")
    before = sorted(path.name for path in run.stage_dir("ppo").rglob("*"))
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: pytest.fail("a folder with work in it was deleted"))
    aside = run.clear("ppo")
    assert sorted(path.name for path in aside.rglob("*")) == before
    assert not run.stage_dir("ppo").exists()


def test_points_of_a_sweep_are_kept_apart(run):
    work(run, "a", "one", name="ppo,kl_coef=0.0")
    aside = work(run, "b", "two", name="ppo,kl_coef=0.0")
    assert aside.name == "ppo,kl_coef=0.0-1"
    assert replaced.find(run.root, "ppo", "a") is None
    assert replaced.find(run.root, "ppo,kl_coef=0.0", "a") == aside


SPOIL = {
    "deleted": lambda path: path.unlink(),
    "cut": lambda path: path.write_text(path.read_text()[:-1]),
    "a folder in its place": lambda path: (path.unlink(), path.mkdir()),
    "its folder is gone": lambda path: shutil.rmtree(path.parent),
}


@pytest.mark.parametrize("how", SPOIL)
def test_a_stage_whose_outputs_are_not_whole_is_not_done(run, how):
    work(run, "a", "weights")
    assert run.done("ppo") is not None
    SPOIL[how](run.stage_dir("ppo") / "model" / "weights")
    assert run.done("ppo") is None
    assert "model/weights" in run.damage("ppo")[0]


def test_a_changed_byte_is_seen_by_its_hash(run):
    work(run, "a", "weights")
    path = run.stage_dir("ppo") / "model" / "weights"
    path.write_text("weighty")
    assert run.done("ppo") is not None
    assert run.damage("ppo", hashes=True) == ["model/weights was changed after it was written"]


def test_what_others_keep_in_a_stage_s_folder_is_not_vouched_for(run):
    work(run, "a", "weights")
    folder = run.stage_dir("ppo")
    for name in ("log.txt", "progress.json", "pushed.json", "tensorboard/events", "checkpoints/checkpoint-1/state"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    assert set(outputs.list_outputs(folder)) == {"model/weights"}


def test_equal_results_have_one_identity(run):
    work(run, "a", "weights")
    first = outputs.content_id(run.done("ppo"), "model/")
    work(run, "b", "weights")
    assert outputs.content_id(run.done("ppo"), "model/") == first
    work(run, "c", "others")
    assert outputs.content_id(run.done("ppo"), "model/") != first


@pytest.mark.parametrize(
    "spoilt",
    [b"", b"[]", b"3", b"{", b"\xff\xfe\x00", b"null", b"{}", b'{"figures": "none"}'],
)
@pytest.mark.parametrize("name", ["done.json", "started.json"])
def test_an_unreadable_marker_means_not_done_is_set_aside_and_said(run, name, spoilt, capsys):
    work(run, "a", "weights")
    path = run.stage_dir("ppo") / name
    path.write_bytes(spoilt)
    if name == "done.json":
        assert run.done("ppo") is None
        assert "cannot be read" in capsys.readouterr().err
        assert path.with_name("done.json.unreadable").read_bytes() == spoilt
    # The same stage can begin again, whatever the markers were.
    assert run.begin("ppo", Made("a", {})) is None
    assert json.loads((run.stage_dir("ppo") / "started.json").read_text())["fingerprint"] == "a"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE])
def test_a_disk_that_does_not_answer_costs_no_finished_work(run, monkeypatch, number):
    work(run, "a", "weights")
    before = sorted(run.root.rglob("*"))
    with monkeypatch.context() as patch:

        def fail(path, *args, **kwargs):
            raise OSError(number, "no answer", str(path))

        patch.setattr(Path, "read_text", fail)
        for look in (lambda: run.done("ppo"), lambda: run.begin("ppo", Made("a", {}))):
            with pytest.raises(OSError, match="no answer"):
                look()
        # Where it is a matter of looks only, nothing is known, and nothing is raised.
        assert read_marker(run.stage_dir("ppo") / "done.json") is None
    assert sorted(run.root.rglob("*")) == before
    assert run.done("ppo") is not None


def test_a_folder_in_a_marker_s_place_is_set_aside(run):
    work(run, "a", "weights")
    path = run.stage_dir("ppo") / "done.json"
    path.unlink()
    path.mkdir()
    assert run.done("ppo") is None
    assert not path.exists()


def test_a_marker_s_list_may_be_spoilt_too(run):
    work(run, "a", "weights")
    path = run.stage_dir("ppo") / "done.json"
    for spoilt in ([], {"model/weights": 3}, {"model/weights": {"bytes": "many"}}):
        write_json(path, {**json.loads(path.read_text()), "outputs": spoilt})
        assert run.done("ppo") is None
    assert read_marker(path) is not None


def test_every_version_that_worked_on_a_stage_is_named(run, monkeypatch):
    work(run, "a", "one", finish=False)
    monkeypatch.setattr("ppo_vs_dpo.artifacts.run.made_by", lambda: {"source": "newer"})
    run.begin("ppo", Made("a", {}))
    made = read_marker(run.stage_dir("ppo") / "started.json")["made_by"]
    assert [one["source"] for one in made][1:] == ["newer"]
    assert len(made) == 2
    os.utime(run.stage_dir("ppo"))
