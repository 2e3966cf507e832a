"""Padding, lengths, rewards and settings at the edge of what can work, and beyond it."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.ppo.rollouts.rollout import Rollout
from tests.ppo.conftest import logs, same


def test_padding_token_equal_to_eos_changes_nothing(make_trainer, word_tokenizer, tiny_reward, weights):
    """Masks decide what is real: training with pad == eos gives bit for bit the weights of a separate pad token."""
    import copy

    same_token = copy.deepcopy(word_tokenizer)
    same_token.pad_token = same_token.eos_token
    runs = []
    for tokenizer in (word_tokenizer, same_token):
        trainer = make_trainer({"processing_class": tokenizer, "reward_model": tiny_reward(1)})
        trainer.train()
        runs.append(weights(trainer))
    assert same(*runs)


def test_padding_side_of_the_tokenizer_changes_nothing(make_trainer, word_tokenizer, weights):
    import copy

    left = copy.deepcopy(word_tokenizer)
    left.padding_side = "left"
    runs = []
    for tokenizer in (word_tokenizer, left):
        trainer = make_trainer({"processing_class": tokenizer})
        trainer.train()
        runs.append(weights(trainer))
    assert same(*runs)


@pytest.mark.parametrize("settings", [{"response_length": 1}, {"stop_strings": ["e", "o", "a"]}])
def test_responses_of_one_token(make_trainer, settings):
    trainer = make_trainer(**settings)
    trainer.train()
    for row in logs(trainer):
        assert all(value == value and abs(value) < 1e6 for value in row.values())


def test_prompt_longer_than_allowed(make_trainer, prompts):
    with pytest.raises(UserError, match=r"row 1: the prompt has 3 tokens, and 2 are allowed"):
        make_trainer(max_prompt_length=2)
    cut = make_trainer(max_prompt_length=2, truncate_prompts=True)
    full = make_trainer()
    assert [ids[-2:] for ids in full.prompts.ids] == cut.prompts.ids
    with pytest.raises(UserError, match="no room is left for a prompt"):
        make_trainer(response_length=64)
    with pytest.raises(UserError, match="row 1: the prompt is empty"):
        make_trainer({"train_dataset": Dataset.from_dict({"prompt": ["the film", ""]})})
    with pytest.raises(UserError, match="no column prompt"):
        make_trainer({"train_dataset": Dataset.from_dict({"query": ["the film"]})})


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda prompts, completions: [1.0], r"returned 1 scores for 16 completions"),
        (lambda prompts, completions: [float("nan")] * len(prompts), r"returned nan for sample 0 .*prompt '"),
        (lambda prompts, completions: [None] * len(prompts), r"returned None for sample 0"),
    ],
)
def test_rewards_that_cannot_be_used(make_trainer, tmp_path, broken, message):
    broken.__name__ = "my_reward"
    with pytest.raises(UserError, match="reward function my_reward " + message) as raised:
        make_trainer({"reward_funcs": broken}).train()
    assert "rollout-reward-update-1" in str(raised.value)
    folder = tmp_path / "out" / "rollout-reward-update-1"
    assert len(Rollout.load(folder / "rollout.safetensors")) == 16
    assert len((folder / "texts.jsonl").read_text().splitlines()) == 16


def test_reward_function_that_raises(make_trainer):
    def fussy(prompts, completions):
        if any("bad" in prompt for prompt in prompts):
            raise KeyError("bad")
        return [0.0] * len(prompts)

    with pytest.raises(UserError, match=r"fussy raised KeyError.*sample \d+ \(prompt 'a bad film'"):
        make_trainer({"reward_funcs": fussy}).train()


def test_non_finite_loss_stops_before_it_reaches_the_weights(make_trainer, weights, tmp_path):
    trainer = make_trainer()
    trainer.prepare()
    collect = trainer.collect

    def poisoned(update, clock=None):
        rollout = collect(update, clock)
        rollout.advantages[3, 0] = float("inf")
        return rollout

    trainer.collect = poisoned
    before = weights(trainer)
    with pytest.raises(UserError, match=r"not finite.*rollout-nonfinite-update-1"):
        trainer.train()
    # The minibatch that holds the row may be the second: then one good step was taken. None is NaN either way.
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())
    assert before.keys() == weights(trainer).keys()
    saved = Rollout.load(tmp_path / "out" / "rollout-nonfinite-update-1" / "rollout.safetensors")
    assert saved.advantages[3, 0].isinf()


def test_a_policy_that_is_not_the_sampling_policy_stops(make_trainer, tiny_llama):
    """Dropout switched on behind the trainer's back: the first KL is not 0, nor is the ratio 1 where the reference is
    another model anyway, and the run ends with an explanation."""
    for parts, said in (({}, "policy and reference differ by"), ({"ref_model": tiny_llama(1)}, "ratio must be 1")):
        trainer = make_trainer(parts)
        for layer in trainer.policy.model.layers:
            layer.mlp.act_fn = torch.nn.Sequential(layer.mlp.act_fn, torch.nn.Dropout(0.3))
        with pytest.raises(UserError, match=said):
            trainer.train()
    tolerant = make_trainer(check_first_ratio=False)
    for layer in tolerant.policy.model.layers:
        layer.mlp.act_fn = torch.nn.Sequential(layer.mlp.act_fn, torch.nn.Dropout(0.3))
    tolerant.train()
    assert logs(tolerant)[0]["val/first_ratio_deviation"] > 1e-3


def test_arguments_that_cannot_be_meant(make_trainer, tiny_llama):
    for settings, message in [
        ({"num_mini_batches": 3}, "cannot be cut into 3 equal"),
        ({"gamma": 1.5}, "gamma is 1.5"),
        ({"kl_coef": -1.0}, "kl_coef is -1.0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"kl_estimator": "k9"}, "kl_estimator is 'k9'"),
        ({"score_bias": "mean"}, "score_bias is 'mean'"),
        ({"num_ppo_epochs": 0}, "num_ppo_epochs is 0"),
    ]:
        with pytest.raises(UserError, match=message):
            make_trainer(**settings)
    with pytest.raises(UserError, match="no eval_dataset"):
        make_trainer(eval_strategy="steps")
    with pytest.raises(UserError, match="needs evaluations and checkpoints"):
        make_trainer(load_best_model_at_end=True)
    policy = tiny_llama(0)
    with pytest.raises(UserError, match="ref_model is the policy"):
        make_trainer({"model": policy, "ref_model": policy})
    with pytest.raises(UserError, match="tokens"):
        make_trainer({"ref_model": tiny_llama(0, vocab_size=30)})


def test_saved_policy_loads_by_from_pretrained(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, tensor in loaded.named_parameters():
        assert torch.equal(tensor, dict(trainer.policy.named_parameters())[name])
    assert (Path(tmp_path) / "model" / "tokenizer.json").exists()
