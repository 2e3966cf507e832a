"""DDP and DeepSpeed with real processes: one process's trajectory, shards of 1/N, models that load anywhere."""

import shutil

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import ppo_vs_dpo.dpo.train as dpo_train
import ppo_vs_dpo.reward_model.train as reward_model_train
import ppo_vs_dpo.sft.train as sft_train
from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, read_jsonl
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.models.sharding import deepspeed
from ppo_vs_dpo.models.sharding.deepspeed import deepspeed_settings, held_bytes, settled
from ppo_vs_dpo.models.sharding.state import check_sharding
from tests.ranks import CONFIGS, launch, launch_forked, settings_of
from tests.sft.tiny_run import context_of, make_run, weights

STAGES = {"sft": sft_train.run_stage, "reward_model": reward_model_train.run_stage, "dpo": dpo_train.run_stage}
UPDATES = 20
# Learns for all twenty updates without the chaos of a high learning rate, which would amplify rounding.
SETTINGS = {"max_steps": UPDATES, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "save_steps": 10}


@pytest.fixture
def make(word_tokenizer, tiny_llama, tmp_path):
    """``make(name, batch=..., deepspeed=..., **keys)``: a run folder in which all stages share ``keys``."""

    def build(name: str, batch: int, deepspeed: str | None = None, **keys) -> RunFolder:
        section = {**SETTINGS, "per_device_train_batch_size": batch, **keys}
        run = make_run(tmp_path / name, word_tokenizer, tiny_llama(), pairs=48, **dict.fromkeys(STAGES, section))
        if deepspeed:
            config = OmegaConf.load(run.path("config.yaml"))
            config.deepspeed = settings_of(deepspeed)
            OmegaConf.save(config, run.path("config.yaml"))
        return RunFolder(run.root)

    return build


def losses(run: RunFolder, stage: str) -> torch.Tensor:
    rows = [row["loss"] for row in read_jsonl(run.path(stage, "metrics.jsonl")) if "loss" in row]
    assert len(rows) == UPDATES
    return torch.tensor(rows)


def agree(one: torch.Tensor, other: torch.Tensor) -> None:
    """At most 1e-4 apart in any of twenty updates, and an order less on average."""
    residual = (one - other).abs()
    assert residual.max() <= 1e-4
    assert residual.mean() <= 1e-5


@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo"])
def test_gradient_accumulation_changes_nothing(make, stage):
    whole, parts = make("whole", 8), make("parts", 4, gradient_accumulation_steps=2)
    for run in (whole, parts):
        STAGES[stage](context_of(run, stage))
    agree(losses(whole, stage), losses(parts, stage))


def test_dpo_on_two_ranks_is_dpo_on_one(make):
    one, two = make("one", 8), make("two", 4)
    STAGES["dpo"](context_of(one, "dpo"))
    launch_forked(two, "dpo")
    agree(losses(one, "dpo"), losses(two, "dpo"))
    assert two.done("dpo")["figures"]["steps"] == UPDATES


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo"])
@pytest.mark.parametrize("deepspeed", [None, "zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_two_ranks(make, stage, deepspeed):
    """Sharded or not: one process's trajectory, 1/N of the weights under ZeRO-3, a model that loads by itself."""
    one, two = make("one", 8), make("two", 4, deepspeed)
    STAGES[stage](context_of(one, stage))
    said = launch(two, stage)
    agree(losses(one, stage), losses(two, stage))
    loader = AutoModelForSequenceClassification if stage == "reward_model" else AutoModelForCausalLM
    saved = [loader.from_pretrained(run.path(stage, "model")) for run in (one, two)]
    for mine, other in zip(saved[0].parameters(), saved[1].parameters(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)
    if stage == "reward_model":
        reports = [read_json(run.path(stage, "report.json")) for run in (one, two)]
        assert reports[0]["accuracy"] == reports[1]["accuracy"]
    if deepspeed:
        ranks = 2 if "zero3" in deepspeed else 1
        expected = held_bytes(saved[0]) / ranks
        for rank in (0, 1):
            (line,) = [line for line in said.splitlines() if line.startswith(f"rank {rank} holds policy")]
            held = int(line.split()[4].replace(",", ""))
            # A parameter of odd size is rounded up on each rank.
            assert expected <= held <= expected + 4 * len(list(saved[0].parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["reward_model", "dpo"])
def test_lora_under_zero3(make, stage):
    """The merged model, put together from shards, is the one that a single process merges."""
    lora = {"r": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    one, two = make("one", 8, lora=lora), make("two", 4, "zero3", lora=lora)
    STAGES[stage](context_of(one, stage))
    launch(two, stage)
    agree(losses(one, stage), losses(two, stage))
    loader = AutoModelForSequenceClassification if stage == "reward_model" else AutoModelForCausalLM
    saved = [loader.from_pretrained(run.path(stage, "model")) for run in (one, two)]
    for mine, other in zip(saved[0].parameters(), saved[1].parameters(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", [None, "zero2", "zero3"])
def test_resuming_on_the_same_ranks_is_exact(make, deepspeed):
    run = make("run", 4, deepspeed)
    launch(run, "dpo")
    first, trajectory = weights(run.path("dpo", "model")), losses(run, "dpo")
    interrupt_after_10(run)
    assert "checkpoint-10" in launch(run, "dpo")
    assert weights(run.path("dpo", "model")) == first
    assert torch.equal(losses(run, "dpo"), trajectory)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["reward_model", "dpo"])
@pytest.mark.parametrize(("ranks", "deepspeed"), [(2, None), (4, None), (4, "zero2"), (4, "zero3")])
def test_any_number_of_ranks(make, stage, ranks, deepspeed):
    """Twenty updates of eight rows: the same trajectory on one rank and on several, through accumulation, too."""
    one, many = make("one", 4, gradient_accumulation_steps=2), make("many", 8 // ranks, deepspeed)
    STAGES[stage](context_of(one, stage))
    launch(many, stage, ranks=ranks)
    agree(losses(one, stage), losses(many, stage))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "ranks", "after"), [("zero3", 1, "zero3"), ("zero3", 4, "zero2"), (None, 1, None), (None, 4, None)]
)
def test_going_on_with_another_number_of_ranks(make, before, ranks, after):
    """Ten updates on two ranks, ten on one or four, without DeepSpeed, or under another stage: one trajectory."""
    run = make("run", 4, before)
    launch(run, "dpo")
    trajectory = losses(run, "dpo")
    interrupt_after_10(run)
    config = OmegaConf.load(run.path("config.yaml"))
    if after:
        config.deepspeed = settings_of(after)
    config.dpo.per_device_train_batch_size = 8 // ranks
    OmegaConf.save(config, run.path("config.yaml"))
    assert "checkpoint-10" in launch(run, "dpo", ranks=ranks)
    agree(losses(run, "dpo"), trajectory)


@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo"])
def test_the_optimizer_of_another_kind_is_refused(make, stage):
    """transformers' Trainer would go on with a new one, from weights that fit: another run, and no word of it."""
    run = make("run", 8)
    STAGES[stage](context_of(run, stage))
    interrupt_after_10(run, stage)
    checkpoint = run.path(stage, "checkpoints", "checkpoint-10")
    part = checkpoint / "global_step10" / "trained.json"
    part.parent.mkdir()
    part.write_text("{}")
    with pytest.raises(UserError, match="checkpoint-10 was written with DeepSpeed and this run is without it"):
        STAGES[stage](context_of(run, stage))
    # The same one, set as it was.
    shutil.rmtree(part.parent)
    with pytest.raises(UserError, match="checkpoint-10 was written without DeepSpeed and this run is with it"):
        check_sharding(checkpoint, True)
    STAGES[stage](context_of(run, stage))
    assert run.done(stage)["figures"]["steps"] == UPDATES


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("zero2", None), (None, "zero2")])
def test_deepspeed_cannot_be_switched_halfway(make, before, after):
    run = make("run", 8, before)
    launch(run, "dpo", ranks=1)
    interrupt_after_10(run)
    config = OmegaConf.load(run.path("config.yaml"))
    config.deepspeed = settings_of(after) if after else {}
    OmegaConf.save(config, run.path("config.yaml"))
    assert "Set deepspeed as it was" in launch(run, "dpo", ranks=1, code=1)
    # Nothing was set aside.
    assert run.path("dpo", "checkpoints", "checkpoint-10").is_dir()


@pytest.mark.slow
def test_a_part_that_is_missing(make):
    run = make("run", 4, "zero2")
    launch(run, "dpo")
    interrupt_after_10(run)
    (part,) = run.path("dpo", "checkpoints").glob("checkpoint-10/global_step*/trained-1.safetensors")
    part.unlink()
    said = launch(run, "dpo")
    assert "checkpoint-10 cannot be gone on from: " in said
    assert "trained-1.safetensors is gone" in said


def interrupt_after_10(run: RunFolder, stage: str = "dpo") -> None:
    """As if the stage had been killed after step 10."""
    shutil.rmtree(run.path(stage, "checkpoints", f"checkpoint-{UPDATES}"))
    shutil.rmtree(run.path(stage, "model"))
    run.path(stage, "done.json").unlink()


def test_settings_that_cannot_be(make, tmp_path):
    run = make("run", 4, "zero2")
    settings = deepspeed_settings(context_of(run, "dpo"))
    assert settings["zero_optimization"]["stage"] == 2
    run.config.deepspeed.zero_optimization.stage = 4
    with pytest.raises(UserError, match="stage is 4; it must be 0, 1, 2 or 3"):
        deepspeed_settings(context_of(run, "dpo"))
    run.config.deepspeed.zero_optimization.stage = 2
    run.config.deepspeed.zero_optimization.offload_param = {"device": "cpu"}
    with pytest.raises(UserError, match="offload_param needs stage 3"):
        deepspeed_settings(context_of(run, "dpo"))
    del run.config.deepspeed.zero_optimization.offload_param
    run.config.deepspeed.optimizer = {"type": "Lion"}
    with pytest.raises(UserError, match=r"deepspeed\.optimizer: the section says how .* Use a stage's optim"):
        deepspeed_settings(context_of(run, "dpo"))
    run.config.deepspeed = OmegaConf.load(CONFIGS / "none.yaml")
    assert deepspeed_settings(context_of(run, "dpo")) is None


def test_the_cpu_adam_of_deepspeed_is_taken_where_it_can_be(monkeypatch):
    """``auto``: with a GPU, AdamW and a compiler; asked for without one of the latter two it is refused."""
    settings = OmegaConf.to_container(OmegaConf.load(CONFIGS / "zero3_offload.yaml"))

    def takes(optim="adamw_torch_fused", **more):
        return settled({**settings, **more}, optim)["zero_force_ds_cpu_optimizer"]

    monkeypatch.setattr(deepspeed, "no_cpu_adam", lambda: "")
    assert takes() is False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert takes() is True
    assert settled(settings, "adamw_torch_fused")["zero_optimization"]["offload_optimizer"]["pin_memory"] is True
    assert takes("adamw_torch") is True
    assert takes("sgd") is takes(None) is takes(zero_force_ds_cpu_optimizer=False) is False
    zero3 = OmegaConf.to_container(OmegaConf.load(CONFIGS / "zero3.yaml"))
    assert not settled(zero3, "adamw_torch_fused")["zero_force_ds_cpu_optimizer"]
    with pytest.raises(UserError, match=r"would take Adam in the place of optim=sgd"):
        takes("sgd", zero_force_ds_cpu_optimizer=True)
    monkeypatch.setattr(deepspeed, "no_cpu_adam", lambda: "g++ cannot be found")
    assert takes() is False
    with pytest.raises(UserError, match=r"zero_force_ds_cpu_optimizer is true, and g\+\+ cannot be found"):
        takes(zero_force_ds_cpu_optimizer=True)


def test_without_a_compiler_it_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(deepspeed.shutil, "which", lambda name: None)
    deepspeed.no_cpu_adam.cache_clear()
    try:
        assert deepspeed.no_cpu_adam() == deepspeed.no_cpu_adam() != ""
    finally:
        deepspeed.no_cpu_adam.cache_clear()
    said = capsys.readouterr().err
    assert said.count("g++ and ninja to compile DeepSpeed's CPU Adam with cannot be found: torch's AdamW steps") == 1


@pytest.mark.slow
def test_batch_sizes_that_contradict_each_other(make):
    run = make("run", 4, "zero2")
    config = OmegaConf.load(run.path("config.yaml"))
    config.deepspeed.train_micro_batch_size_per_gpu = 3
    OmegaConf.save(config, run.path("config.yaml"))
    said = launch(run, "dpo", ranks=1, code=1)
    assert "deepspeed.train_micro_batch_size_per_gpu=3 against dpo.per_device_train_batch_size=4" in said


def test_every_key_of_the_configurations_has_a_comment():
    for path in sorted(CONFIGS.glob("*.yaml")):
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            if line.strip() and not line.lstrip().startswith("#") and ":" in line:
                above = lines[number - 1].strip()
                assert above.startswith("#") or line.rstrip().endswith(":"), f"{path.name}, line {number + 1}"
