"""Of several checkpoints the newest is taken that is whole and of these settings; the others are named."""

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.guards import checkpoints as guard
from ppo_vs_dpo.models.resuming import readable


@pytest.fixture
def three(tmp_path):
    for step in (1, 2, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"):
            (folder / name).write_text(json.dumps({"step": step}))
        guard.stamp(folder, "settings")
    return tmp_path


SPOIL = {
    "optimizer.pt is gone": lambda folder: (folder / "optimizer.pt").unlink(),
    "rng_state.pth is gone": lambda folder: ((folder / "rng_state.pth").unlink(), (folder / "rng_state.pth").mkdir()),
    "optimizer.pt has 1 bytes and was written with": lambda folder: (folder / "optimizer.pt").write_text("x"),
    "was changed after": lambda folder: (folder / "rng_state.pth").write_text('{"step": 11}'),
    "gone or cannot be read": lambda folder: (folder / guard.STAMP).write_text("[]"),
    "made with other settings": lambda folder: guard.stamp(folder, "others"),
    "holds the model alone": lambda folder: guard.stamp(folder, "settings", resumable=False),
    "its list of files cannot be read": lambda folder: (folder / guard.STAMP).write_text(
        json.dumps({"fingerprint": "settings", "files": {"optimizer.pt": 3}})
    ),
}


def test_the_newest_by_number(three):
    assert guard.newest_whole(three, "settings").name == "checkpoint-10"
    assert guard.newest_whole(three / "nowhere", "settings") is None


@pytest.mark.parametrize("why", SPOIL)
def test_one_that_is_not_fit_is_named_and_the_one_before_taken(three, why, capsys):
    SPOIL[why](three / "checkpoint-10")
    assert guard.newest_whole(three, "settings").name == "checkpoint-2"
    assert why in capsys.readouterr().err
    assert [path.name for path in guard.numbered(three)] == ["checkpoint-2", "checkpoint-1"]
    # Nothing was deleted, and it is not said twice.
    assert (three / "unfit-1-checkpoint-10").is_dir()
    guard.newest_whole(three, "settings")
    assert capsys.readouterr().err == ""


def test_one_that_cannot_be_read_just_now_stays(three, monkeypatch):
    """A disk that does not answer says nothing of a checkpoint."""

    def fail(path, *args, **kwargs):
        raise OSError(errno.ESTALE, "stale file handle", str(path))

    monkeypatch.setattr(Path, "read_text", fail)
    with pytest.raises(OSError, match="stale"):
        guard.newest_whole(three, "settings")
    assert [path.name for path in guard.numbered(three)] == ["checkpoint-10", "checkpoint-2", "checkpoint-1"]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), OSError(errno.EIO, "no answer"), RuntimeError("torn")]
)
def test_memory_that_is_full_while_a_checkpoint_loads_is_not_its_fault(three, error):
    def load_checkpoint():
        raise error

    newest, context = three / "checkpoint-10", SimpleNamespace(is_main_process=True)
    mine = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
    with pytest.raises(UserError if mine else type(error)), readable(newest, context, lambda: False):
        load_checkpoint()
    assert newest.is_dir() != mine


def test_one_that_was_never_finished_is_deleted(three, capsys):
    (three / "checkpoint-10" / guard.STAMP).unlink()
    left = three / f"{guard.UNFINISHED}checkpoint-7"  # killed between renaming and deleting
    left.mkdir()
    assert guard.newest_whole(three, "settings").name == "checkpoint-2"
    assert "checkpoint-10 was not written to its end; it is deleted" in capsys.readouterr().err
    assert sorted(path.name for path in three.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_without_its_best_one_a_checkpoint_is_not_fit(three):
    state = three / "checkpoint-10" / "trainer_state.json"
    state.write_text(json.dumps({"best_global_step": 1}))
    guard.stamp(three / "checkpoint-10", "settings")
    assert guard.newest_whole(three, "settings").name == "checkpoint-10"
    (three / "checkpoint-1" / "optimizer.pt").unlink()
    assert guard.newest_whole(three, "settings").name == "checkpoint-2"


def test_other_settings_find_none(three):
    assert guard.newest_whole(three, "others") is None
