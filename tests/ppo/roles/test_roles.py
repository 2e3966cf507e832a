"""The models and rewards that a trainer can be given: objects, names, functions, mixes, adapters."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.heads import load_reward
from ppo_vs_dpo.models.loading.pretrained import load_value_or_reward
from ppo_vs_dpo.models.passes.logprobs import sequence_scores
from ppo_vs_dpo.models.text.encoding import encode_completions, encode_prompts
from ppo_vs_dpo.ppo.checkpoints.saving import trained_tensors
from ppo_vs_dpo.ppo.roles.rewards import RewardError
from ppo_vs_dpo.reward_model.scorer import RewardScorer, store_bias
from tests.architectures import tiny
from tests.ppo.conftest import PROMPTS, count_good, logs, same, untimed


def test_reward_model_starts_the_value_model(make_trainer, tiny_reward):
    reward = tiny_reward(1)
    trainer = make_trainer({"reward_model": reward})
    value, theirs = trainer.value_model.state_dict(), reward.state_dict()
    assert all(torch.equal(value[name], theirs[name]) for name in theirs)
    before = {name: tensor.clone() for name, tensor in theirs.items()}
    trainer.train()
    assert same(before, dict(reward.state_dict()))  # frozen
    assert not same(before, {name: trainer.value_model.state_dict()[name] for name in before})


@pytest.mark.parametrize("bias", [0.7, "auto"])
@pytest.mark.parametrize("adapters", [False, True])
def test_values_start_on_the_scale_of_the_scores(make_trainer, tiny_reward, bias, adapters):
    """Of whole responses the value model thinks what PPO scores them, with weight and both biases."""
    from peft import LoraConfig

    reward = tiny_reward(1)
    reward.config.score_bias = 5.0
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM") if adapters else None
    trainer = make_trainer(
        {"reward_model": reward, "peft_config": config},
        score_bias=bias,
        reward_weights=[3.0],
        missing_eos_penalty=None,
        learning_rate=0.0,
        max_steps=1,
    )
    trainer.train()
    assert trainer.loop.score_bias == pytest.approx(0.7) if bias != "auto" else abs(trainer.loop.score_bias) > 1
    rollout = trainer.collect(0)
    with torch.no_grad():
        batch = rollout.batch()
        values = sequence_scores(trainer.value_model, batch.input_ids, batch.attention_mask)
    torch.testing.assert_close(values, rollout.final_scores, atol=1e-4, rtol=0)


def test_a_value_model_of_ones_own_stays_as_it_is(make_trainer, tiny_reward):
    reward, value = tiny_reward(1), tiny_reward(2)
    reward.config.score_bias = 5.0
    trainer = make_trainer({"reward_model": reward, "value_model": value}, score_bias="auto", max_steps=1)
    trainer.train()
    assert trainer.value_model.score.bias is None


def test_without_reward_model_values_start_at_zero(make_trainer):
    trainer = make_trainer()
    trainer.prepare()
    assert not trainer.collect(0).values.any()
    assert torch.equal(trainer.value_model.model.embed_tokens.weight, trainer.policy.model.embed_tokens.weight)


@pytest.mark.parametrize("ours", [True, False])
def test_models_by_name(make_trainer, tiny_llama, tiny_reward, word_tokenizer, tmp_path, ours):
    """The same models, whoever trained them."""
    tiny_llama(0).save_pretrained(tmp_path / "policy")
    reward = tiny_reward(1)
    if ours:
        reward.config.score_bias = 0.0
    reward.save_pretrained(tmp_path / "reward")
    for folder in ("policy", "reward"):
        word_tokenizer.save_pretrained(tmp_path / folder)
    names = {"model": str(tmp_path / "policy"), "reward_model": str(tmp_path / "reward"), "processing_class": None}
    objects = {"model": tiny_llama(0), "reward_model": reward}
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
    mixed.prepare()
    rollout = mixed.collect(0)
    alone = make_trainer({"reward_model": reward})
    alone.prepare()
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
    trainer.prepare()
    rollout = trainer.collect(0)
    for row in range(len(rollout)):
        ids = [*rollout.prompt_ids[row][rollout.prompt_mask[row]], *rollout.response_ids[row][rollout.mask[row]]]
        text = word_tokenizer.decode(ids, skip_special_tokens=True)
        mine = [vocab[word] for word in text.split()] + ([0] if rollout.finished[row] else [])
        with torch.no_grad():
            expected = reward(input_ids=torch.tensor([mine])).logits.item()
        assert rollout.scores[row] == pytest.approx(expected, abs=1e-4)


def test_models_are_asked_although_a_part_failed(make_trainer, tiny_reward):
    """In pieces their passes are all ranks'; who is paid by the question is not asked in vain."""
    asked = []

    def fails(prompts, completions):
        return [float("nan")] * len(prompts)

    def counts(prompts, completions):
        asked.append("function")
        return [0.0] * len(prompts)

    rewards = make_trainer({"reward_model": tiny_reward(1), "reward_funcs": [fails, counts]}).roles.rewards
    model, first, second = rewards.parts
    scored = model.scorer.score_sequences
    model.scorer.score_sequences = lambda rows: asked.append("model") or scored(rows)
    rewards.parts = [first, model, second]
    with pytest.raises(RewardError, match="fails"):
        rewards(["the"], [" film"], [[5]], [[6]], [True])
    assert asked == ["model"]


def test_scorer_objects(make_trainer):
    class Scorer:
        def score(self, prompts, completions, finished):
            return [float(len(c.split())) + 10 * f for c, f in zip(completions, finished, strict=True)]

    trainer = make_trainer({"reward_model": Scorer()})
    trainer.prepare()
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
    names = trained_tensors(trainer.model)
    assert all("lora_" in name or "score" in name or "inv_freq" in name for name in names)
    trainer.policy.get_base_model().save_pretrained(tmp_path / "x")
    assert (tmp_path / "out" / "checkpoint-3" / "adapter_model.safetensors").exists()
    config_file = json.loads((tmp_path / "out" / "checkpoint-3" / "adapter_config.json").read_text())
    assert config_file["r"] == 4
    assert AutoPeftModelForCausalLM is not None


# --- what a value model must be, and a reward model that comes as an object -------------------------------
@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("bert", {}, r"BertModel \(bert\) reads to both sides"),
        ("llama", {"num_labels": 3}, "value_model has 3 labels"),
        ("llama", {"vocabulary": 12}, "value_model has 12 tokens and the tokenizer that writes its input 20"),
        ("gpt2", {"n_positions": 8}, r"value_model takes 8 tokens, and the longest prompt \(4\) with a response of 8"),
        ("llama", {"max_position_embeddings": 8}, "value_model takes 8 tokens"),
    ],
)
def test_a_value_model_that_cannot_give_values(make_trainer, kind, more, said):
    model = tiny(kind, AutoModelForSequenceClassification, **{"num_labels": 1, **more})
    with pytest.raises(UserError, match=said):
        make_trainer({"value_model": model})


@pytest.mark.parametrize("who", ["value_model", "reward_model"])
def test_vocabularies_of_several_sizes(make_trainer, who):
    """Padded vocabularies differ between sizes of one family: fine, until a token is sampled that nobody knows."""
    policy = tiny("llama", AutoModelForCausalLM, vocabulary=24)
    with torch.no_grad():
        policy.lm_head.weight[20:] = 0
    parts = {"model": policy, who: tiny("llama", AutoModelForSequenceClassification, num_labels=1)}
    with torch.no_grad():
        policy.lm_head.weight[:20] *= 5
    trainer = make_trainer(parts, max_steps=1, temperature=0.05)
    trainer.train()
    with torch.no_grad():
        policy.lm_head.weight[22] = 9 * policy.lm_head.weight[7]
        policy.lm_head.weight[23] = -policy.lm_head.weight[22]
    trainer = make_trainer({**parts, "model": policy}, max_steps=1)
    with pytest.raises(UserError, match=r"policy sampled token 2\d, of which the .* has 20 tokens, and the policy 24"):
        trainer.train()


def test_an_object_is_read_as_its_folder_is(make_trainer, word_tokenizer, tmp_path):
    """Who trained a reward model its config says, not the way it was passed: one rule, also where reading differs."""
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("</s> {%", "</s> and {%")
    chats = [[{"role": "user", "content": text}] for text in ("the film", "a story was")]
    answers = [[{"role": "assistant", "content": text}] for text in ("good bad", "dull")]
    for pad, marked in ((0, False), (2, False), (2, True)):
        model = tiny("llama", AutoModelForSequenceClassification, num_labels=1, pad_token_id=pad)
        if marked:
            model.config.score_bias = 0.5
        folder = tmp_path / f"{pad}{marked}"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found = []
        for given in (model, str(folder)):
            parts = {"reward_model": given, "processing_class": tokenizer, "reward_funcs": None}
            (part,) = make_trainer(parts).roles.rewards.parts
            assert part.scorer.foreign != marked
            ids = [encode_prompts(tokenizer, chats), encode_completions(tokenizer, answers)]
            found.append(part(chats, answers, *ids, [True, True]))
            texts = [encode_prompts(tokenizer, ["the film"]), encode_completions(tokenizer, ["good"])]
            found[-1] += part(["the film"], ["good"], *texts, [True])
        assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_a_named_head_as_an_object_and_after_saving(make_trainer, word_tokenizer, tmp_path):
    """A value head is read at the last real token, also where that is padding to transformers, and in a new folder."""
    model = tiny("llama", AutoModelForCausalLM, pad_token_id=2)
    model.save_pretrained(tmp_path / "theirs")
    word_tokenizer.save_pretrained(tmp_path / "theirs")
    torch.manual_seed(5)
    save_file({"v_head.summary.weight": torch.randn(1, 32)}, tmp_path / "theirs" / "value_head.safetensors")
    rows = [[3, 9, 11, 2], [8, 7, 2]]
    expected = RewardScorer.load(tmp_path / "theirs", head="v_head").score_sequences(rows)
    loaded = load_reward(tmp_path / "theirs", head="v_head")
    assert make_trainer({"reward_model": loaded}).roles.rewards.parts[0].scorer.score_sequences(rows) == expected
    loaded.save_pretrained(tmp_path / "ours")
    word_tokenizer.save_pretrained(tmp_path / "ours")
    assert RewardScorer.load(tmp_path / "ours").score_sequences(rows) == pytest.approx(expected, abs=1e-6)


def test_the_bias_beside_an_adapter_goes_with_the_object(make_trainer, word_tokenizer, tmp_path):
    base = tiny("llama", AutoModelForSequenceClassification, num_labels=1)
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    word_tokenizer.save_pretrained(tmp_path / "adapter")
    store_bias(tmp_path / "adapter", 0.75)
    expected = RewardScorer.load(tmp_path / "adapter")
    assert (expected.bias, expected.foreign) == (0.75, False)
    for load in (load_reward, load_value_or_reward):
        scorer = make_trainer({"reward_model": load(tmp_path / "adapter")}).roles.rewards.parts[0].scorer
        assert (scorer.bias, scorer.foreign) == (0.75, False)
        assert scorer.score_sequences([[3, 9, 2]]) == pytest.approx(expected.score_sequences([[3, 9, 2]]), abs=1e-6)


def test_an_object_brings_the_tokenizer_of_its_folder(make_trainer, word_tokenizer, tmp_path, caplog):
    """Token ids of the policy mean other words to it: it is asked about texts, as when it is given by name."""
    pieces = {piece: number for number, piece in enumerate(reversed(word_tokenizer.get_vocab()))}
    other = PreTrainedTokenizerFast(
        tokenizer_object=turned(pieces), pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>"
    )
    tiny("llama", AutoModelForSequenceClassification, num_labels=1).save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    prompts, answers = ["the film", "a story was"], ["good bad", "dull"]
    ids = [[word_tokenizer(text)["input_ids"] for text in texts] for texts in (prompts, answers)]
    scores = []
    for given in (loaded, str(tmp_path)):
        (part,) = make_trainer({"reward_model": given}).roles.rewards.parts
        assert not part.same_tokens
        scores.append(part(prompts, answers, *ids, [True, True]))
    assert scores[0] == scores[1]
    # One of which nothing is known takes the policy's, and says so where the sizes differ.
    with caplog.at_level("WARNING"):
        make_trainer({"reward_model": tiny("llama", AutoModelForSequenceClassification, num_labels=1)})
        assert "without a tokenizer" not in caplog.text
        make_trainer({"reward_model": tiny("llama", AutoModelForSequenceClassification, 24, num_labels=1)})
    assert "reward_model came without a tokenizer" in caplog.text


def turned(pieces: dict[str, int]) -> Tokenizer:
    """A tokenizer of words with these ids."""
    tokenizer = Tokenizer(models.WordLevel(pieces, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def test_adapters_on_a_reward_model_given_as_an_object(make_trainer):
    """Its scores are those with adapters; the value model starts from the two merged."""
    model = tiny("llama", AutoModelForSequenceClassification, num_labels=1)
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        ids = torch.tensor([[3, 9, 11, 2]])
        expected = model(ids).logits.item()
    trainer = make_trainer({"reward_model": model})
    assert trainer.roles.rewards.parts[0].scorer.score_sequences(ids.tolist()) == pytest.approx([expected], abs=1e-5)
    assert trainer.value_model(ids).logits.item() == pytest.approx(expected, abs=1e-5)
    trainer.train()
