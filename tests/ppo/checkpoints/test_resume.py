"""Kill -9 at any moment, go on, and end with the same bits: weights, optimizer, metrics, samples."""

import dataclasses
import json
import logging
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.ppo.checkpoints.identity import FIXED, FREE
from ppo_vs_dpo.ppo.checkpoints.state import STATE, last_checkpoint, load_state, rng_state, save_state, set_rng_state
from ppo_vs_dpo.ppo.config import UNUSED, PPOConfig
from tests.ppo.conftest import PROMPTS, logs, same, untimed

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


OTHER = {
    "temperature": 0.3, "top_k": 3, "top_p": 0.9, "gamma": 0.5, "lam": 0.5, "kl_coef": 0.9, "kl_target": 3.0,
    "kl_horizon": 7.0, "kl_controller": "adaptive", "missing_eos_penalty": 9.0, "missing_eos": "subtract",
    "learning_rate": 1e-6, "lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.5, "adam_beta1": 0.5,
    "adam_beta2": 0.5, "adam_epsilon": 1e-3, "max_grad_norm": 7.0, "cliprange": 0.9, "cliprange_value": None,
    "vf_coef": 0.9, "entropy_coef": 0.9, "value_learning_rate": 1.0, "value_warmup_updates": 1, "score_clip": 1.0,
    "score_bias": 1.0, "whiten_rewards": True, "whiten_advantages": False, "importance_sampling_cap": None,
    "importance_sampling": "token_mask", "preference_labels": "bradley_terry",
    "reward_ensemble": "worst", "reward_ensemble_coef": 0.7, "reward_shaping": "par", "par_references": 2,
    "score_length_coef": 0.5,
    "early_stop_kl": 9.0, "sync_ref_model": True, "ref_model_mixup_alpha": 0.5, "stop_strings": ["good"],
    "generation_kwargs": {"batch_size": 3}, "max_prompt_length": 30, "parity": "trl-1.12", "rollout_batch_size": 32,
    "max_steps": 9, "num_mini_batches": 1, "num_ppo_epochs": 1, "response_length": 7, "reward_weights": [0.5],
}  # fmt: skip
NAMES = {"rollout_batch_size": "rollout_size", "max_steps": "updates"}
KEPT = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}


@pytest.fixture
def kept(make_trainer):
    """A run of two updates with a checkpoint after each."""
    make_trainer(**KEPT).train()


def test_every_setting_that_changes_the_result_is_looked_at(make_trainer, kept):
    for name, value in OTHER.items():
        with pytest.raises(UserError, match=rf"belongs to another run: {NAMES.get(name, name)} was .* and is "):
            make_trainer(**{**KEPT, name: value}).train(resume_from_checkpoint=True)
    data = Dataset.from_dict({"prompt": [*PROMPTS[:-1], "the end"] * 4})
    with pytest.raises(UserError, match=r"prompts was '32 \(.*\)' and is '32 \(.*\)'"):
        make_trainer({"train_dataset": data}, **KEPT).train(resume_from_checkpoint=True)
    # What changes rounding or what is shown, and nothing else, may change.
    free = {"per_device_train_batch_size": 4, "logging_steps": 2, "save_total_limit": 5, "diagnose": True}
    make_trainer(**{**KEPT, **free}).train(resume_from_checkpoint=True)


def test_each_field_is_either_compared_or_free():
    fields = {one.name for one in dataclasses.fields(PPOConfig) if one.init}
    assert fields >= FREE - set(UNUSED)
    compared = fields - FREE
    assert set(FIXED) <= compared
    assert {name for name in OTHER if name not in NAMES} <= compared


@pytest.mark.parametrize("change", [{"learning_rate": 1e-4}, {"kl_coef": 0.9}, {"adam_beta1": 0.5, "gamma": 0.5}])
def test_what_may_change_is_adopted_in_whole(make_trainer, tmp_path, weights, caplog, monkeypatch, change):
    """Going on with another setting is what a run does that had the old one so far and the new one from here on."""
    settings = {**KEPT, "max_steps": 4, "lr_scheduler_type": "linear"}
    make_trainer(**{**settings, "max_steps": 4}).train()
    last = tmp_path / "out" / "checkpoint-2"
    trainer = make_trainer(**{**settings, **change, "resume_with": list(change)})
    with caplog.at_level("WARNING"):
        monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
        trainer.train(resume_from_checkpoint=str(last))
    # By hand: the old run to update 2, then every place that holds the setting.
    other = make_trainer(**{**settings, "output_dir": str(tmp_path / "other")})
    other.prepare()
    collect = other.collect

    def switch(number, clock=None):
        if number == 2:
            for name, value in change.items():
                setattr(other.args, name, value)
            for group in other.optimizer.param_groups:
                if "learning_rate" in change:
                    group["lr"] = change["learning_rate"] * 2 / 4
                if "adam_beta1" in change:
                    group["betas"] = (0.5, group["betas"][1])
            if "learning_rate" in change:
                other.lr_scheduler.base_lrs = [change["learning_rate"]] * len(other.lr_scheduler.base_lrs)
            other.loop.kl.coef = other.args.kl_coef
        return collect(number, clock)

    other.collect = switch
    other.train()
    assert same(weights(trainer), weights(other))
    mine, theirs = untimed(logs(trainer)), untimed(logs(other))
    assert mine == theirs


def test_a_longer_run_may_go_on(make_trainer, kept):
    trainer = make_trainer(**{**KEPT, "max_steps": 3, "resume_with": ["max_steps"]})
    trainer.train(resume_from_checkpoint=True)
    assert [row["step"] for row in logs(trainer)] == [1, 2, 3]


def test_what_cannot_change_halfway(make_trainer, kept):
    with pytest.raises(UserError, match="resume_with: score_bias cannot change halfway"):
        make_trainer(**KEPT, score_bias=1.0, resume_with=["score_bias"]).train(resume_from_checkpoint=True)
    with pytest.raises(UserError, match=r"resume_with: learning_rat is no setting that is compared.*learning_rate"):
        make_trainer(**KEPT, resume_with=["learning_rat"]).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_version_0_1_goes_on(make_trainer, tmp_path, kept):
    """It holds eight settings and three counts; the others cannot be compared."""
    path = tmp_path / "out" / "checkpoint-1" / f"{STATE}.json"
    state = json.loads(path.read_text())
    old = ("seed", "num_mini_batches", "num_ppo_epochs", "response_length", "kl_estimator", "kl_in", "parity", "optim")
    for entry in state["dict"]:
        if entry[0] == "settings":
            kept_ = [item for item in entry[1]["dict"] if item[0] in (*old, "rollout_size", "updates")]
            entry[1]["dict"] = [*kept_, ["prompts", 32]]
    path.write_text(json.dumps(state))
    make_trainer(**KEPT).train(resume_from_checkpoint=str(path.parent))
    with pytest.raises(UserError, match="num_ppo_epochs was 2 and is 1"):
        make_trainer(**{**KEPT, "num_ppo_epochs": 1}).train(resume_from_checkpoint=str(path.parent))


def test_models_alone_cannot_be_gone_on_from(make_trainer):
    make_trainer(**KEPT, save_only_model=True).train()
    with pytest.raises(UserError, match=r"checkpoint-1 holds the model alone \(ppo.save_only_model\)"):
        make_trainer(**KEPT).train(resume_from_checkpoint=True)


def test_rotation_keeps_the_newest_and_the_best(make_trainer, prompts, tmp_path):
    trainer = make_trainer(
        {"eval_dataset": prompts.select(range(4))},
        **{**SETTINGS, "save_total_limit": 2, "eval_steps": 2},
    )
    found = []

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            found.append({path.name for path in Path(args.output_dir).glob("checkpoint-*")})

    trainer.add_callback(Look())
    trainer.train()
    # A checkpoint goes when `on_save` has seen the next one, which a stage then vouches for.
    assert max(map(len, found)) == 3
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
