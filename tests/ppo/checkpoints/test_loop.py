"""The loop's state is what a checkpoint holds, and nothing else in a trainer changes from update to update."""

import dataclasses
import json
from pathlib import Path

import torch
from transformers import TrainerState

from ppo_vs_dpo.ppo.checkpoints.loop import PROGRESS, LoopState
from ppo_vs_dpo.ppo.checkpoints.state import STATE, RandomStreams, load_state

SETTINGS = {
    "max_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "kl_controller": "adaptive",
    "kl_target": 0.5,
    "kl_horizon": 100,
    "score_bias": "auto",
    "score_bias_samples": 8,
    "diagnose": True,
    "lr_scheduler_type": "cosine",
}
# A part of a checkpoint that is no part of the loop's state: the weights, their optimizer, and whose they are.
WEIGHTS = {"model", "optimizer", "scheduler"}


def test_a_checkpoint_holds_the_loops_state(make_trainer, tmp_path):
    """Each field is in a file, each entry of the files is a field, and both say the same."""
    trainer = make_trainer(**SETTINGS)
    trainer.train()
    folder = tmp_path / "out" / "checkpoint-2"
    saved = load_state(folder, STATE)
    fields = {one.name for one in dataclasses.fields(LoopState)}
    assert set(saved) - WEIGHTS - {"settings"} | {"progress", "random"} == fields
    assert {file.name for file in folder.glob("*.json")} >= {PROGRESS, "rng_0.json", f"{STATE}.json"}
    for name, value in trainer.loop.state_dict().items():
        assert saved[name] == value, name
    progress = dataclasses.asdict(TrainerState.load_from_json(str(folder / PROGRESS)))
    now = dataclasses.asdict(trainer.loop.progress)
    assert progress == json.loads(json.dumps(now))
    assert set(load_state(folder, "rng_0")) == set(RandomStreams().state_dict())


def test_it_is_given_back(make_trainer, tmp_path):
    trainer = make_trainer(**SETTINGS)
    trainer.train()
    other = LoopState.start(trainer.args)
    assert other.score_bias is None
    other.load_state_dict(load_state(tmp_path / "out" / "checkpoint-2", STATE))
    assert other.state_dict() == trainer.loop.state_dict()


def figures_of(value, path="", found=None, seen=None, depth=0):
    """Every number, string and tensor that an object of ours holds, by where it stands."""
    found, seen = {} if found is None else found, set() if seen is None else seen
    if value is None or isinstance(value, bool | int | float | str):
        found[path] = value
    elif isinstance(value, torch.Tensor):
        found[path] = (value.shape, value.detach().double().sum().item())
    elif id(value) not in seen and depth < 6:
        seen.add(id(value))
        items = {}
        if isinstance(value, dict):
            items = value
        elif isinstance(value, list | tuple):
            items = dict(enumerate(value))
        elif dataclasses.is_dataclass(value) or type(value).__module__.startswith("ppo_vs_dpo"):
            items = vars(value)
        for name, item in items.items():
            figures_of(item, f"{path}.{name}", found, seen, depth + 1)
    return found


def test_nothing_else_changes(make_trainer, prompts):
    """What an update changes in the trainer is the loop's state, the weights, and the callbacks' control flags."""
    trainer = make_trainer({"eval_dataset": prompts.select(range(4))}, **SETTINGS, eval_strategy="steps", eval_steps=1)
    seen = []
    trainer._begin(None)
    collect = trainer.collect

    def watched(*given):
        seen.append(figures_of({k: v for k, v in vars(trainer).items() if k not in ("collect", "control")}))
        return collect(*given)

    trainer.collect = watched
    trainer.train()
    seen.append(figures_of({k: v for k, v in vars(trainer).items() if k not in ("collect", "control")}))
    begun, after = seen[1:]  # between the two updates, and at the end
    changed = {path for path in begun.keys() | after.keys() if begun.get(path) != after.get(path)}
    assert {path.split(".")[1] for path in changed} <= {"loop", "roles", "is_in_train", "_train_batch_size"}, changed
    # `version` numbers the weights that engines have: of this process alone, as the engines are.
    mine = {path.split(".")[2] for path in changed if path.startswith(".roles")}
    assert mine <= {"trained", "policy", "value", "version"}
    assert {".loop.kl.coef", ".loop.progress.global_step"} <= changed


def test_old_folders_go_on(make_trainer, tmp_path):
    """The files' names and entries are those of version 0.1.0: a run that began then can go on."""
    make_trainer(**SETTINGS).train()
    folder = Path(tmp_path / "out" / "checkpoint-1")
    state = dict(json.loads((folder / f"{STATE}.json").read_text())["dict"])
    assert sorted(state) == ["diagnosis", "kl", "model", "optimizer", "scheduler", "score_bias", "settings"]
