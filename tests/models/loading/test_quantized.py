"""QLoRA: stages that train adapters on a base in 4 bits, and what they say where that cannot be."""

import importlib.util
import json

import pytest
import torch
from omegaconf import OmegaConf
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import ppo_vs_dpo.dpo.train as dpo_train
import ppo_vs_dpo.ppo.stage.train as ppo_train
import ppo_vs_dpo.reward_model.train as reward_model_train
import ppo_vs_dpo.sft.train as sft_train
from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_jsonl
from ppo_vs_dpo.artifacts.resources import parameters_without_embeddings
from ppo_vs_dpo.artifacts.stage import StageContext
from ppo_vs_dpo.models.loading.config import LoraSettings, ModelConfig
from ppo_vs_dpo.models.loading.pretrained import load_policy, load_value_or_reward
from ppo_vs_dpo.models.loading.quantized import in_4bit, quantization
from tests.ppo.conftest import make_trainer, prompts, tiny_reward  # noqa: F401 (fixtures)
from tests.ppo.roles.test_shared import save_reward_adapter
from tests.ppo.stage.test_train import run_folder  # noqa: F401 (a fixture)
from tests.sft.tiny_run import context_of, make_run

STAGES = {"sft": sft_train, "reward_model": reward_model_train, "dpo": dpo_train}
LORA = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"], "load_in_4bit": True}
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture
def make(word_tokenizer, tiny_llama, tmp_path):
    """A run folder whose stages train adapters on a base in 4 bits; every stage starts from ``sft/model``."""

    def build(**keys):
        model = tiny_llama(hidden_size=64, intermediate_size=128, initializer_range=0.2)
        path = {"path": str(tmp_path / "run" / "sft" / "model")}
        section = {"lora": LORA, "learning_rate": 1e-2, **keys}
        return make_run(tmp_path / "run", word_tokenizer, model, model=path, **dict.fromkeys(STAGES, section))

    return build


def test_without_bitsandbytes(make, monkeypatch):
    run, find = make(), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    for stage, module in STAGES.items():
        with pytest.raises(UserError, match=rf"{stage}.lora.load_in_4bit needs .* pip install 'ppo-vs-dpo\[qlora\]'"):
            module.run_stage(context_of(run, stage))


def test_what_cannot_be(make):
    run = make()
    lora, config = LoraSettings(**LORA), ModelConfig()
    assert quantization(None, config, context_of(run, "dpo")) is None
    assert quantization(LoraSettings(), config, context_of(run, "dpo")) is None
    run.config.deepspeed = {"zero_optimization": {"stage": 2}}
    with pytest.raises(UserError, match=r"dpo.lora.load_in_4bit: DeepSpeed cannot split a 4-bit base"):
        quantization(lora, config, context_of(run, "dpo"))
    save_reward_adapter(run.path("sft", "model"), run.path("adapter"))
    for load in (load_policy, load_value_or_reward):
        with pytest.raises(UserError, match="holds an adapter alone"):
            load(run.path("adapter"), config, quantization=object())
    run.config.deepspeed, run.config.model.path = None, None
    if importlib.util.find_spec("bitsandbytes"):
        with pytest.raises(UserError, match=r"sft.lora.load_in_4bit .* model.path names none"):
            sft_train.run_stage(context_of(run, "sft"))


@needs_bitsandbytes
def test_a_base_in_4_bits(make):
    """A quarter to a third of the bytes, nearly the same logits, and the right number of parameters."""
    run = make()
    folder, config = run.path("sft", "model"), ModelConfig()
    base = quantization(LoraSettings(**LORA), config, context_of(run, "dpo"))
    whole, packed = load_policy(folder, config), load_policy(folder, config, True, base)
    assert in_4bit(packed)
    assert not any(parameter.requires_grad for parameter in packed.parameters())
    ids = torch.arange(4, 12)[None]
    one, other = whole(ids).logits.log_softmax(-1), packed(ids).logits.log_softmax(-1)
    assert 1e-4 < (one - other).abs().mean() < 0.5 * one.std()
    assert parameters_without_embeddings(whole) == parameters_without_embeddings(packed)
    scorer = load_value_or_reward(folder, config, True, base)
    assert type(scorer.score) is torch.nn.Linear
    linear = packed.model.layers[0].mlp.up_proj
    assert linear.weight.numel() * linear.weight.element_size() == 64 * 128 / 2


@needs_bitsandbytes
def test_gradients_after_an_evaluation(make):
    """A pass in evaluation mode leaves the gradients of the next one as they were."""
    run = make()
    lora, config = LoraSettings(**LORA), ModelConfig()
    base = quantization(lora, config, context_of(run, "dpo"))
    model = get_peft_model(load_policy(run.path("sft", "model"), config, True, base), lora.peft_config("CAUSAL_LM"))
    ids = torch.arange(4, 12)[None]

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model.train()(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    with torch.no_grad():
        model.eval()(ids)
    for one, other in zip(before, gradients(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@needs_bitsandbytes
@pytest.mark.parametrize("stage", list(STAGES))
def test_a_stage_on_a_base_in_4_bits(make, monkeypatch, stage):
    """It learns, its adapter merges into the base as it was saved, and the result loads by itself."""
    run, module = make(), STAGES[stage]
    seen, save = [], module.save_model

    def spy(trainer, *arguments):
        seen.append(in_4bit(trainer.model))
        assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
        return save(trainer, *arguments)

    monkeypatch.setattr(module, "save_model", spy)
    # The sft stage reads and writes the same folder here.
    before = load_policy(run.path("sft", "model"))
    if stage == "sft":
        config = OmegaConf.load(run.path("config.yaml"))
        config.model.path = str(run.path("start"))
        run.path("sft", "model").rename(run.path("start"))
        OmegaConf.save(config, run.path("config.yaml"))
        run = type(run)(run.root)
    module.run_stage(context_of(run, stage))
    assert seen == [True]
    losses = [row["loss"] for row in read_jsonl(run.path(stage, "metrics.jsonl")) if "loss" in row]
    assert losses[-1] < losses[0]
    if stage == "reward_model":
        AutoModelForSequenceClassification.from_pretrained(run.path(stage, "model"), num_labels=1)
        return
    merged = AutoModelForCausalLM.from_pretrained(run.path(stage, "model"))
    assert not getattr(merged.config, "quantization_config", None)
    adapted = PeftModel.from_pretrained(before, run.path(stage, "adapter"))
    ids = torch.arange(4, 10)[None]
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-4, rtol=0)


@needs_bitsandbytes
@pytest.mark.parametrize("settings", [{}, {"value_from": "policy"}, {"shared_base": True}], ids=str)
def test_ppo_on_a_base_in_4_bits(run_folder, word_tokenizer, tiny_llama, tiny_reward, settings):  # noqa: F811
    """Four updates, the ratio 1 on each first pass (the trainer checks), a merged policy that loads by itself."""
    run = run_folder(lora=LORA, learning_rate=1e-2, **settings)
    base, wide = run.path("sft", "model"), {"hidden_size": 64, "intermediate_size": 128}
    # A row as wide as one of bitsandbytes' blocks of 64 weights.
    tiny_llama(0, **wide).save_pretrained(base)
    tiny_reward(1, **wide).save_pretrained(run.path("reward_model", "model"))
    save_reward_adapter(base, run.path("reward_model", "adapter"))
    word_tokenizer.save_pretrained(run.path("reward_model", "adapter"))
    ppo_train.run_stage(StageContext(run, "ppo"))
    assert run.done("ppo")["figures"]["updates"] == 4
    merged = AutoModelForCausalLM.from_pretrained(run.path("ppo", "model"))
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run.path("ppo", "adapter"))
    ids = torch.arange(4, 10)[None]
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-4, rtol=0)
    assert json.loads((run.path("ppo", "adapter") / "adapter_config.json").read_text())["r"] == 4
