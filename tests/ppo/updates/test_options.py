"""What each option of the trainer does, seen from outside."""

import dataclasses

import pytest
import torch
from datasets import Dataset

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.passes.logprobs import response_logprobs
from ppo_vs_dpo.ppo.config import PPOConfig
from ppo_vs_dpo.ppo.rollouts.responses import final_scores
from tests.ppo.conftest import PROMPTS, logs


def test_value_warm_up_leaves_the_policy_alone(make_trainer, weights):
    trainer = make_trainer(value_warmup_updates=2, weight_decay=0.1)
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("value_model.") for name in moved)
    assert logs(trainer)[0]["lr"] == 0
    assert logs(trainer)[0]["lr_value"] > 0


def test_value_model_has_its_own_learning_rate(make_trainer):
    trainer = make_trainer(value_learning_rate=1e-4, lr_scheduler_type="constant")
    trainer.train()
    assert logs(trainer)[-1]["lr"] == 3e-3
    assert logs(trainer)[-1]["lr_value"] == 1e-4


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_in_the_loss_restrains(make_trainer, estimator):
    runs = {}
    for coef in (0.0, 3.0):
        trainer = make_trainer(max_steps=8, kl_coef=coef, kl_in="loss", kl_estimator=estimator, rollout_batch_size=32)
        trainer.train()
        runs[coef] = logs(trainer)[-1]["objective/kl"]
    assert runs[3.0] < 0.5 * runs[0.0]


def test_k1_in_the_loss_is_refused(tmp_path):
    with pytest.raises(UserError, match="gradient is 0"):
        PPOConfig(output_dir=str(tmp_path), kl_in="loss", use_cpu=True)


def test_adaptive_controller_follows_the_measured_kl(make_trainer):
    trainer = make_trainer(max_steps=4, kl_controller="adaptive", kl_coef=0.1, kl_target=1e-3, kl_horizon=100)
    trainer.train()
    coefficients = [row["objective/kl_coef"] for row in logs(trainer)]
    expected = 0.1
    for row, coefficient in zip(logs(trainer), coefficients, strict=True):
        assert coefficient == pytest.approx(expected, rel=1e-9)
        error = min(max(row["objective/kl"] / 1e-3 - 1, -0.2), 0.2)
        expected *= 1 + error * 16 / 100
    assert coefficients[-1] != coefficients[0]


def test_score_conventions(tmp_path):
    scores, finished = torch.tensor([3.0, -4.0, 2.0]), torch.tensor([True, True, False])
    cases = [
        ({"missing_eos_penalty": None}, [3, -4, 2]),
        ({"missing_eos_penalty": 1.0, "missing_eos": "replace"}, [3, -4, -1]),
        ({"missing_eos_penalty": 1.5, "missing_eos": "subtract"}, [3, -4, 0.5]),
        ({"missing_eos_penalty": None, "score_bias": 0.5}, [2.5, -4.5, 1.5]),
        ({"missing_eos_penalty": None, "score_clip": 2.5}, [2.5, -2.5, 2]),
        ({"missing_eos_penalty": 1.0, "score_bias": 1.0, "score_clip": 1.5}, [1.5, -1.5, -1]),
        ({"missing_eos_penalty": 1.0, "parity": "trl-1.12"}, [3, -4, 1]),
        ({"missing_eos_penalty": 1.0, "missing_eos": "subtract", "parity": "summarize-from-feedback"}, [3, -4, -1]),
    ]
    for settings, expected in cases:
        args = PPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
        assert final_scores(scores, finished, args, args.fixed_score_bias).tolist() == expected, settings


@pytest.mark.parametrize("with_references", [True, False])
def test_automatic_score_bias_brings_references_to_zero(make_trainer, with_references):
    """'auto' is the mean score of the completions in the data, or of samples of the reference."""
    prompts = Dataset.from_dict({"prompt": PROMPTS, "completion": ["good good", "bad"] * 4})
    trainer = make_trainer(
        {"train_dataset": prompts if with_references else prompts.remove_columns("completion")},
        score_bias="auto",
        max_steps=1,
    )
    trainer.train()
    if with_references:
        assert trainer.loop.score_bias == 1.0
    else:
        rollout = trainer.evaluator.mean_reference_score(trainer.prompts, 8)
        assert trainer.loop.score_bias == pytest.approx(rollout)


def test_reward_whitening_scales_rewards(make_trainer):
    plain, whitened = make_trainer(), make_trainer(whiten_rewards=True)
    rollouts = []
    for trainer in (plain, whitened):
        trainer.prepare()
        rollouts.append(trainer.collect(0))
    real = rollouts[0].rewards[rollouts[0].mask]
    expected = (real - real.mean()) / real.std(unbiased=False) + real.mean()
    torch.testing.assert_close(rollouts[1].rewards[rollouts[1].mask], expected, atol=1e-5, rtol=1e-5)


def test_advantages_without_whitening(make_trainer):
    trainer = make_trainer(whiten_advantages=False)
    trainer.prepare()
    rollout = trainer.collect(0)
    torch.testing.assert_close(rollout.advantages + rollout.values, rollout.returns, atol=1e-6, rtol=0)


def test_entropy_bonus_keeps_entropy(make_trainer):
    entropies = {}
    for coef in (0.0, 0.5):
        trainer = make_trainer(max_steps=8, entropy_coef=coef, kl_coef=0.0)
        trainer.train()
        entropies[coef] = logs(trainer)[-1]["policy/entropy"]
    assert entropies[0.5] > entropies[0.0] + 0.05


def test_early_stop_ends_the_update(make_trainer):
    trainer = make_trainer(early_stop_kl=1e-9, num_ppo_epochs=4, max_steps=1)
    trainer.train()
    # The first minibatch has approx-KL 0 by construction; the second exceeds any threshold and is the last.
    assert logs(trainer)[0]["policy/optimizer_steps"] == 2
    assert logs(trainer)[0]["policy/stopped_early"] == 1


def test_reference_follows_the_policy(make_trainer):
    trainer = make_trainer(sync_ref_model=True, ref_model_mixup_alpha=0.25, max_steps=1)
    before = {n: p.detach().clone() for n, p in trainer.roles.reference.model.named_parameters()}
    trainer.train()
    policy = dict(trainer.policy.named_parameters())
    for name, tensor in trainer.roles.reference.model.named_parameters():
        torch.testing.assert_close(tensor, 0.75 * before[name] + 0.25 * policy[name], atol=1e-6, rtol=0)


def test_pretraining_mix_raises_the_likelihood_of_its_texts(make_trainer):
    texts = Dataset.from_dict({"text": ["a film was dull and bad", "very dull story and dull plot"] * 3})
    losses = {}
    for coef in (0.0, 5.0):
        trainer = make_trainer({"ptx_dataset": texts}, ptx_coef=coef, max_steps=6, ptx_batch_size=4)
        trainer.train()
        encoded = [trainer.processing_class(text)["input_ids"] for text in texts["text"][:2]]
        from ppo_vs_dpo.models.passes.logprobs import pad_batch

        batch = pad_batch([ids[:1] for ids in encoded], [ids[1:] for ids in encoded], 0)
        losses[coef] = -response_logprobs(trainer.policy, batch)[0].sum().item()
    assert losses[5.0] < losses[0.0] - 1
    assert "loss/ptx_avg" in logs(trainer)[0]
    with pytest.raises(UserError, match="ptx_dataset"):
        make_trainer(ptx_coef=1.0)


def test_stop_strings_and_generation_settings(make_trainer):
    trainer = make_trainer(stop_strings=["good"], generation_kwargs={"max_new_tokens": 20, "batch_size": 4})
    trainer.prepare()
    rollout = trainer.collect(0)
    assert rollout.mask.shape[1] > 6
    texts = [trainer.processing_class.decode(rollout.response_ids[i][rollout.mask[i]]) for i in range(16)]
    ended = [text for text, done in zip(texts, rollout.finished.tolist(), strict=True) if done]
    assert any(text.split()[-1] == "good" for text in ended)
    assert all("good" not in text.split()[:-1] for text in texts)
    with pytest.raises(UserError, match=r"generation_kwargs.max_tokens.*Did you mean"):
        make_trainer(generation_kwargs={"max_tokens": 3})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("torch_compile", True),
        ("use_liger_kernel", True),
        ("neftune_noise_alpha", 5.0),
        ("train_sampling_strategy", "group_by_length"),
    ],
)
def test_what_the_loop_does_not_read_is_refused(tmp_path, name, value):
    with pytest.raises(UserError, match=f"ppo.{name} has no meaning in PPO"):
        PPOConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})


def test_the_refused_settings_are_the_trainers():
    """Each is a field of this version, and its default passes."""
    from transformers import TrainingArguments

    from ppo_vs_dpo.ppo.config import UNUSED

    assert set(UNUSED) <= {field.name for field in dataclasses.fields(TrainingArguments)}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"generation_kwargs": {"temperature": 0.0}}, r"temperature is 0\.0; PPO explores"),
        ({"temperature": -1.0}, "sampling needs temperature >= 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"generation_kwargs": {"top_k": 5.0}}, r"top_k is 5\.0; it must be a whole number"),
        ({"generation_kwargs": {"batch_size": 0}}, "batch_size is 0; it must be at least 1"),
        ({"generation_kwargs": {"top_p": 0.0}}, "0 < top_p"),
        ({"max_prompt_length": 0}, "max_prompt_length is 0; it must be at least 1"),
        ({"max_prompt_length": -1}, "max_prompt_length is -1"),
        ({"rollout_batch_size": 0}, "rollout_batch_size is 0"),
        ({"total_episodes": -5}, "total_episodes is -5"),
    ],
)
def test_values_that_cannot_be_meant(tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        PPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_all_that_cannot_be_meant_is_said_at_once(tmp_path):
    with pytest.raises(UserError) as refused:
        PPOConfig(output_dir=str(tmp_path), temperature=0.0, advantage="rloo", samples_per_prompt=1, gamma=0.9)
    assert [line.split(" ")[0] for line in str(refused.value).splitlines()] == [
        "ppo.temperature",
        "ppo.advantage=rloo",
        "ppo.gamma=0.9",
    ]
    # What has no type that could be compared is said alone.
    with pytest.raises(UserError) as refused:
        PPOConfig(output_dir=str(tmp_path), temperature=0.0, advantage="rloo", samples_per_prompt="many")
    assert str(refused.value).startswith("ppo.samples_per_prompt")
    assert len(str(refused.value).splitlines()) == 1
