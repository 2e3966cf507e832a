"""Loading: local folders laid out as the Hub's, adapters, special tokens, and what is wrong said in words."""

import json
import multiprocessing
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, write_json
from ppo_vs_dpo.models.loading import pretrained
from ppo_vs_dpo.models.loading.config import LoraSettings, ModelConfig
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
