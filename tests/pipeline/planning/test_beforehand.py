"""What a run says it will cost before it starts, and the speed behind it."""

import json
import os

import pytest
from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.files import write_parquet
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.pipeline.composing.compose import load
from ppo_vs_dpo.pipeline.planning import beforehand, measured

STAGES = ("data", "sft", "pairs", "reward_model", "dpo", "ppo", "compare")


def run_of(folder, *overrides):
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(load(list(overrides))))
    return RunFolder(folder)


@pytest.fixture
def hh(tmp_path):
    """The README's own command on 200 pairs of about 30 tokens each."""
    rows = [{"prompt": "p" * 40, "chosen": "c" * 40, "rejected": "r" * 40}] * 200
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_of(tmp_path, "experiment=hh", "model.path=x", "data=files", f"data.path={tmp_path}/pairs.jsonl")


def test_responses_and_updates_are_those_of_the_configuration(hh):
    """By hand: 100 updates x 512 responses of 128 tokens, 9 evaluations of 128; 160 pairs in updates of 64."""
    ppo = beforehand.work_of(hh, "ppo")
    assert (ppo.updates, ppo.responses, ppo.sampled) == (100, 51_200 + 9 * 128, (51_200 + 9 * 128) * 128)
    reward = beforehand.work_of(hh, "reward_model")
    assert (reward.updates, reward.adapters) == (3, True)
    assert beforehand.work_of(hh, "sft").updates == 0  # skip_training
    compare = beforehand.work_of(hh, "compare")
    assert compare.responses == 256 * (4 + 20 + 2 * 1)


def test_a_value_model_costs_what_it_trains_on(tmp_path):
    """Without one (a point of a sweep, too) half the trained tokens, a pass and a checkpoint less."""
    run = run_of(tmp_path, "experiment=quickstart", "ppo.samples_per_prompt=4", "ppo.sweep={advantage:[rloo]}")
    gae, rloo = (beforehand.work_of(run, name) for name in ("ppo", "ppo,advantage=rloo"))
    assert rloo.updates == gae.updates
    assert rloo.trained == gae.trained / 2
    assert rloo.read == gae.read * 3 / 4
    speed = {"parameters": 10**9, "device": "cpu"}
    alone = run_of(tmp_path / "rloo", "experiment=quickstart", "ppo.samples_per_prompt=4", "ppo.advantage=rloo")
    disk = [float(beforehand.space(r, [w], speed).split()[2]) for r, w in ((run, gae), (alone, rloo))]
    kept = run.config.ppo.save_total_limit + 1
    # fp32 with AdamW's moments, for each checkpoint that is kept.
    assert disk[0] - disk[1] == pytest.approx(kept * 3 * 4, abs=0.2)


def test_once_the_pairs_are_there_they_are_counted(hh):
    write_parquet(hh.path("pairs", "train.parquet"), [{"prompt": "a" * 80, "chosen": "b" * 80, "rejected": "c"}] * 640)
    dpo = beforehand.work_of(hh, "dpo")
    assert dpo.updates == 10
    assert dpo.trained == 10 * 64 * 2 * (160 / beforehand.CHARACTERS)


def test_a_hub_set_is_not_known_before_it_is_read(tmp_path):
    run = run_of(tmp_path, "experiment=hh", "model.path=x", "data.path=Anthropic/hh-rlhf")
    assert not beforehand.work_of(run, "dpo").known
    speed = {"train": 1e-2, "forward": 1e-4, "decode": 1e-3, "device": "cpu", "parameters": 10**9, "layers": 2}
    works = [beforehand.work_of(run, name) for name in STAGES]
    seconds = {work.name: found for work in works if (found := work.seconds(speed)) is not None}
    text = beforehand.table(run, works, seconds, speed)
    assert "52,352" in text
    assert "reward_model, dpo once the data is read" in text
    assert "d in all, measured on cpu" in text  # days, and it says so
    assert "disk: about" in text


def test_a_run_that_says_how_long_it_takes_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(beforehand, "ask", lambda *_: pytest.fail("it measured"))
    run = run_of(tmp_path, "experiment=quickstart")
    text, seconds = beforehand.say_cost(run, STAGES, {})
    assert seconds["ppo"] == run.config.launch.expected_seconds.ppo
    assert "from launch.expected_seconds" in text
    assert beforehand.work_of(run, "ppo,kl_coef=0.0").updates == 24


def test_named_seconds_follow_what_was_overridden(tmp_path):
    """A tenth of the updates takes about a tenth of the time; where nothing was changed, what the file says."""
    run = run_of(tmp_path, "experiment=quickstart")
    usual = beforehand.say_cost(run, STAGES, {})[1]
    assert usual == dict(run.config.launch.expected_seconds)
    few = run_of(tmp_path, "experiment=quickstart", "ppo.max_steps=2", "ppo.rollout_batch_size=16", "data.pairs=600")
    found = beforehand.say_cost(few, [*STAGES, "ppo,kl_coef=0.0"], {})[1]
    assert beforehand.STARTED <= found["ppo"] < usual["ppo"] / 4
    assert found["ppo,kl_coef=0.0"] == found["ppo"]
    assert found["dpo"] < usual["dpo"] / 2
    assert found["sft"] == usual["sft"]


def test_speed_is_measured_once_and_doubles_with_the_layers(tmp_path, monkeypatch):
    architecture = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 256, "vocab_size": 128}
    architecture |= {"num_attention_heads": 4, "num_hidden_layers": 8}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    plain = OmegaConf.to_container(load(["experiment=quickstart", "sft.lora={r: 2, target_modules: [q_proj]}"]))
    sections = {name: plain[name] for name in ("sft", "reward_model", "dpo", "ppo")}
    found = measured.ask({"architecture": architecture, "batch": 4, "sections": sections}, environment)
    assert found["layers"] == 8
    assert found["train"] > found["forward"] > 0
    assert found["parameters"] == pytest.approx(2 * 128 * 64 + 8 * (4 * 64 * 64 + 3 * 64 * 256), rel=0.02)
    assert (
        measured.ask({"path": str(tmp_path / "gone")}, environment) is None
    )  # said as "known after the first update"
    # At least weights, gradients and moments; PPO has them twice, and adapters leave most of them out.
    peaks, whole = found["memory"], 16 * found["parameters"]
    assert peaks["reward_model"] > measured.LIBRARIES + 0.8 * whole
    assert peaks["ppo"] > measured.LIBRARIES + 1.8 * whole
    assert peaks["sft"] < peaks["dpo"] - 0.7 * whole
    asked = []
    monkeypatch.setattr(beforehand, "ask", lambda question, _: asked.append(question) or found)
    run = run_of(tmp_path, "experiment=quickstart", "launch.expected_seconds={}")
    assert beforehand.speed_of(run, {}) == beforehand.speed_of(run, {}) == found
    assert len(asked) == 1
    text = beforehand.table(run, [beforehand.work_of(run, "ppo")], {"ppo": 60.0}, found)
    assert f"{peaks['ppo'] / 1e9:.1f} GB" in text
    assert "the peak of a stage's process" in text


@pytest.mark.parametrize(("seconds", "text"), [(45, "45 s"), (600, "10 min"), (9000, "2.5 h"), (300_000, "3.5 d")])
def test_durations_are_spelled(seconds, text):
    assert beforehand.spell(seconds) == text
