"""Files are whole or not there; broken ones are named."""

import gzip
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import (
    UMASK,
    append_jsonl,
    atomic_folder,
    fingerprint_file,
    read_json,
    read_jsonl,
    read_parquet,
    sha256_of,
    write_json,
    write_jsonl,
    write_parquet,
    write_text,
)


def test_json_round_trip_and_no_nan(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_json(path, {"x": float("nan"), "y": np.float32(0.5), "z": torch.tensor([1, 2]), "w": [float("inf"), 1]})
    assert read_json(path) == {"x": None, "y": 0.5, "z": [1, 2], "w": [None, 1]}
    assert [item.name for item in path.parent.iterdir()] == ["b.json"]


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"a": 1}])

    def rows():
        yield {"a": 2}
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError):
        write_jsonl(path, rows())
    assert read_jsonl(path) == [{"a": 1}]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_killed_writer_leaves_the_old_folder(tmp_path):
    write_text(tmp_path / "model" / "weights", "old")
    code = f"""
        import os, signal
        from ppo_vs_dpo.artifacts.files import atomic_folder
        with atomic_folder({str(tmp_path / "model")!r}) as folder:
            (folder / "weights").write_text("new")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "model" / "weights").read_text() == "old"
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("new")
    assert (tmp_path / "model" / "weights").read_text() == "new"


def test_jsonl_drops_a_torn_last_line_and_names_others(tmp_path):
    path = tmp_path / "log.jsonl"
    append_jsonl(path, {"a": 1})
    with path.open("a") as out:
        out.write('{"a": 2, "b"')
    assert read_jsonl(path) == [{"a": 1}]
    append_jsonl(path, {"a": 3})
    assert read_jsonl(path) == [{"a": 1}, {"a": 3}]
    path.write_text('{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(UserError, match="line 2: not valid JSON"):
        read_jsonl(path)
    # Torn inside a character, no object, a compressed file that is cut.
    path.write_bytes('{"a": "é"}\n{"a": "é'.encode()[:-1])
    assert read_jsonl(path) == [{"a": "é"}]
    path.write_text("[1]\n")
    with pytest.raises(UserError, match="line 1: not a JSON object"):
        read_jsonl(path)
    packed = tmp_path / "log.jsonl.gz"
    for torn in (gzip.compress(b'{"a": 1}\n' * 99)[:-9], b'{"a": 1}\n'):
        packed.write_bytes(torn)
        with pytest.raises(UserError, match="is not a whole gzip file"):
            read_jsonl(packed)


def test_parquet_round_trip_missing_truncated_and_columns(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = [
        {"prompt": [{"role": "user", "content": "hé"}], "n": 1},
        {"prompt": [{"role": "user", "content": "b"}], "n": 2},
    ]
    write_parquet(path, rows)
    assert read_parquet(path).to_list() == rows
    with pytest.raises(UserError, match=r"has no column chosen; it has prompt, n"):
        read_parquet(path, columns=["prompt", "chosen"])
    with pytest.raises(UserError, match="does not exist"):
        read_parquet(tmp_path / "none.parquet")
    whole = path.read_bytes()
    for torn in (whole[:-20], whole[:4] + bytes(200) + whole[204:], b"\xff" * 99, b""):
        path.write_bytes(torn)
        with pytest.raises(UserError, match="not a complete Parquet file"):
            read_parquet(path)


def test_broken_json_names_file_and_line(tmp_path):
    (tmp_path / "x.json").write_text('{\n "a": 1,\n oops\n}')
    with pytest.raises(UserError, match=r"x.json, line 3"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UserError, match=r"x.json: not UTF-8 text \(byte 7\)"):
        read_json(tmp_path / "x.json")


def test_hashes_depend_on_content_alone(tmp_path):
    assert sha256_of({"a": 1, "b": [2.5]}) == sha256_of({"b": [2.5], "a": 1})
    assert sha256_of({"a": 1}) != sha256_of({"a": 2})
    for name in ("one", "two"):
        write_text(tmp_path / name / "f", "same")
    assert fingerprint_file(tmp_path / "one") == fingerprint_file(tmp_path / "two")
    os.utime(tmp_path / "one" / "f", (0, 0))
    assert fingerprint_file(tmp_path / "one") == fingerprint_file(tmp_path / "two")
    write_text(tmp_path / "two" / "f", "other")
    assert fingerprint_file(tmp_path / "one") != fingerprint_file(tmp_path / "two")


def test_a_finished_folder_is_readable_as_the_umask_says(tmp_path):
    """safetensors writes for the owner alone; what is linked from elsewhere keeps its own mode."""
    theirs = tmp_path / "theirs.bin"
    theirs.write_bytes(b"x")
    theirs.chmod(0o600)
    with atomic_folder(tmp_path / "model") as folder:
        for name, mode in (("weights", 0o600), ("script", 0o700)):
            (folder / name).write_bytes(b"x")
            (folder / name).chmod(mode)
        os.link(theirs, folder / "hard")
        (folder / "soft").symlink_to(theirs)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert modes == {"weights": 0o666 & ~UMASK, "script": 0o100 | 0o666 & ~UMASK, "hard": 0o600, "soft": 0o600}
