"""Adapters: merged they are the model that was trained, also on tied embeddings; what cannot be carried is named."""

import copy
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.adapters import base_that_trains, check_adapters, merge
from ppo_vs_dpo.models.loading.heads import load_reward
from ppo_vs_dpo.models.loading.prepared import halve_frozen, is_halved
from ppo_vs_dpo.models.loading.pretrained import load_policy
from ppo_vs_dpo.models.passes.answers import answers
from ppo_vs_dpo.models.sampling.weights import check_mergeable
from ppo_vs_dpo.models.training import write_model

CAUSAL = {"task_type": "CAUSAL_LM"}


@pytest.fixture
def base(tiny_llama, word_tokenizer, tmp_path):
    """A function that saves a tiny Llama and loads it again: its adapters then know where it lies."""

    def build(auto=AutoModelForCausalLM, **config):
        tiny_llama(0, **config).save_pretrained(tmp_path / "base")
        word_tokenizer.save_pretrained(tmp_path / "base")
        return auto.from_pretrained(tmp_path / "base", **({} if auto is AutoModelForCausalLM else {"num_labels": 1}))

    return build


def disturbed(model):
    """Every weight that trains moved, as by training."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


SETTINGS = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "tied by peft": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [4, 5]},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("settings", SETTINGS)
def test_merged_is_what_was_trained(base, tmp_path, settings, tied):
    policy = disturbed(get_peft_model(base(tie_word_embeddings=tied), LoraConfig(r=2, **CAUSAL, **SETTINGS[settings])))
    expected = answers(policy)
    policy.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    loaded = load_policy(tmp_path / "adapter")
    torch.testing.assert_close(answers(loaded), expected, atol=2e-5, rtol=0)
    # What the merged model's folder gives is the same, whatever its configuration said about tied weights.
    merged = merge(policy)
    torch.testing.assert_close(answers(merged), expected, atol=2e-5, rtol=0)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(answers(load_policy(tmp_path / "merged")), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", [VeraConfig, IA3Config])
def test_other_sums_of_weights(base, tmp_path, kind):
    more = {"feedforward_modules": ["down_proj"]} if kind is IA3Config else {"r": 4}
    targets = ["k_proj", "down_proj"] if kind is IA3Config else ["q_proj", "o_proj"]
    policy = disturbed(get_peft_model(base(), kind(**CAUSAL, target_modules=targets, **more)))
    policy.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(answers(load_policy(tmp_path / "adapter")), answers(policy), atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_refused(base, tmp_path, kind):
    name = {PromptTuningConfig: "PROMPT_TUNING", PrefixTuningConfig: "PREFIX_TUNING"}[kind]
    policy = get_peft_model(base(), kind(**CAUSAL, num_virtual_tokens=3))
    with pytest.raises(UserError, match=rf"the policy: adapter default is {name}: virtual tokens"):
        check_adapters(policy, "the policy")
    policy.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=rf"adapter: its adapter is {name}"):
        load_policy(tmp_path / "adapter")
    with pytest.raises(UserError, match=rf"adapter: its adapter is {name}"):
        load_reward(tmp_path / "adapter")


def test_adapters_that_transformers_holds_or_that_are_off_are_refused(base):
    model = base()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UserError, match=r"the policy has adapters that transformers holds .*get_peft_model"):
        check_adapters(model, "the policy")
    policy = get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj"], **CAUSAL))
    check_adapters(policy, "the policy")
    policy.disable_adapter_layers()
    with pytest.raises(UserError, match=r"adapters that are switched off .*enable_adapter_layers"):
        check_adapters(policy, "the policy")


@pytest.mark.parametrize(
    ("settings", "trains"),
    [({}, False), ({"bias": "all"}, True), ({"bias": "lora_only"}, True), ({"modules_to_save": ["lm_head"]}, False)],
)
def test_what_no_switch_takes_back(base, settings, trains):
    """By name what `disable_adapter` does: it gives the model that was, unless the base itself has moved."""
    model = base(attention_bias=True, mlp_bias=True)
    given = answers(model)
    policy = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], **CAUSAL, **settings))
    assert bool(base_that_trains(policy)) == trains
    disturbed(policy)
    with policy.disable_adapter():
        assert ((answers(policy) - given).abs().max() > 1e-2) == trains


def test_an_engine_gets_no_adapter_on_tied_embeddings(base):
    policy = get_peft_model(base(tie_word_embeddings=True), LoraConfig(r=2, target_modules=["lm_head"], **CAUSAL))
    with pytest.raises(UserError, match="LORA with an adapter on tied embeddings"):
        check_mergeable(policy)
    check_mergeable(get_peft_model(base(), LoraConfig(r=2, target_modules=["lm_head"], **CAUSAL)))


def test_a_reward_model_under_adapters(base, tmp_path):
    model = base(AutoModelForSequenceClassification)
    policy = disturbed(get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])))
    policy.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[3, 4, 5, 2]])
    with torch.no_grad():
        torch.testing.assert_close(load_reward(tmp_path / "adapter")(ids).logits, policy(ids).logits)


@pytest.mark.parametrize("held", [True, False])
def test_new_tokens_without_their_embeddings(base, word_tokenizer, tmp_path, held):
    """Loading enlarges the base for the tokenizer beside the adapter: by random rows, unless the adapter has them."""
    model, tokenizer = base(), copy.deepcopy(word_tokenizer)
    tokenizer.add_tokens(["<new>", "<newer>"])
    model.resize_token_embeddings(len(tokenizer))
    policy = disturbed(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], **CAUSAL)))
    policy.save_pretrained(tmp_path / "adapter", save_embedding_layers=held)
    tokenizer.save_pretrained(tmp_path / "adapter")
    if held:
        torch.testing.assert_close(answers(load_policy(tmp_path / "adapter")), answers(policy), atol=2e-5, rtol=0)
        return
    with pytest.raises(UserError, match=r"a tokenizer of 22 tokens, its base .* has 20, .* would be random"):
        load_policy(tmp_path / "adapter")


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_whose_base_has_no_head(base, tmp_path, tied):
    policy = disturbed(
        get_peft_model(base(tie_word_embeddings=tied), LoraConfig(r=2, target_modules=["q_proj"], **CAUSAL))
    )
    policy.save_pretrained(tmp_path / "adapter")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights.pop("lm_head.weight", None)
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    if tied:
        torch.testing.assert_close(answers(load_policy(tmp_path / "adapter")), answers(policy), atol=2e-5, rtol=0)
        return
    with pytest.raises(UserError, match=r"the base of the adapter .* lacks lm_head: it would be random"):
        load_policy(tmp_path / "adapter")


def test_a_base_in_half_precision_is_what_autocast_makes_of_it(base):
    """Under autocast the same answers and the same gradients of the adapters, to the last bit; without its casts."""
    ids, found = torch.tensor([[1, 6, 7, 8, 9]]), []
    for halved in (False, True):
        torch.manual_seed(1)
        settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **CAUSAL)
        model = get_peft_model(base(), settings)
        if halved:
            halve_frozen(model, torch.bfloat16)
        assert is_halved(model) == halved
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids).logits
            logits.float().square().mean().backward()
        found.append([logits, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n or "embed" in n} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "base_layer" in n or "mlp" in n} == {torch.bfloat16}
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("labels", [2, 1])
def test_a_base_in_half_precision_is_merged_as_it_was_saved(base, word_tokenizer, tmp_path, labels):
    """What is written is the saved base in fp32 and the adapter, not the base that trained in bfloat16. A policy is
    one whatever number of labels its configuration has."""
    model = disturbed(get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **CAUSAL)))
    expected = merge(copy.deepcopy(model))
    halve_frozen(model, torch.bfloat16)
    model.config.num_labels = labels
    context = SimpleNamespace(dir=tmp_path / "ppo", run=SimpleNamespace(config=OmegaConf.create({})))
    context.dir.mkdir()
    write_model(model, word_tokenizer, context, adapters=[model.active_adapter])
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "ppo" / "model")
    assert {p.dtype for p in written.parameters()} == {torch.float32}
    for mine, theirs in zip(written.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)
