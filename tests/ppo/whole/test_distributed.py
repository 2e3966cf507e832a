"""Two real processes (gloo, DDP): the same run as one process, checkpoints included."""

import multiprocessing
import os
import socket

import pytest
import torch
from safetensors.torch import load_file

from ppo_vs_dpo.ppo.checkpoints.state import STATE

SETTINGS = {
    "max_steps": 3,
    "num_mini_batches": 2,
    "num_ppo_epochs": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "per_device_train_batch_size": 3,  # uneven micro-batches
    "whiten_rewards": True,
    "kl_controller": "adaptive",
    "optim": "sgd",
    "learning_rate": 0.05,
    "response_length": 8,
}
FIGURES = (
    "objective/kl",
    "objective/rlhf_reward",
    "loss/policy_avg",
    "loss/value_avg",
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "val/ratio",
    "val/ratio_max",
    "val/explained_variance",
    "response/eos_rate",
    "loss/grad_norm",
)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def on_ranks(world: int, build, train=None) -> None:
    """Run a trainer on ``world`` forked processes joined by gloo."""
    port = free_port()

    def rank_main(rank: int) -> None:
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world),
            LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        (train or (lambda trainer: trainer.train()))(build())
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=rank_main, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * world


def history(folder, step=3):
    import json

    rows = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]
    return [row for row in rows if "objective/kl" in row], [row for row in rows if "eval_kl" in row]


@pytest.fixture
def runs(make_trainer, prompts, tiny_reward, tmp_path):
    """Folders of the same run on one and on two processes."""

    def build(name):
        parts = {"eval_dataset": prompts.select(range(5)), "reward_model": tiny_reward(1)}
        return make_trainer(parts, output_dir=str(tmp_path / name), **SETTINGS)

    build("one").train()
    on_ranks(2, lambda: build("two"))
    return tmp_path / "one", tmp_path / "two", build


def test_two_ranks_give_the_run_of_one(runs):
    one, two, _ = runs
    (mine, my_eval), (theirs, their_eval) = history(one), history(two)
    for a, b in zip(mine, theirs, strict=True):
        for name in FIGURES:
            assert a[name] == pytest.approx(b[name], abs=2e-5), name
    for name in ("eval_reward", "eval_kl", "eval_length", "eval_reward_se"):
        assert my_eval[0][name] == pytest.approx(their_eval[0][name], abs=1e-5), name
    a = load_file(one / "checkpoint-3" / f"{STATE}.safetensors")
    b = load_file(two / "checkpoint-3" / f"{STATE}.safetensors")
    assert max((a[name].double() - b[name].double()).abs().max() for name in a) < 1e-5


def test_resume_on_two_ranks_is_exact_and_on_one_goes_on(runs, tmp_path):
    import shutil

    _, two, build = runs
    for name in ("two-again", "two-to-one"):
        shutil.copytree(two / "checkpoint-1", tmp_path / name / "checkpoint-1")
    on_ranks(2, lambda: build("two-again"), lambda trainer: trainer.train(resume_from_checkpoint=True))
    build("two-to-one").train(resume_from_checkpoint=True)
    original = load_file(two / "checkpoint-3" / f"{STATE}.safetensors")
    again = load_file(tmp_path / "two-again" / "checkpoint-3" / f"{STATE}.safetensors")
    assert all(torch.equal(original[name], again[name]) for name in original)
    single = load_file(tmp_path / "two-to-one" / "checkpoint-3" / f"{STATE}.safetensors")
    assert max((original[name].double() - single[name].double()).abs().max() for name in original) < 1e-5


def test_whitening_is_global():
    """One rank with 8 rows and two with 4 agree to the last bit of float32."""
    from ppo_vs_dpo.ppo.algorithm import whiten

    x, mask = torch.randn(8, 5), torch.rand(8, 5) > 0.3
    expected = [whiten(x, mask), whiten(x, mask, shift_mean=False)]

    def build():
        rank = int(os.environ["RANK"])
        torch.distributed.init_process_group("gloo")
        rows = slice(4 * rank, 4 * rank + 4)
        for want, shift in zip(expected, (True, False), strict=True):
            got = whiten(x[rows], mask[rows], shift_mean=shift)
            assert torch.allclose(got, want[rows], atol=1e-7, rtol=0)

    on_ranks(2, build, lambda _: None)


def test_a_reward_that_fails_on_one_rank_stops_all(make_trainer, prompts, tmp_path):
    """No rank waits for another that has gone: all end with an error, well within the time limit."""

    def build():
        def fails_on_rank_1(prompts, completions):
            if os.environ["RANK"] == "1":
                raise RuntimeError("out of order")
            return [0.0] * len(prompts)

        return make_trainer({"reward_funcs": fails_on_rank_1}, max_steps=1)

    def train(trainer):
        from ppo_vs_dpo.artifacts.errors import UserError

        with pytest.raises(UserError, match=r"out of order|failed on another rank"):
            trainer.train()

    on_ranks(2, build, train)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["rloo", "grpo", "reinforce_pp", "dpo"])
def test_groups_are_whole_on_several_ranks(method, ranks, make_trainer, prompts, tiny_reward, tmp_path):
    """Without a value model a response is compared with its prompt's others, which lie on all ranks."""

    def build(name):
        # Sizes of the steps are SGD's: Adam would turn rounding into whole steps.
        settings = {**SETTINGS, "samples_per_prompt": 4, "eval_strategy": "no", "rollout_batch_size": 32}
        settings |= {"advantage": method} if method != "dpo" else {"loss": "dpo", "whiten_rewards": False}
        parts = {"reward_model": tiny_reward(), "train_dataset": prompts}
        return make_trainer(parts, output_dir=str(tmp_path / name), **settings)

    build("one").train()
    on_ranks(ranks, lambda: build("two"))
    (one, _), (two, _) = history(tmp_path / "one"), history(tmp_path / "two")
    for name in ("objective/kl", "objective/scores", "loss/policy_avg", "loss/grad_norm", "val/groups_without_signal"):
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], abs=2e-5), name
