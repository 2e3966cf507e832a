"""Real input through the command: HH dialogues, own pairs, the recipe with pairs in the configuration, bad input."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.pipeline.chat_model import save_chat_model
from tests.pipeline.mini import environment

FEW = [
    "data.heldout_prompts=32", "reward_model.max_steps=2", "reward_model.gradient_accumulation_steps=1",
    "reward_model.samples=16", "reward_model.sample_max_new_tokens=8", "dpo.max_steps=2",
    "dpo.gradient_accumulation_steps=1", "ppo.max_steps=2", "ppo.rollout_batch_size=8", "ppo.num_ppo_epochs=1",
    "ppo.response_length=8", "ppo.validation_prompts=4", "compare.n_prompts=32", "compare.max_new_tokens=8",
    "compare.pool_size=2", "compare.best_of_n=[2]", "compare.resamples=100", "data.max_prompt_tokens=300",
]  # fmt: skip


def command(tmp_path, *arguments, check=True):
    """``ppo-vs-dpo`` with these arguments, in a folder of its own."""
    line = [sys.executable, "-m", "ppo_vs_dpo.pipeline.cli", *arguments, f"output_dir={tmp_path / 'runs'}"]
    return subprocess.run(line, capture_output=True, text=True, check=check, env=environment(), timeout=900)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture
def own_pairs(tmp_path):
    rows = [
        {"prompt": f"What is {a} plus {b}?", "chosen": f"It is {a + b}.", "rejected": f"It is {a * b + 1}, I think."}
        for a in range(12)
        for b in range(12)
    ]
    path = tmp_path / "my_pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
@pytest.mark.real_data
def test_hh_from_a_file_with_a_local_chat_model_and_lora(tmp_path, chat_model, real_data):
    said = command(
        tmp_path,
        "experiment=hh",
        f"model.path={chat_model}",
        f"data.path={real_data / 'hh_rlhf' / 'harmless_base.jsonl.gz'}",
        "data.max_pairs=300",
        *FEW,
    ).stdout
    assert "hh/compare/report.html" in said
    report = json.loads((tmp_path / "runs" / "hh" / "compare" / "report.json").read_text())
    assert {"sft", "ppo", "dpo"} <= set(report["policies"])
    assert report["judges"]["reward_model"]["in_sample"] is True


@pytest.mark.slow
def test_own_pairs_with_an_own_model(tmp_path, chat_model, own_pairs):
    """README: your own pairs, your own model."""
    said = command(
        tmp_path,
        "experiment=hh",
        "name=mine",
        f"model.path={chat_model}",
        "data=files",
        f"data.path={own_pairs}",
        "data.conversational=true",
        *FEW,
    ).stdout
    assert "mine/compare/report.html" in said


@pytest.mark.slow
def test_the_llama3_recipe_on_a_small_llama(tmp_path, chat_model):
    command(tmp_path, "experiment=llama3_dpo", f"model.path={chat_model}", "model.dtype=float32")
    run = tmp_path / "runs" / "llama3_dpo"
    figures = json.loads((run / "dpo" / "done.json").read_text())["figures"]
    assert figures["beta"] == 0.1
    assert figures["steps"] == 6  # 4 pairs, 2 a step, 3 epochs
    adapter = json.loads((run / "dpo" / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], sorted(adapter["target_modules"])) == (16, 32, ["q_proj", "v_proj"])
    assert not (run / "ppo").exists()


def test_missing_paths_are_named(tmp_path, chat_model, forked):
    refused = command(tmp_path, "experiment=hh", "name=a", "model.path=./nowhere", "stages=[data]", check=False)
    assert refused.returncode == 2
    assert "nowhere" in refused.stderr
    assert "Traceback" not in refused.stderr
    refused = command(
        tmp_path,
        "experiment=hh",
        "name=b",
        f"model.path={chat_model}",
        "data.path=./no_pairs.jsonl",
        "stages=[data]",
        check=False,
    )
    assert refused.returncode == 2
    assert "no_pairs.jsonl" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ('{"prompt": "What is 5 plus 5?", "chosen": "It is', "my_pairs.jsonl, line 7"),
        ('{"prompt": "What is 5 plus 5?", "chosen": "It is 10."}', "rejected"),
    ],
    ids=["half a line", "a missing column"],
)
def test_broken_pairs_are_named(tmp_path, chat_model, own_pairs, line, place, forked):
    rows = own_pairs.read_text().splitlines()
    rows[6] = line
    own_pairs.write_text("\n".join(rows) + "\n")
    refused = command(
        tmp_path,
        "experiment=hh",
        f"model.path={chat_model}",
        "data=files",
        f"data.path={own_pairs}",
        "stages=[data]",
        check=False,
    )
    assert refused.returncode == 2
    assert place in refused.stderr
    assert "7" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_chat_data_for_a_model_without_a_chat_template(tmp_path, chat_model, own_pairs, forked):
    plain = tmp_path / "plain_model"
    shutil.copytree(chat_model, plain)
    (plain / "chat_template.jinja").unlink()
    refused = command(
        tmp_path,
        "experiment=hh",
        f"model.path={plain}",
        "data=files",
        f"data.path={own_pairs}",
        "data.conversational=true",
        "stages=[data]",
        check=False,
    )
    assert refused.returncode == 2
    assert "chat template" in refused.stderr
    assert "model.chat_template" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small read-only file system")
def test_a_full_disk_and_a_read_only_one(tmp_path, forked):
    """A real file system of 64 KiB, and the same one read-only: one sentence, exit code 2, no traceback."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=False)
    if mounted.returncode != 0:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        line = [
            sys.executable,
            "-m",
            "ppo_vs_dpo.pipeline.cli",
            "experiment=quickstart",
            f"output_dir={disk}",
            "stages=[data]",
        ]
        full = subprocess.run(line, capture_output=True, text=True, check=False, env=environment())
        assert full.returncode == 2
        assert "the disk is full" in full.stderr
        assert "Traceback" not in full.stderr
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        read_only = subprocess.run(
            [*line, "name=other"], capture_output=True, text=True, check=False, env=environment()
        )
        assert read_only.returncode == 2
        assert "read-only" in read_only.stderr
        assert "Traceback" not in read_only.stderr
    finally:
        subprocess.run(["umount", str(disk)], check=False)
