"""Loading: local folders laid out as the Hub's, adapters, special tokens, and what is wrong said in words."""

import json
import multiprocessing
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, write_json
from ppo_vs_dpo.models.loading import pretrained
from ppo_vs_dpo.models.loading.config import LoraSettings, ModelConfig
from ppo_vs_dpo.models.loading.heads import check_reward, load_reward
from ppo_vs_dpo.models.loading.prepared import disable_dropout
from ppo_vs_dpo.models.loading.pretrained import (
    build_policy,
    check_response_budget,
    eos_token_ids,
    load_policy,
    load_tokenizer,
    load_value_or_reward,
)
from ppo_vs_dpo.models.loading.vocabulary import check_same_vocabulary
from ppo_vs_dpo.models.text.prompts import encode_completion, encode_prompt, render_prompt, truncate_prompt

CHAT = [{"role": "user", "content": "the film"}]


@pytest.fixture
def folder(tiny_llama, word_tokenizer, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    word_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_policy_from_a_folder(folder, tiny_llama):
    model = load_policy(folder)
    ids = torch.tensor([[1, 6, 7]])
    torch.testing.assert_close(model(ids).logits, tiny_llama()(ids).logits, atol=0, rtol=0)
    assert not any(p.requires_grad for p in model.parameters())
    assert all(p.requires_grad for p in load_policy(folder, trainable=True).parameters())


def test_an_adapter_is_merged_into_its_base(folder, tmp_path):
    from peft import get_peft_model

    for loader, task in ((load_policy, "CAUSAL_LM"), (load_value_or_reward, "SEQ_CLS")):
        torch.manual_seed(0)
        base = loader(folder)
        config = LoraSettings(r=2, alpha=4, target_modules=["q_proj", "v_proj"]).peft_config(task)
        peft_model = get_peft_model(base, config).eval()
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        peft_model.save_pretrained(tmp_path / task)
        ids = torch.tensor([[1, 6, 7, 2]])
        merged = loader(tmp_path / task)
        torch.testing.assert_close(merged(ids).logits, peft_model(ids).logits, atol=1e-5, rtol=1e-5)


def test_padding_with_eos_is_replaced_where_a_spare_token_exists(word_tokenizer, tmp_path):
    word_tokenizer.save_pretrained(tmp_path)
    text = (tmp_path / "tokenizer_config.json").read_text()
    (tmp_path / "tokenizer_config.json").write_text(text.replace('"pad_token": "<pad>"', '"pad_token": "</s>"'))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token == "<unk>"
    assert len(tokenizer) == len(word_tokenizer)


def test_from_scratch_takes_its_vocabulary_from_the_tokenizer(word_tokenizer):
    config = ModelConfig(
        architecture={
            "model_type": "llama",
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "intermediate_size": 16,
        }
    )
    torch.manual_seed(3)
    one = build_policy(config, word_tokenizer)
    torch.manual_seed(3)
    two = build_policy(config, word_tokenizer)
    assert one.config.vocab_size == 20
    assert eos_token_ids(one, word_tokenizer) == [2]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    with pytest.raises(UserError, match="no model_type"):
        build_policy(ModelConfig(), word_tokenizer)
    with pytest.raises(UserError, match=r"model\.architecture: .*lama"):
        build_policy(ModelConfig(architecture={"model_type": "lama"}), word_tokenizer)


def test_dropout_is_off_everywhere():
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2))
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            attention_dropout=0.5,
        )
    )
    for model in (gpt2, llama):
        disable_dropout(model)
        model.train()
        ids = torch.arange(10)[None]
        assert torch.equal(model(ids).logits, model(ids).logits)


def test_errors_name_the_cause(folder, tmp_path, word_tokenizer, tiny_llama):
    with pytest.raises(UserError, match=r"model folder \./nowhere does not exist"):
        load_policy("./nowhere")
    with pytest.raises(UserError, match="could not load a tokenizer from someone/not-here"):
        load_tokenizer("someone/not-here")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"no config.json \(found: notes.txt\)"):
        load_policy(tmp_path / "empty")
    with pytest.raises(UserError, match="20 tokens and the reference 21"):
        check_same_vocabulary(tiny_llama(), tiny_llama(vocab_size=21))
    with pytest.raises(UserError, match=r"need 70 positions, and the model has 64"):
        check_response_budget(tiny_llama(), 20, 50, "ppo")
    with pytest.raises(UserError, match=r"model\.dtype"):
        ModelConfig(dtype="fp32")
    with pytest.raises(UserError, match="neither a template nor a file"):
        load_tokenizer(folder, ModelConfig(chat_template="nowhere.jinja"))


def test_what_stands_in_the_way_of_a_folder(folder, tmp_path):
    """Code of its own, a quantisation whose package is missing, an adapter of another vocabulary: one sentence."""
    ran = tmp_path / "ran"
    config = read_json(folder / "config.json")
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "conf.Mine", "AutoModelForCausalLM": "conf.Mine"}}
    write_json(folder / "config.json", {**config, **own})
    (folder / "conf.py").write_text(f"open({str(ran)!r}, 'w')")
    with pytest.raises(UserError, match=r"custom code .*only if you ask for it.*model.trust_remote_code=true"):
        load_policy(folder)
    assert not ran.exists()
    write_json(folder / "config.json", {**config, "quantization_config": {"quant_method": "awq", "bits": 4}})
    with pytest.raises(UserError, match=r"could not load a causal language model from .*gptqmodel"):
        load_policy(folder)
    write_json(folder / "config.json", config)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(24)
    settings = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"could not load an adapter from .*size mismatch .*do not fit"):
        load_policy(tmp_path / "adapter")


def without(folder, *names):
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k not in names}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 3}, r"lacks 9 weights .*model\.layers\.2\.input_layernorm\.weight"),
        ({"num_hidden_layers": 1}, r"has 9 weights that the model of its config\.json has no place for"),
        ("lm_head.weight", r"lacks 1 weights .*\(lm_head\.weight\).*Is it a reward model, or a backbone alone\?"),
        ("model.layers.1.mlp.up_proj.weight", r"lacks 1 weights .*they would be random"),
        ("model.norm.weight", r"lacks 1 weights"),
    ],
)
def test_a_policy_is_the_one_that_its_folder_holds(folder, change, said):
    """transformers draws what is missing and drops what is over, with a note on the console."""
    if isinstance(change, dict):
        write_json(folder / "config.json", {**read_json(folder / "config.json"), **change})
    else:
        without(folder, change)
    with pytest.raises(UserError, match=said):
        load_policy(folder)
    if change == "lm_head.weight":
        assert load_value_or_reward(folder).score.out_features == 1  # which has no use for it
        return
    with pytest.raises(UserError, match=r"weights"):
        load_value_or_reward(folder)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_weights_that_were_saved_inside_of_a_wrapper(folder, prefix):
    """Nobody is told that their weights are missing, or to name a head module.score."""
    weights = load_file(folder / "model.safetensors")
    weights = {f"{prefix}{key}": value for key, value in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"every weight begins with {prefix}.*unwrap_model"):
        load_policy(folder)
    save_file({**weights, f"{prefix}score.weight": torch.ones(1, 16)}, folder / "model.safetensors", {"format": "pt"})
    for look in (load_reward, check_reward, load_value_or_reward):
        with pytest.raises(UserError, match=rf"every weight begins with {prefix}"):
            look(folder)


def test_a_reward_models_folder_is_no_policy(folder, word_tokenizer):
    load_value_or_reward(folder).save_pretrained(folder)
    with pytest.raises(UserError, match="Is it a reward model"):
        load_policy(folder)
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "num_hidden_layers": 1})
    with pytest.raises(UserError, match="describes a smaller model than the one that was saved"):
        load_reward(folder)


def test_tied_weights_and_foreign_heads_are_nothing_to_complain_of(tiny_llama, tmp_path):
    """An output layer that is the embedding is saved once; a value head beside a language model is not its own."""
    model = tiny_llama(0, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in weights
    save_file({**weights, "v_head.0.weight": torch.zeros(1, 16)}, tmp_path / "model.safetensors", {"format": "pt"})
    ids = torch.tensor([[6, 7, 8]])
    assert torch.equal(load_policy(tmp_path)(ids).logits, model(ids).logits)


def test_weights_that_cannot_be_read(folder):
    (folder / "model.safetensors").write_bytes(b"<html>")
    for load in (load_policy, load_value_or_reward, load_reward):
        with pytest.raises(UserError, match=r"the weights in .* cannot be read"):
            load(folder)


def test_prompts(word_tokenizer):
    assert encode_prompt(word_tokenizer, "the film") == [6, 7]
    assert render_prompt(word_tokenizer, CHAT) == "<|user|> the film <|assistant|> "
    assert encode_prompt(word_tokenizer, CHAT) == [4, 6, 7, 5]
    assert encode_completion(word_tokenizer, "was good") == [8, 9, 2]
    assert encode_completion(word_tokenizer, [{"role": "assistant", "content": "was"}], finished=False) == [8]
    assert truncate_prompt([1, 2, 3], 2) == [2, 3]
    with pytest.raises(UserError, match="empty prompt"):
        encode_prompt(word_tokenizer, "")


def test_conversations_need_a_template(word_tokenizer):
    import copy

    bare = copy.deepcopy(word_tokenizer)
    bare.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        encode_prompt(bare, CHAT)


def test_remote_code_is_fetched_by_one_process_at_a_time(tmp_path, monkeypatch):
    """transformers writes it without a lock; four ranks that load at once take turns."""
    from transformers import dynamic_module_utils

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}))
    noted = tmp_path / "noted"

    def slow(name, path, revision=None):
        with noted.open("a") as file:
            file.write(f"in {name}\n")
            file.flush()
            time.sleep(0.2)
            file.write("out\n")

    monkeypatch.setattr(dynamic_module_utils, "get_class_from_dynamic_module", slow)
    monkeypatch.setattr("transformers.utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=pretrained.fetch_code, args=(str(tmp_path),)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert noted.read_text() == "in own.Config\nout\n" * 4
