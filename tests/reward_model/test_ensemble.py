"""Several reward models of one pair set: seeds beside each other, their average, and what PPO makes of them."""

import pytest
import torch
from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json
from ppo_vs_dpo.artifacts.settings import split
from ppo_vs_dpo.models.loading.heads import load_reward
from ppo_vs_dpo.ppo.stage.config import reward_models
from ppo_vs_dpo.reward_model.config import RewardModelStage
from ppo_vs_dpo.reward_model.ensemble import average, members_of
from ppo_vs_dpo.reward_model.scorer import RewardScorer, read_bias, read_length_slope
from ppo_vs_dpo.reward_model.train import length_slope, run_stage
from tests.sft.tiny_run import context_of, make_run

ENSEMBLE = {"ensemble": 2, "max_steps": 4, "save_steps": 4}


@pytest.fixture
def trained(tiny_llama, word_tokenizer, tmp_path):
    """A function that trains an ensemble of two in a run folder."""

    def train(**settings):
        run = make_run(tmp_path / "run", word_tokenizer, tiny_llama(), reward_model={**ENSEMBLE, **settings})
        context = context_of(run, "reward_model")
        run_stage(context)
        return context

    return train


def state(folder):
    return load_reward(folder).state_dict()


def test_members_differ_and_each_is_centred(trained):
    context = trained()
    members = members_of(context.dir)
    assert [str(folder.relative_to(context.dir)) for folder in members] == ["model", "members/1/model"]
    one, two = (state(folder) for folder in members)
    assert max((one[name] - two[name]).abs().max() for name in one) > 1e-4
    assert all(read_length_slope(folder) is not None for folder in members)
    assert read_bias(members[0]) != read_bias(members[1])
    report = read_json(context.dir / "report.json")
    assert report["ensemble"] == 2
    assert report["ensemble_spread"] > 0
    assert report["length_slope"] == read_length_slope(members[0])
    # The same command again trains nothing anew.
    before = (members[1] / "model.safetensors").stat().st_mtime_ns
    run_stage(context)
    assert (members[1] / "model.safetensors").stat().st_mtime_ns == before


def test_averaged_weights_are_the_mean_of_the_members(trained):
    """WARM: one model, whose weights are the members' mean; the members stay beside it, and PPO holds one."""
    context = trained(average_weights=True, head_init="normal")
    assert members_of(context.dir) == [context.dir / "model"]
    mean, one, two = (state(context.dir / name) for name in ("model", "members/0/model", "members/1/model"))
    for name in mean:
        torch.testing.assert_close(mean[name], (one[name] + two[name]) / 2, atol=1e-6, rtol=0)
    assert any((one[name] != two[name]).any() for name in one)
    assert RewardScorer.load(context.dir / "model").bias == read_bias(context.dir / "model")


def test_the_mean_of_one_with_itself_is_itself(tiny_llama, word_tokenizer, tmp_path):
    from tests.reward_model.test_reward_model import initial_model

    tiny_llama().save_pretrained(tmp_path / "base")
    model = initial_model(tmp_path / "base", None, "normal", 0)
    model.save_pretrained(tmp_path / "a")
    word_tokenizer.save_pretrained(tmp_path / "a")
    average([tmp_path / "a", tmp_path / "a"], tmp_path / "b")
    a, b = state(tmp_path / "a"), state(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (tmp_path / "b" / "tokenizer.json").is_file()


def test_slope_by_hand():
    assert length_slope([1.0, 3.0, 5.0], [1, 2, 3]) == pytest.approx(2.0)
    assert length_slope([1.0, 1.0, 4.0, 4.0], [1, 2, 1, 2]) == pytest.approx(0.0)
    assert length_slope([1.0, 2.0], [4, 4]) == 0.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ensemble": 0}, "reward_model.ensemble is 0; it must be at least 1"),
        ({"average_weights": True}, "ensemble to 2 or more"),
        ({"ensemble": 2, "path": "x"}, "takes one that is trained"),
        ({"ensemble": 2, "lora": {"r": 2}, "merge_lora": False}, "needs them merged"),
    ],
)
def test_what_cannot_be_meant_is_said(settings, words):
    with pytest.raises(UserError, match=words):
        split(settings, RewardModelStage, where="reward_model")


def test_who_plans_knows_how_many_there_are():
    def count(reward_model, **ppo):
        return reward_models(OmegaConf.create({"ppo": ppo, "reward_model": reward_model}))

    assert count({}) == count({"ensemble": 1}) == count({"ensemble": 5, "average_weights": True}) == 1
    assert count({"ensemble": 5}) == count({"ensemble": 5}, reward=["reward_model", "f.py:g"]) == 5
    assert count({"ensemble": 5}, reward="f.py:g") == count({"ensemble": 5}, gold_reward=True) == 0
