"""What goes wrong on clusters: lost files, other models, full disks, killed and stalled ranks. Nothing is lost."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.pipeline.running.job import root_cause
from ppo_vs_dpo.ppo.checkpoints.state import STATE, last_checkpoint, load_state
from ppo_vs_dpo.ppo.roles.rewards import RewardError
from ppo_vs_dpo.ppo.roles.roles import Roles
from tests.ppo.stage.test_train import run_folder  # noqa: F401 (a fixture)
from tests.ppo.whole.test_deepspeed import SETTINGS
from tests.ranks import on_ranks, settings_of

SHORT = {**SETTINGS, "max_steps": 2, "save_steps": 1, "eval_strategy": "no", "num_ppo_epochs": 1}


def test_checkpoints_that_cannot_be_gone_on_from(make_trainer, tiny_llama, tmp_path):
    """A part that is missing or torn, another model, another number of weights: named, and nothing is touched."""

    def build(**parts):
        return make_trainer(parts, **{**SHORT, "max_steps": 1, "deepspeed": settings_of("zero2")})

    def work():
        build().train()
        folder = Path(last_checkpoint(tmp_path / "out"))
        part = folder / "trained-0.safetensors"
        whole = part.read_bytes()
        for content in (None, whole[:-100]):
            part.unlink()
            if content:
                part.write_bytes(content)
            with pytest.raises(UserError, match=r"trained-0.safetensors, the part of rank 0 of 1, cannot be read"):
                build().train(resume_from_checkpoint=True)
            part.write_bytes(whole)
        with pytest.raises(UserError, match=r"another model: policy.* is \[.*\] there and .* here"):
            build(model=tiny_llama(0, hidden_size=32, intermediate_size=48)).train(resume_from_checkpoint=True)
        build().train(resume_from_checkpoint=True)

    on_ranks(1, work)
    with pytest.raises(UserError, match=r"was written with DeepSpeed and this run is without it"):
        make_trainer({}, **{**SHORT, "max_steps": 1}).train(resume_from_checkpoint=True)


def test_settings_that_contradict_each_other(make_trainer):
    def work():
        def build(change, **settings):
            deepspeed = settings_of("zero3")
            change(deepspeed)
            return make_trainer({}, **{**SHORT, **settings, "deepspeed": deepspeed})

        expected = r"deepspeed.train_micro_batch_size_per_gpu=5 against ppo.per_device_train_batch_size=3"
        with pytest.raises(UserError, match=expected):
            build(lambda section: section.update(train_micro_batch_size_per_gpu=5))
        with pytest.raises(UserError, match=r"stage=0 shards nothing"):
            build(lambda section: section["zero_optimization"].update(stage=0))
        with pytest.raises(UserError, match=r"ds3_gather_for_generation=false cannot work under ZeRO-3"):
            build(lambda section: None, ds3_gather_for_generation=False)

    on_ranks(1, work)


def test_a_full_disk_while_saving_costs_one_update(make_trainer, tmp_path, weights):
    """The checkpoint before stays; with room again the run ends where an uninterrupted one does."""
    expected = make_trainer({}, **{**SHORT, "output_dir": str(tmp_path / "whole")})
    expected.train()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                # Larger files end with "file too large", as they end with "no space left" on a full disk.
                resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))

    trainer = make_trainer({"callbacks": [Full()]}, **SHORT)
    trainer.remove_callback(PrinterCallback)  # pytest keeps what is printed in a file that may not grow either
    try:
        with pytest.raises(UserError, match=r"could not write .*checkpoint-2.*The checkpoint before it is complete"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(item.name for item in (tmp_path / "out").iterdir()) == ["checkpoint-1"]
    load_state(tmp_path / "out" / "checkpoint-1", STATE)
    again = make_trainer({}, **SHORT)
    again.train(resume_from_checkpoint=True)
    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in weights(expected).items())


def test_a_stalled_rank_is_reported_with_the_step(make_trainer):
    """Rank 1 hangs in its reward; rank 0 stops waiting and says where."""

    def slow_on_rank_1(prompts, completions):
        if os.environ["RANK"] == "1":
            time.sleep(12)
        return [0.0] * len(prompts)

    def work():
        with pytest.raises((UserError, RuntimeError)) as caught:
            make_trainer({"reward_funcs": slow_on_rank_1}, max_steps=1, ddp_timeout=4).train()
        return str(caught.value)

    said = on_ranks(2, work, timeout=4, orderly=False)[0]
    assert "waited in vain for another rank in this step: ppo, update 1, score" in said
    assert "rank 1 is at slow_on_rank_1 (" in said
    assert "ddp_timeout" in said


class SlowJudge:
    """A judge that answers all ranks but one at once."""

    wants_references, name = True, "slow judge"

    def __call__(self, prompts, completions, prompt_ids, response_ids, finished, reference_answers, **columns):
        if os.environ["RANK"] == "1":
            time.sleep(16)
        return [float(len(ids)) for ids in response_ids]


@pytest.mark.slow
def test_a_judge_may_take_a_rank_longer_than_a_collective_is_waited_for(make_trainer):
    def work():
        trainer = make_trainer({"reward_funcs": SlowJudge()}, max_steps=1, ddp_timeout=8)
        trainer.train()
        return trainer.state.global_step

    assert on_ranks(2, work, timeout=8) == [1, 1]


def test_a_token_that_one_rank_cannot_score_stops_all_in_pieces(make_trainer, tiny_reward, monkeypatch):
    """Under ZeRO-3 a reward model's passes are made by all ranks together, or by none."""

    def unknown_on_rank_1(self, responses):
        if os.environ["RANK"] == "1":
            raise RewardError("the policy sampled token 99", 0)

    def work():
        trainer = make_trainer({"reward_model": tiny_reward(1)}, **SHORT, deepspeed=settings_of("zero3"))
        with pytest.raises(UserError, match=r"sampled token 99|failed on another rank"):
            trainer.train()

    monkeypatch.setattr(Roles, "check_known", unknown_on_rank_1)
    on_ranks(2, work, timeout=60)


@pytest.mark.slow
def test_a_killed_rank_ends_the_job(run_folder, tmp_path):  # noqa: F811
    """kill -9 on one rank: the other does not wait, and the log says which rank it was."""
    run = run_folder(max_steps=100_000, save_strategy="no", eval_strategy="no")
    log = tmp_path / "log.txt"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "ppo_vs_dpo.ppo",
    ]
    with log.open("wb") as out:
        job = subprocess.Popen([*command, str(run.root)], stdout=out, stderr=subprocess.STDOUT)
        try:
            until(lambda: run.path("ppo", "metrics.jsonl").is_file(), 120)
            children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
            ranks = {rank_of(int(pid)): int(pid) for pid in children}
            os.kill(ranks["1"], signal.SIGKILL)
            assert job.wait(40) != 0
        finally:
            job.kill()
    assert root_cause(log.read_text()) == (1, -signal.SIGKILL)
    for pid in ranks.values():
        assert not Path(f"/proc/{pid}").exists()


def until(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def rank_of(pid: int) -> str | None:
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((item[5:].decode() for item in environment if item.startswith(b"RANK=")), None)
