"""Kill -9 at any moment, go on, and end with the same bits: weights, optimizer, metrics, samples."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.ppo.checkpoints.state import STATE, last_checkpoint, load_state, rng_state, save_state, set_rng_state

SETTINGS = {
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "kl_controller": "adaptive",
    "kl_target": 0.5,
    "kl_horizon": 100,
    "sync_ref_model": True,
    "ref_model_mixup_alpha": 0.1,
    "score_bias": "auto",
    "score_bias_samples": 8,
    "value_warmup_updates": 1,
    "diagnose": True,
    "lr_scheduler_type": "cosine",
}


def final_state(folder: Path):
    """Everything the last checkpoint holds, but times."""
    last = folder / "checkpoint-8"
    tensors = load_file(last / f"{STATE}.safetensors")
    state = json.loads((last / f"{STATE}.json").read_text())
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    history = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in history]
    return tensors, state, history, (last / "model.safetensors").read_bytes()


def assert_same_end(expected, got):
    tensors, state, history, model = expected
    assert tensors.keys() == got[0].keys()
    assert all(torch.equal(tensors[name], got[0][name]) for name in tensors)
    assert state == got[1]
    assert history == got[2]
    assert model == got[3]


@pytest.fixture
def uninterrupted(make_trainer, prompts, tmp_path):
    trainer = make_trainer({"eval_dataset": prompts.select(range(4))}, output_dir=str(tmp_path / "whole"), **SETTINGS)
    started = time.monotonic()
    trainer.train()
    return final_state(tmp_path / "whole"), time.monotonic() - started


def test_killed_at_five_random_points(make_trainer, prompts, tmp_path, uninterrupted):
    expected, seconds = uninterrupted
    output = tmp_path / "killed"

    def child():
        trainer = make_trainer({"eval_dataset": prompts.select(range(4))}, output_dir=str(output), **SETTINGS)
        trainer.train(resume_from_checkpoint=True)

    context, rng, resumed = multiprocessing.get_context("fork"), random.Random(0), 0
    for _ in range(5):
        process = context.Process(target=child)
        process.start()
        while last_checkpoint(output) is None and process.is_alive():
            time.sleep(0.01)  # the first one is killed after a checkpoint, however busy the machine is
        # Long enough to get past a checkpoint now and then, short enough not to finish.
        process.join(rng.uniform(0.25, 0.6) * seconds + 0.3)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        resumed += last_checkpoint(output) is not None
    assert resumed
    process = context.Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert_same_end(expected, final_state(output))
    assert not list(output.glob(".checkpoint-*"))


def test_resuming_from_each_checkpoint_ends_alike(make_trainer, prompts, tmp_path, uninterrupted):
    import shutil

    for step in (2, 4, 6):
        output = tmp_path / f"from{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", output / f"checkpoint-{step}")
        torch.manual_seed(random.randrange(1000))  # the generators' states come from the checkpoint
        trainer = make_trainer({"eval_dataset": prompts.select(range(4))}, output_dir=str(output), **SETTINGS)
        trainer.train(resume_from_checkpoint=str(output / f"checkpoint-{step}"))
        tensors, state, history, model = final_state(output)
        # The best checkpoint's path is the folder's own; everything else is equal.
        assert_same_end(uninterrupted[0], (tensors, state, history, model))


def test_a_half_written_checkpoint_is_passed_over(make_trainer, tmp_path):
    trainer = make_trainer(**{**SETTINGS, "eval_strategy": "no", "max_steps": 4})
    trainer.train()
    output = tmp_path / "out"
    (output / "checkpoint-9").mkdir()
    (output / ".checkpoint-12.tmp").mkdir()
    assert last_checkpoint(output) == str(output / "checkpoint-4")
    torn = output / "checkpoint-4" / f"{STATE}.safetensors"
    torn.write_bytes(torn.read_bytes()[:100])
    again = make_trainer(**{**SETTINGS, "eval_strategy": "no", "max_steps": 4})
    with pytest.raises(UserError, match="not a complete checkpoint"):
        again.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_run_is_refused(make_trainer, tmp_path, tiny_llama):
    base = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    make_trainer(**base).train()
    with pytest.raises(UserError, match=r"belongs to another run: seed was 7 and is 8"):
        make_trainer(**base, seed=8).train(resume_from_checkpoint=True)
    with pytest.raises(UserError, match="updates was 2 and is 3"):
        make_trainer(**{**base, "max_steps": 3}).train(resume_from_checkpoint=True)
    with pytest.raises(UserError, match="another model"):
        make_trainer({"model": tiny_llama(0, hidden_size=32)}, **base).train(resume_from_checkpoint=True)
    with pytest.raises(UserError, match="not a checkpoint of ppo"):
        make_trainer(**base).train(resume_from_checkpoint=str(tmp_path))


def test_rotation_keeps_the_newest_and_the_best(make_trainer, prompts, tmp_path):
    trainer = make_trainer(
        {"eval_dataset": prompts.select(range(4))},
        **{**SETTINGS, "save_total_limit": 2, "eval_steps": 2},
    )
    trainer.train()
    kept = {int(path.name.split("-")[1]) for path in (tmp_path / "out").glob("checkpoint-*")}
    assert kept == {8, trainer.state.best_global_step} or len(kept) == 2
    assert {8, trainer.state.best_global_step} <= kept


def test_state_files_hold_no_pickle_and_give_everything_back(tmp_path):
    state = {
        "a": torch.arange(3),
        2: [1.5, None, (True, "x")],
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}},
        "float": 0.1 + 0.2,
    }
    save_state(tmp_path, "s", state)
    loaded = load_state(tmp_path, "s")
    assert loaded[2] == [1.5, None, (True, "x")]
    assert loaded["float"] == state["float"]
    assert torch.equal(loaded["a"], state["a"])
    assert loaded["optimizer"]["state"][0]["step"] == 3
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    with pytest.raises(TypeError, match="cannot hold a set"):
        save_state(tmp_path, "s", {"a": {1}})


def test_random_generators_go_on(tmp_path):
    import numpy as np

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    random.gauss(0, 1), np.random.normal(), torch.randn(3)
    save_state(tmp_path, "rng", rng_state())
    expected = random.gauss(0, 1), np.random.normal(), torch.randn(2).tolist()
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    set_rng_state(load_state(tmp_path, "rng"))
    assert (random.gauss(0, 1), np.random.normal(), torch.randn(2).tolist()) == expected
