"""The trainer on a model of ten thousand parameters: what each option does, seen from outside."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from artifacts.errors import UserError
from models.logprobs import response_logprobs
from ppo.config import PPOConfig
from ppo.rollout import Rollout
from tests.ppo.conftest import PROMPTS, count_good


def logs(trainer, key="objective/kl"):
    return [row for row in trainer.state.log_history if key in row]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def untimed(rows):
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


# ------------------------------------------------------------------------------------------------ the loop


def test_first_pass_of_every_rollout(make_trainer):
    """N+: with one epoch of one minibatch, ratio exactly 1, approx-KL and clip fraction 0, policy loss about 0."""
    trainer = make_trainer(num_ppo_epochs=1, num_mini_batches=1, max_steps=3)
    trainer.train()
    for row in logs(trainer):
        assert row["val/ratio"] == pytest.approx(1, abs=1e-6)
        assert row["val/ratio_max"] == pytest.approx(1, abs=1e-5)
        assert row["policy/approxkl_avg"] < 1e-10
        assert row["policy/clipfrac_avg"] == 0
        assert row["val/clipfrac_avg"] == 0
        assert abs(row["loss/policy_avg"]) < 1e-6
        assert row["val/first_ratio_deviation"] < 1e-5
    # The policy is the reference at first: KL exactly what rounding leaves.
    assert abs(logs(trainer)[0]["objective/kl"]) < 1e-5
    assert logs(trainer)[2]["objective/kl"] > 1e-4


def test_learns_and_keeps_close(make_trainer):
    """Reward rises; a larger coefficient holds the policy closer to the reference."""
    settings = {
        "max_steps": 12,
        "rollout_batch_size": 64,
        "per_device_train_batch_size": 64,
        "num_ppo_epochs": 4,
        "learning_rate": 6e-3,
    }
    far, near = make_trainer(kl_coef=0.0, **settings), make_trainer(kl_coef=1.0, **settings)
    far.train()
    near.train()
    first, last = logs(far)[0], logs(far)[-1]
    assert last["objective/scores"] > first["objective/scores"] + 0.5
    assert logs(near)[-1]["objective/kl"] < 0.5 * last["objective/kl"]


def test_same_seed_same_run_and_another_seed_another(make_trainer, weights):
    runs = []
    for seed in (3, 3, 4):
        trainer = make_trainer(seed=seed)
        trainer.train()
        runs.append((weights(trainer), untimed(logs(trainer))))
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert not same(runs[0][0], runs[2][0])


@pytest.mark.parametrize("size", [1, 2, 8])
def test_micro_batch_size_does_not_change_the_update(make_trainer, weights, size):
    """1 x 8, 2 x 4 and 8 x 1 give the same update (fp32, 1e-6), with responses of different lengths."""
    whole = make_trainer(per_device_train_batch_size=16, num_mini_batches=1, num_ppo_epochs=1, optim="sgd")
    cut = make_trainer(
        per_device_train_batch_size=size,
        gradient_accumulation_steps=16 // size,
        rollout_batch_size=None,
        num_mini_batches=1,
        num_ppo_epochs=1,
        optim="sgd",
    )
    whole.train()
    cut.train()
    assert cut.rollout_size == 16
    expected, got = weights(whole), weights(cut)
    assert max((expected[n] - got[n]).abs().max() for n in expected) < 1e-6
    for a, b in zip(logs(whole), logs(cut), strict=True):
        for name in ("loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "val/ratio", "objective/rlhf_reward"):
            assert a[name] == pytest.approx(b[name], abs=1e-6)


def test_metrics_are_over_real_tokens(make_trainer):
    """The logged figures are those of the rollout, worked out again row by row without padding."""
    trainer = make_trainer()
    trainer._prepare_once()
    rollout = trainer.collect(0)
    from ppo.metrics import rollout_metrics

    rollout.ref_logprobs = rollout.ref_logprobs + 0.1 * torch.randn(rollout.mask.shape)  # also at padding
    got = rollout_metrics(rollout, 0.3)
    assert rollout.lengths().unique().numel() > 1
    rows = [
        (rollout.logprobs[i, :n] - rollout.ref_logprobs[i, :n], rollout.entropy[i, :n], rollout.values[i, :n])
        for i, n in enumerate(rollout.lengths().tolist())
    ]
    kl = sum(row[0].sum() for row in rows) / len(rows)
    tokens = sum(len(row[0]) for row in rows)
    assert got["objective/kl"] == pytest.approx(float(kl), abs=1e-5)
    assert got["objective/kl_per_token"] == pytest.approx(float(kl) * len(rows) / tokens, abs=1e-6)
    assert got["policy/entropy"] == pytest.approx(float(sum(row[1].sum() for row in rows)) / tokens, abs=1e-5)
    assert got["response/length"] == tokens / len(rows)
    assert got["objective/rlhf_reward"] == pytest.approx(float(rollout.final_scores.mean() - 0.3 * kl), abs=1e-5)


def test_rollout_numbers_are_those_of_plain_forward_passes(make_trainer, tiny_llama, word_tokenizer):
    """Log-probabilities without padding, one row at a time, in the collected rollout; rewards and returns add up."""
    trainer = make_trainer(local_rollout_forward_batch_size=5, kl_coef=0.3)
    trainer._prepare_once()
    rollout = trainer.collect(0)
    for row in range(len(rollout)):
        one = rollout.select([row])
        logprobs, _ = response_logprobs(trainer.policy, one.batch())
        n = int(one.mask.sum())
        torch.testing.assert_close(rollout.logprobs[row, :n], logprobs[0, :n].detach(), atol=1e-5, rtol=0)
        ratio = (rollout.logprobs[row, :n] - rollout.ref_logprobs[row, :n]).sum()
        torch.testing.assert_close(
            rollout.rewards[row].sum(), rollout.final_scores[row] - 0.3 * ratio, atol=1e-5, rtol=0
        )
    real = rollout.advantages[rollout.mask]
    assert abs(real.mean()) < 1e-6
    assert abs(real.var(unbiased=False) - 1) < 1e-5


# ------------------------------------------------------------------------------------------------ options


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


def test_score_conventions(make_trainer):
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
        assert make_trainer(**settings).final_scores(scores, finished).tolist() == expected, settings


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
        assert trainer.score_bias == 1.0
    else:
        rollout = trainer.evaluator.mean_reference_score(8)
        assert trainer.score_bias == pytest.approx(rollout)


def test_reward_whitening_scales_rewards(make_trainer):
    plain, whitened = make_trainer(), make_trainer(whiten_rewards=True)
    rollouts = []
    for trainer in (plain, whitened):
        trainer._prepare_once()
        rollouts.append(trainer.collect(0))
    real = rollouts[0].rewards[rollouts[0].mask]
    expected = (real - real.mean()) / real.std(unbiased=False) + real.mean()
    torch.testing.assert_close(rollouts[1].rewards[rollouts[1].mask], expected, atol=1e-5, rtol=1e-5)


def test_advantages_without_whitening(make_trainer):
    trainer = make_trainer(whiten_advantages=False)
    trainer._prepare_once()
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
    before = {n: p.detach().clone() for n, p in trainer.reference.model.named_parameters()}
    trainer.train()
    policy = dict(trainer.policy.named_parameters())
    for name, tensor in trainer.reference.model.named_parameters():
        torch.testing.assert_close(tensor, 0.75 * before[name] + 0.25 * policy[name], atol=1e-6, rtol=0)


def test_pretraining_mix_raises_the_likelihood_of_its_texts(make_trainer):
    texts = Dataset.from_dict({"text": ["a film was dull and bad", "very dull story and dull plot"] * 3})
    losses = {}
    for coef in (0.0, 5.0):
        trainer = make_trainer({"ptx_dataset": texts}, ptx_coef=coef, max_steps=6, ptx_batch_size=4)
        trainer.train()
        encoded = [trainer.processing_class(text)["input_ids"] for text in texts["text"][:2]]
        from models.logprobs import pad_batch

        batch = pad_batch([ids[:1] for ids in encoded], [ids[1:] for ids in encoded], 0)
        losses[coef] = -response_logprobs(trainer.policy, batch)[0].sum().item()
    assert losses[5.0] < losses[0.0] - 1
    assert "loss/ptx_avg" in logs(trainer)[0]
    with pytest.raises(UserError, match="ptx_dataset"):
        make_trainer(ptx_coef=1.0)


def test_stop_strings_and_generation_settings(make_trainer):
    trainer = make_trainer(stop_strings=["good"], generation_kwargs={"max_new_tokens": 20, "batch_size": 4})
    trainer._prepare_once()
    rollout = trainer.collect(0)
    assert rollout.mask.shape[1] > 6
    texts = [trainer.processing_class.decode(rollout.response_ids[i][rollout.mask[i]]) for i in range(16)]
    ended = [text for text, done in zip(texts, rollout.finished.tolist(), strict=True) if done]
    assert any(text.split()[-1] == "good" for text in ended)
    assert all("good" not in text.split()[:-1] for text in texts)
    with pytest.raises(UserError, match=r"generation_kwargs.max_tokens.*Did you mean"):
        make_trainer(generation_kwargs={"max_tokens": 3})


# ------------------------------------------------------------------------------------------------ models and rewards


def test_reward_model_starts_the_value_model(make_trainer, tiny_reward, weights):
    reward = tiny_reward(1)
    trainer = make_trainer({"reward_model": reward})
    value, theirs = trainer.value_model.state_dict(), reward.state_dict()
    assert all(torch.equal(value[name], theirs[name]) for name in theirs)
    before = {name: tensor.clone() for name, tensor in theirs.items()}
    trainer.train()
    assert same(before, dict(reward.state_dict()))  # frozen
    assert not same(before, dict(trainer.value_model.state_dict()))


def test_without_reward_model_values_start_at_zero(make_trainer):
    trainer = make_trainer()
    trainer._prepare_once()
    assert not trainer.collect(0).values.any()
    assert torch.equal(trainer.value_model.model.embed_tokens.weight, trainer.policy.model.embed_tokens.weight)


def test_models_by_name(make_trainer, tiny_llama, tiny_reward, word_tokenizer, tmp_path):
    tiny_llama(0).save_pretrained(tmp_path / "policy")
    tiny_reward(1).save_pretrained(tmp_path / "reward")
    for folder in ("policy", "reward"):
        word_tokenizer.save_pretrained(tmp_path / folder)
    names = {"model": str(tmp_path / "policy"), "reward_model": str(tmp_path / "reward"), "processing_class": None}
    objects = {"model": tiny_llama(0), "reward_model": tiny_reward(1)}
    figures = []
    for parts in (names, objects):
        trainer = make_trainer(parts, max_steps=1)
        trainer.train()
        figures.append(untimed(logs(trainer)))
    assert figures[0] == figures[1]


def test_conversations_go_through_the_chat_template(make_trainer):
    seen = []

    def watch(prompts, completions, **columns):
        seen.extend(zip(prompts, completions, columns["topic"], strict=True))
        return count_good(prompts, completions)

    messages = [[{"role": "user", "content": text}] for text in PROMPTS]
    data = Dataset.from_dict({"prompt": messages, "topic": list(range(8))})
    trainer = make_trainer({"train_dataset": data, "reward_funcs": watch}, rollout_batch_size=8, max_steps=1)
    trainer.train()
    tokenizer = trainer.processing_class
    assert trainer.prompts.ids[0] == tokenizer("<|user|> the film <|assistant|>")["input_ids"]
    assert all(prompt == messages[topic] and isinstance(text, str) for prompt, text, topic in seen)


def test_pretokenised_prompts_as_trl_had_them(make_trainer, word_tokenizer):
    data = Dataset.from_dict({"input_ids": [word_tokenizer(text)["input_ids"] for text in PROMPTS]})
    trainer = make_trainer({"train_dataset": data}, max_steps=1)
    trainer.train()
    assert trainer.prompts.prompts[0] == "the film"


def test_mix_of_rewards(make_trainer, tiny_reward):
    def length(prompts, completions):
        return [len(completion.split()) for completion in completions]

    reward = tiny_reward(1)
    parts = {"reward_model": reward, "reward_funcs": [count_good, length]}
    mixed = make_trainer(parts, reward_weights=[2.0, 1.0, -0.5])
    mixed._prepare_once()
    rollout = mixed.collect(0)
    alone = make_trainer({"reward_model": reward})
    alone._prepare_once()
    scores = alone.collect(0).scores
    texts = mixed.processing_class.batch_decode(
        [rollout.response_ids[i][rollout.mask[i]] for i in range(16)], skip_special_tokens=True
    )
    expected = [
        2 * s + t.split().count("good") - 0.5 * len(t.split()) for s, t in zip(scores.tolist(), texts, strict=True)
    ]
    torch.testing.assert_close(rollout.scores, torch.tensor(expected), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="2 entries for 3 rewards"):
        make_trainer(parts, reward_weights=[1.0, 2.0])
    with pytest.raises(UserError, match="needs a reward"):
        make_trainer({"reward_funcs": None})


def test_reward_model_with_another_tokenizer(make_trainer, tiny_reward, word_tokenizer):
    """Its own ids for the same words: prompt and completion are decoded and tokenised again, EOS included."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = list(reversed([w for w in word_tokenizer.get_vocab() if w not in ("</s>", "<pad>", "<s>")]))
    vocab = {word: i for i, word in enumerate(["<end>", "<nothing>", *words])}
    other = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    other.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    other = PreTrainedTokenizerFast(
        tokenizer_object=other, eos_token="<end>", unk_token="<unk>", pad_token="<nothing>"
    )
    reward = tiny_reward(1)
    trainer = make_trainer({"reward_model": reward, "reward_processing_class": other})
    # It cannot start the value model, which reads the policy's tokens.
    assert not trainer.value_model.score.weight.any()
    trainer._prepare_once()
    rollout = trainer.collect(0)
    for row in range(len(rollout)):
        ids = [*rollout.prompt_ids[row][rollout.prompt_mask[row]], *rollout.response_ids[row][rollout.mask[row]]]
        text = word_tokenizer.decode(ids, skip_special_tokens=True)
        mine = [vocab[word] for word in text.split()] + ([0] if rollout.finished[row] else [])
        with torch.no_grad():
            state = reward.model(input_ids=torch.tensor([mine])).last_hidden_state[0, -1]
        assert rollout.scores[row] == pytest.approx(reward.score(state).item(), abs=1e-4)


def test_scorer_objects(make_trainer):
    class Scorer:
        def score(self, prompts, completions, finished):
            return [float(len(c.split())) + 10 * f for c, f in zip(completions, finished, strict=True)]

    trainer = make_trainer({"reward_model": Scorer()})
    trainer._prepare_once()
    rollout = trainer.collect(0)
    texts = [
        trainer.processing_class.decode(ids[m], skip_special_tokens=True)
        for ids, m in zip(rollout.response_ids, rollout.mask, strict=True)
    ]
    expected = [len(text.split()) + 10 * done for text, done in zip(texts, rollout.finished.tolist(), strict=True)]
    assert rollout.scores.tolist() == expected
    assert 0 < sum(rollout.finished) < 16


def test_adapters(make_trainer, tiny_reward, tmp_path):
    """The base never moves, the reference is the policy without adapters, the saved adapter loads by PEFT."""
    from peft import AutoPeftModelForCausalLM, LoraConfig

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(
        {"reward_model": tiny_reward(1), "peft_config": config}, max_steps=3, save_strategy="steps", save_steps=3
    )
    base = trainer.policy.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    before, head = base.clone(), trainer.value_model.get_base_model().score.modules_to_save["default"].weight.clone()
    trainer.train()
    assert torch.equal(base, before)
    assert not torch.equal(trainer.value_model.get_base_model().score.modules_to_save["default"].weight, head)
    assert logs(trainer)[0]["val/first_ratio_deviation"] < 1e-5
    assert abs(logs(trainer)[0]["objective/kl"]) < 1e-5
    assert logs(trainer)[-1]["objective/kl"] != 0
    names = trainer._trained()
    assert all("lora_" in name or "score" in name or "inv_freq" in name for name in names)
    trainer.policy.get_base_model().save_pretrained(tmp_path / "x")
    assert (tmp_path / "out" / "checkpoint-3" / "adapter_model.safetensors").exists()
    config_file = json.loads((tmp_path / "out" / "checkpoint-3" / "adapter_config.json").read_text())
    assert config_file["r"] == 4
    assert AutoPeftModelForCausalLM is not None


# ------------------------------------------------------------------------------------------------ evaluation


def test_evaluation_and_best_checkpoint(make_trainer, prompts, tmp_path):
    trainer = make_trainer(
        {"eval_dataset": prompts.select(range(8))},
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        kl_coef=0.1,
        num_eval_samples=3,
    )
    trainer.train()
    rows = logs(trainer, "eval_objective")
    assert [row["step"] for row in rows] == [2, 4, 6]
    for row in rows:
        assert row["eval_objective"] == pytest.approx(row["eval_reward"] - 0.1 * row["eval_kl"], abs=1e-6)
        assert row["eval_kl"] >= 0
        assert row["eval_kl_se"] >= 0
        assert 0 <= row["eval_eos_rate"] <= 1
    best = max(rows, key=lambda row: row["eval_objective"])
    assert trainer.state.best_global_step == best["step"]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / f"checkpoint-{best['step']}")
    for name, tensor in saved.named_parameters():
        assert torch.equal(tensor, dict(trainer.policy.named_parameters())[name])
    samples = json.loads((tmp_path / "out" / "samples" / "update-000006.json").read_text())
    assert len(samples) == 3
    assert {"prompt", "completion", "score", "reference_completion", "reference_score"} <= samples[0].keys()


def test_evaluation_of_the_untrained_policy(make_trainer, prompts):
    """KL exactly 0, and the same responses as the reference: both are drawn with the same seeds."""
    trainer = make_trainer({"eval_dataset": prompts.select(range(8))}, missing_eos_penalty=None)
    metrics = trainer.evaluate()
    assert metrics["eval_kl"] == 0
    assert metrics["eval_score"] == metrics["eval_reference_score"]
    with pytest.raises(UserError, match="no eval_dataset"):
        make_trainer().evaluate()


# ------------------------------------------------------------------------------------------------ edges


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
    trainer._prepare_once()
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


def test_a_policy_that_is_not_the_sampling_policy_stops(make_trainer):
    """Dropout switched on behind the trainer's back: the ratio is not 1, and the run ends with an explanation."""
    trainer = make_trainer()
    for layer in trainer.policy.model.layers:
        layer.mlp.act_fn = torch.nn.Sequential(layer.mlp.act_fn, torch.nn.Dropout(0.3))
    with pytest.raises(UserError, match="ratio must be 1"):
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
