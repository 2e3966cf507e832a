"""Who can be a policy: next-token logits of a decoder, for every token of its tokenizer. All else is named."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.pretrained import load_policy
from ppo_vs_dpo.models.passes import padding
from ppo_vs_dpo.models.passes.answers import check_language_model
from ppo_vs_dpo.models.passes.logprobs import backbone
from ppo_vs_dpo.models.passes.padding import check_causal
from ppo_vs_dpo.ppo.roles.reference import WithoutAdapters
from tests.architectures import ENCODERS, tiny
from tests.matrix.tiny import ARCHITECTURES
from tests.matrix.tiny import tiny as tiny_policy


@pytest.mark.parametrize(
    ("kind", "auto", "said"),
    [
        ("t5", AutoModelForSeq2SeqLM, r"the policy is a T5\w+ \(t5\): an encoder-decoder"),
        ("bart", AutoModelForSeq2SeqLM, r"\(bart\): an encoder-decoder"),
        ("bert", AutoModelForMaskedLM, r"BertForMaskedLM \(bert\) reads to both sides"),
        ("bert", AutoModelForCausalLM, r"BertLMHeadModel \(bert\) reads to both sides"),
        ("roberta", AutoModelForCausalLM, r"RobertaForCausalLM \(roberta\) reads to both sides"),
        ("electra", AutoModelForCausalLM, r"\(electra\) reads to both sides"),
        ("modernbert", AutoModelForMaskedLM, r"\(modernbert\) reads to both sides"),
        ("llama", AutoModelForSequenceClassification, r"LlamaForSequenceClassification \(llama\), without a language"),
        ("llama", AutoModel, r"LlamaModel \(llama\), without a language-model head"),
    ],
)
def test_other_models_are_no_policy(word_tokenizer, kind, auto, said):
    with pytest.raises(UserError, match=said):
        check_language_model(tiny(kind, auto), word_tokenizer, "the policy")


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_an_encoder_that_was_made_a_decoder_is_one(word_tokenizer, kind):
    check_language_model(tiny(kind, AutoModelForCausalLM, is_decoder=True), word_tokenizer, "the policy")


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mixtral", "jamba", "mamba", "lfm2", "opt", "bloom"])
def test_decoders_are(word_tokenizer, name):
    assert name in ARCHITECTURES
    check_language_model(tiny_policy(name), word_tokenizer, "the policy")


@pytest.mark.parametrize("kind", [kind for kind in ENCODERS if kind not in ("bart", "t5")])
def test_no_encoder_gives_values(kind):
    with pytest.raises(UserError, match="neither a policy nor a value model"):
        check_causal(backbone(tiny(kind, AutoModelForSequenceClassification, num_labels=1)))


def test_tokens_without_an_embedding(word_tokenizer):
    """Added tokens and a model that was not resized; more embeddings than tokens are usual."""
    with pytest.raises(UserError, match="the policy has 18 tokens and the tokenizer that writes its input 20"):
        check_language_model(tiny("llama", AutoModelForCausalLM, vocabulary=18), word_tokenizer, "the policy")
    check_language_model(tiny("llama", AutoModelForCausalLM, vocabulary=64), word_tokenizer, "the policy")


def test_what_a_name_cannot_be_loaded_as(tmp_path, word_tokenizer):
    tiny("t5", AutoModelForSeq2SeqLM).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"it is an encoder-decoder of the type t5.*Give a causal language model"):
        load_policy(tmp_path)


def test_a_model_that_is_not_in_memory(word_tokenizer):
    with pytest.raises(UserError, match=r"parts of the policy are not in memory \(device_map"):
        check_language_model(tiny("llama", AutoModelForCausalLM).to("meta"), word_tokenizer, "the policy")


def test_a_probe_changes_nothing():
    model = tiny("bert", AutoModelForCausalLM, is_decoder=True).train()
    config = AutoConfig.for_model("bert", vocab_size=20)
    check_causal(model)
    assert model.training
    assert type(config).model_type == "bert"
    assert torch.is_grad_enabled()


def test_adapters_are_what_their_base_is(tiny_llama, monkeypatch):
    """A decoder that is known needs no look, with adapters on or off; with virtual tokens it is another."""

    def looked(model):
        raise LookupError

    monkeypatch.setattr(padding, "_is_causal", looked)
    monkeypatch.setattr(padding, "_reads_masks", looked)
    policy = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    for model in (policy, WithoutAdapters(policy)):
        padding.check_reads_masks(model)
    with pytest.raises(LookupError):
        check_causal(get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)))
    with pytest.raises(LookupError):
        check_causal(tiny("gpt2", AutoModelForCausalLM))
