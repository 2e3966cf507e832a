"""A score is the model's own, for every architecture: what ``model(**inputs).logits`` is, or one sentence."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
)

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.heads import load_reward
from ppo_vs_dpo.models.loading.pretrained import context_length
from ppo_vs_dpo.ppo.roles.rewards import ModelReward
from ppo_vs_dpo.reward_model.scorer import RewardScorer, store_bias
from ppo_vs_dpo.reward_model.train import run_stage
from tests.architectures import DECODERS, ENCODERS, tiny
from tests.conftest import WORDS
from tests.sft.tiny_run import context_of, make_run

PROMPTS = ["the film", "a story was", "very", "the"]
ANSWERS = ["good good bad", "dull", " very very dull and bad", "bright"]


def scalar(kind, **more):
    return tiny(kind, AutoModelForSequenceClassification, num_labels=1, **more)


def own(model, row, types=None):
    """The model's logit for one row."""
    inputs = {"input_ids": torch.tensor([list(row)]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
    if types is not None:
        inputs["token_type_ids"] = torch.tensor([types])
    with torch.no_grad():
        return model(**inputs).logits.item()


@pytest.mark.parametrize("kind", [*DECODERS, *ENCODERS])
def test_scores_are_the_models_own(kind, word_tokenizer, tmp_path):
    model = scalar(kind)
    scorer = RewardScorer(model, word_tokenizer, batch_size=3)
    rows = scorer.encode(PROMPTS, ANSWERS)
    expected = [own(model, row) for row in rows]
    assert max(expected) - min(expected) > 1e-3
    assert scorer.score_sequences(rows) == pytest.approx(expected, abs=1e-5)
    assert (scorer.reader.fast, scorer.reader.causal) == ((kind in DECODERS),) * 2
    # Saved and loaded again, as a judge that somebody else made.
    model.save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    again = RewardScorer.load(tmp_path)
    assert again.score_sequences(rows) == pytest.approx(expected, abs=1e-5)
    store_bias(tmp_path, 0.5)
    assert RewardScorer.load(tmp_path).score_sequences(rows) == pytest.approx([e - 0.5 for e in expected], abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_a_head_of_zeros_says_nothing_and_is_left_as_it_was(kind, word_tokenizer):
    model = scalar(kind)
    torch.nn.init.zeros_(model.score.weight)
    scorer = RewardScorer(model, word_tokenizer)
    assert scorer.reader.fast
    assert not model.score.weight.any()


def test_half_precision_is_told_apart_too(word_tokenizer):
    """Rounding to eight bits is no reason to doubt a decoder, nor to believe an encoder."""
    for kind, fast in [("llama", True), ("gpt2", True), ("bert", False), ("roberta", False), ("deberta-v2", False)]:
        assert RewardScorer(scalar(kind).bfloat16(), word_tokenizer).reader.fast == fast, kind


# --- how prompt and answer become one sequence -----------------------------------------------------------
def pairing_tokenizer(types=True):
    """Words between [CLS] and [SEP], as BERT's tokenizer puts two texts together."""
    pieces = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "user", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"]
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, **special)


@pytest.mark.parametrize(("kind", "types"), [("bert", True), ("deberta-v2", True), ("distilbert", False)])
def test_encoders_get_pairs_as_their_tokenizer_makes_them(kind, types, tmp_path):
    model, tokenizer = scalar(kind), pairing_tokenizer(types)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scorer = RewardScorer.load(tmp_path)
    with torch.no_grad():
        pairs = [tokenizer(p, a, return_tensors="pt") for p, a in zip(PROMPTS, ANSWERS, strict=True)]
        expected = [model(**pair).logits.item() for pair in pairs]
    assert scorer.score(PROMPTS, ANSWERS) == pytest.approx(expected, abs=1e-5)
    # A conversation of one question is that question; whether it ended is nothing that an encoder is told.
    chats = [[{"role": "user", "content": p}] for p in PROMPTS]
    answers = [[{"role": "assistant", "content": a}] for a in ANSWERS]
    assert scorer.score(chats, answers, [False] * 4) == pytest.approx(expected, abs=1e-5)
    turns = [[*chat, {"role": "assistant", "content": "not"}, {"role": "user", "content": "very"}] for chat in chats]
    joined = [tokenizer(f"{p}\n\nnot\n\nvery", a, return_tensors="pt") for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    with torch.no_grad():
        expected = [model(**pair).logits.item() for pair in joined]
    assert scorer.score(turns, answers) == pytest.approx(expected, abs=1e-5)


def test_token_types_count(tmp_path):
    """With the types left out the scores would be others: the test above tells them apart."""
    model, tokenizer = scalar("bert"), pairing_tokenizer()
    scorer = RewardScorer(model, tokenizer)
    row = scorer.encode(PROMPTS[:1], ANSWERS[:1])[0]
    assert row.token_types == [0] * 4 + [1] * 4
    assert abs(own(model, row) - own(model, row, row.token_types)) > 1e-3


def test_conversations_of_models_made_elsewhere_are_rendered_whole(word_tokenizer, tmp_path):
    """Many templates put something after the end of an answer, and their models were trained to be read there."""
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("</s> {%", "</s> and {%")
    scalar("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    chat, answer = [{"role": "user", "content": "the film"}], [{"role": "assistant", "content": "good"}]
    whole = tokenizer.apply_chat_template([*chat, *answer], return_dict=True)["input_ids"]
    foreign = RewardScorer.load(tmp_path)
    assert foreign.encode([chat], [answer]) == [whole]
    assert whole[-2:] == [tokenizer.eos_token_id, tokenizer("and")["input_ids"][0]]
    # What did not end has no end.
    assert foreign.encode([chat], [answer], [False])[0] == whole[:-2]
    assert not ModelReward(foreign, tokenizer).same_tokens
    # This project's own models are read at EOS, where the rollout ends.
    store_bias(tmp_path, 0.0)
    ours = RewardScorer.load(tmp_path)
    assert ours.encode([chat], [answer]) == [whole[:-1]]
    assert ModelReward(ours, tokenizer).same_tokens
    # With a template that ends at EOS both are the same.
    word_tokenizer.save_pretrained(tmp_path)
    assert ModelReward(RewardScorer.load(tmp_path), word_tokenizer).same_tokens


def test_where_padding_is_the_end_of_sequence_a_foreign_model_is_read_as_transformers_reads_it(
    word_tokenizer, tmp_path
):
    model = scalar("llama", pad_token_id=2)
    model.save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    scorer = RewardScorer.load(tmp_path)
    rows = scorer.encode(PROMPTS, ANSWERS)
    assert all(row[-1] == 2 for row in rows)
    assert scorer.reader.fast
    assert scorer.score_sequences(rows) == pytest.approx([own(model, row) for row in rows], abs=1e-5)
    # Ours was trained to be read at the last real token, which is that end.
    store_bias(tmp_path, 0.0)
    ours = RewardScorer.load(tmp_path)
    assert abs(ours.score_sequences(rows)[0] - own(model, rows[0])) > 1e-3


def test_a_tokenizer_without_an_end_puts_none(word_tokenizer, tmp_path):
    """There is no token that would say that a text has ended: the score is that of the text."""
    model, tokenizer = scalar("llama"), copy.deepcopy(word_tokenizer)
    tokenizer.eos_token = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scorer = RewardScorer.load(tmp_path)
    rows = [tokenizer(f"{p} {a}")["input_ids"] for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    assert scorer.encode(PROMPTS, ANSWERS) == rows
    assert scorer.score(PROMPTS, ANSWERS) == pytest.approx([own(model, row) for row in rows], abs=1e-5)


@pytest.mark.parametrize("bias", ["0.5x", None, float("nan"), True])
def test_a_bias_that_is_no_number(word_tokenizer, tmp_path, bias):
    scalar("llama").save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "score_bias": bias}))
    with pytest.raises(UserError, match=r"config\.json: score_bias is .*it must be a number"):
        RewardScorer.load(tmp_path)


# --- one sentence ----------------------------------------------------------------------------------------
def test_a_vocabulary_that_is_too_small(word_tokenizer):
    with pytest.raises(UserError, match="the reward model has 12 tokens and the tokenizer that writes its input 20"):
        RewardScorer(scalar("llama", vocabulary=12), word_tokenizer)


def test_more_than_one_number_a_sequence(word_tokenizer):
    with pytest.raises(UserError, match=r"gives \(1, 3\) for one sequence; a reward model gives one number"):
        RewardScorer(tiny("bert", AutoModelForSequenceClassification, num_labels=3), word_tokenizer)
    with pytest.raises(UserError, match="BertForTokenClassification gives"):
        RewardScorer(tiny("bert", AutoModelForTokenClassification, num_labels=1), word_tokenizer)
    with pytest.raises(UserError, match="LlamaForCausalLM gives"):
        RewardScorer(tiny("llama", AutoModelForCausalLM), word_tokenizer)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_weights_that_are_no_numbers(kind, word_tokenizer):
    model = scalar(kind)
    next(iter(model.parameters())).data.fill_(torch.nan)
    with pytest.raises(UserError, match=r"gives ordinary tokens scores that are not finite.*overflow in float32"):
        RewardScorer(model, word_tokenizer)


def test_contexts(word_tokenizer):
    """RoBERTa's first positions belong to its padding token."""
    assert context_length(scalar("roberta")) == 63
    assert context_length(scalar("bert")) == 64
    scorer = RewardScorer(scalar("roberta"), word_tokenizer)
    assert len(scorer.score(["the " * 62], [""])) == 1
    with pytest.raises(UserError, match="have 64 tokens, and the reward model takes 63"):
        scorer.score(["the " * 63], [""])
    scorer.check_context(["the " * 40], 23, "judge x", "compare.max_new_tokens")
    with pytest.raises(UserError, match=r"judge x: the longest prompt has 40 tokens .* would be 64"):
        scorer.check_context(["the " * 40, "the"], 24, "judge x", "compare.max_new_tokens")


# --- in PPO ----------------------------------------------------------------------------------------------
def trainer_with(tmp_path, word_tokenizer, reward, **settings):
    from ppo_vs_dpo.ppo.config import PPOConfig
    from ppo_vs_dpo.ppo.trainer import PPOTrainer

    args = {"output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4, "max_steps": 1, "use_cpu": True}
    args |= {"response_length": 6, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "diagnose": False}
    return PPOTrainer(
        model=tiny("llama", AutoModelForCausalLM),
        reward_model=reward,
        args=PPOConfig(**{**args, **settings}),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=word_tokenizer,
    )


def test_ppo_scores_by_an_encoder_and_values_by_the_policys_backbone(word_tokenizer, tmp_path):
    """An encoder sees what follows: it can score a whole response, and no value can start from it."""
    model = scalar("bert")
    trainer = trainer_with(tmp_path, word_tokenizer, model)
    assert type(trainer.value_model).__name__ == "LlamaForSequenceClassification"
    seen = {}
    part = trainer.roles.rewards.parts[0]
    plain = part.scorer.score

    def spy(prompts, completions, finished=None):
        seen["scores"] = plain(prompts, completions, finished)
        seen["expected"] = [own(model, row) for row in part.scorer.encode(prompts, completions, finished)]
        return seen["scores"]

    part.scorer.score = spy
    trainer.train()
    assert seen["scores"] == pytest.approx(seen["expected"], abs=1e-5)


def test_ppo_refuses_a_reward_model_that_is_too_short_before_it_samples(word_tokenizer, tmp_path):
    for kind in ("llama", "bert"):
        with pytest.raises(UserError, match=r"response_length"):
            trainer_with(tmp_path, word_tokenizer, scalar(kind, max_position_embeddings=8))


def test_a_value_head_in_the_place_of_a_runs_reward_model(word_tokenizer, tiny_llama, tmp_path):
    """reward_model.path and .head: the run's folder says what it is, to judges and to the value model."""
    theirs = tmp_path / "theirs"
    model = tiny("llama", AutoModelForCausalLM)
    model.save_pretrained(theirs)
    word_tokenizer.save_pretrained(theirs)
    torch.manual_seed(5)
    weight, bias = torch.randn(1, 32), torch.tensor([0.75])
    save_file({"v_head.summary.weight": weight, "v_head.summary.bias": bias}, theirs / "value_head.safetensors")
    settings = {"path": str(theirs), "head": "v_head", "samples": 8}
    run = make_run(tmp_path / "run", word_tokenizer, tiny_llama(), reward_model=settings)
    run_stage(context_of(run, "reward_model"))
    saved = run.path("reward_model", "model")
    scorer = RewardScorer.load(saved)
    row = [3, 9, 11, 2]
    with torch.no_grad():
        state = model.model(torch.tensor([row])).last_hidden_state[0, -1]
    assert scorer.score_sequences([row])[0] == pytest.approx((weight[0] @ state + bias).item() - scorer.bias, abs=1e-5)
    assert scorer.bias == run.done("reward_model")["figures"]["score_bias"] != 0
    value = load_reward(saved, trainable=True)
    torch.testing.assert_close(value.score.weight, torch.nn.Parameter(weight))
    assert value.score.weight.requires_grad
    # Without its name there is nothing to score with, and the stage says so.
    settings = {"path": str(theirs), "samples": 8}
    run = make_run(tmp_path / "other", word_tokenizer, tiny_llama(), reward_model=settings)
    with pytest.raises(UserError, match=r"say head: v_head"):
        run_stage(context_of(run, "reward_model"))
