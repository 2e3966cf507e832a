"""PPO sharded by DeepSpeed, on real gloo processes: one process's trajectory, shards of 1/N, exact resumption.

Responses are of uneven length and ``stage3_param_persistence_threshold`` is 0: small models hide no fault.
"""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.sharding import start_deepspeed
from tests.ppo.test_distributed import free_port

CONFIGS = Path(__file__).parents[2] / "configs" / "deepspeed"
SETTINGS = {
    "max_steps": 4,
    "num_mini_batches": 2,
    "num_ppo_epochs": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "per_device_train_batch_size": 3,  # uneven micro-batches, so gradients accumulate
    "local_rollout_forward_batch_size": 3,
    "learning_rate": 3e-3,
    "value_learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "response_length": 8,
}
FIGURES = ("loss/policy_avg", "loss/value_avg", "objective/kl", "policy/approxkl_avg", "loss/grad_norm")


def settings_of(name: str) -> dict:
    """A file of configs/deepspeed/, with no parameter left whole."""
    settings = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"))
    if settings["zero_optimization"]["stage"] == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return settings


def on_ranks(world: int, work, *arguments) -> list:
    """``work(*arguments)`` on ``world`` forked processes joined by gloo; what each of them returned."""
    context = multiprocessing.get_context("fork")
    port, answers = free_port(), context.Queue()

    def rank_main(rank: int) -> None:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world),
            LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        start_deepspeed(use_cpu=True)
        answers.put((rank, work(*arguments)))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()

    processes = [context.Process(target=rank_main, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0] * world
    return [answer for _, answer in sorted(answers.get() for _ in processes)]


def history(folder: Path, step: int) -> list[dict]:
    rows = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]
    return [row for row in rows if "objective/kl" in row]


@pytest.fixture
def train(make_trainer, prompts, tiny_reward, tmp_path):
    """``train(name, deepspeed=None, **settings)``: run a trainer to its end in ``tmp_path/name``."""

    def run(name: str, deepspeed: str | None = None, resume: bool = False, **settings):
        if deepspeed:
            settings["deepspeed"] = settings_of(deepspeed)
        parts = {"eval_dataset": prompts.select(range(5)), "reward_model": tiny_reward(1)}
        trainer = make_trainer(parts, output_dir=str(tmp_path / name), **{**SETTINGS, **settings})
        trainer.train(resume_from_checkpoint=resume or None)
        return {role: size for role, size in trainer.held_bytes().items()}

    return run


@pytest.mark.parametrize("deepspeed", ["zero2", "zero3", "zero3_offload"])
def test_two_ranks_give_the_run_of_one(train, tmp_path, deepspeed):
    train("one")
    on_ranks(2, train, "two", deepspeed)
    for mine, theirs in zip(history(tmp_path / "one", 4), history(tmp_path / "two", 4), strict=True):
        for name in FIGURES:
            assert mine[name] == pytest.approx(theirs[name], abs=1e-4), name


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("deepspeed", ["zero2", "zero3"])
def test_resuming_on_the_same_ranks_is_exact(train, tmp_path, deepspeed):
    on_ranks(2, train, "whole", deepspeed)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    on_ranks(2, train, "again", deepspeed, True)
    ends = [tmp_path / name / "checkpoint-4" for name in ("whole", "again")]
    assert weights_of(ends[0]) == weights_of(ends[1])
    for rank in (0, 1):
        states = [(end / f"trained-{rank}.safetensors").read_bytes() for end in ends]
        assert states[0] == states[1]
    whole, again = history(tmp_path / "whole", 4), history(tmp_path / "again", 4)
    for mine, theirs in zip(whole, again, strict=True):
        assert {k: v for k, v in mine.items() if not k.startswith("time/")} == {
            k: v for k, v in theirs.items() if not k.startswith("time/")
        }
