"""The arithmetic of a stage: its own keys, else the model's, else what the device has."""

import pytest
import torch

from ppo_vs_dpo.models import devices
from ppo_vs_dpo.models.devices import arithmetic
from ppo_vs_dpo.models.loading.config import ModelConfig
from ppo_vs_dpo.models.loading.prepared import train_in_full
from ppo_vs_dpo.pipeline.composing.compose import load
from ppo_vs_dpo.ppo.rollouts.checks import rounding

TRAINED = ("sft", "reward_model", "dpo", "ppo")


@pytest.fixture
def ampere(monkeypatch):
    """A GPU with bfloat16 and tf32."""
    monkeypatch.setattr(devices, "has_bf16", lambda: True)
    monkeypatch.setattr(devices, "has_tf32", lambda: True)


EVERYTHING = {"bf16": True, "gradient_checkpointing": True, "tf32": True}


@pytest.mark.parametrize(
    ("model", "passed", "accelerator", "expected"),
    [
        ({}, {}, True, EVERYTHING),
        ({}, {}, False, {"bf16": False, "gradient_checkpointing": False}),
        ({}, {"bf16": None}, True, EVERYTHING),
        ({}, {"bf16": False}, True, {**EVERYTHING, "bf16": False}),
        ({}, {"fp16": True}, True, {**EVERYTHING, "bf16": False}),
        ({}, {"tf32": False}, True, {**EVERYTHING, "tf32": False}),
        ({}, {"gradient_checkpointing": False}, True, {**EVERYTHING, "gradient_checkpointing": False}),
        ({"bf16": False}, {}, True, {**EVERYTHING, "bf16": False}),
        ({"bf16": False}, {"bf16": True}, True, EVERYTHING),
        ({"dtype": "bfloat16"}, {}, False, {"bf16": True, "gradient_checkpointing": False}),
    ],
)  # fmt: skip
def test_who_decides(ampere, model, passed, accelerator, expected):
    assert arithmetic(ModelConfig(**model), passed, accelerator) == expected


def test_an_old_gpu_computes_in_fp32(monkeypatch):
    """A V100 has neither bfloat16 nor tf32."""
    monkeypatch.setattr(devices, "has_bf16", lambda: False)
    assert arithmetic(ModelConfig(), {}, True) == {"bf16": False, "gradient_checkpointing": True}


@pytest.mark.parametrize(
    ("experiment", "given"),
    [("hh", "data.path=x"), ("llama3_dpo", "seed=1"), ("constitution_chat", "data.prompts_path=x")],
)
def test_real_models_train_in_bf16_on_a_gpu(ampere, experiment, given):
    config = load([f"experiment={experiment}", "model.path=NAME", given])
    model = ModelConfig(**{key: config.model[key] for key in ("dtype", "bf16", "gradient_checkpointing")})
    for stage in TRAINED:
        assert arithmetic(model, dict(config[stage]), True) == EVERYTHING
        assert arithmetic(model, dict(config[stage]), False)["gradient_checkpointing"] is False


def test_the_tiny_model_stays_exact_on_a_gpu(ampere):
    config = load(["experiment=quickstart"])
    model = ModelConfig(**{key: config.model[key] for key in ("dtype", "bf16", "gradient_checkpointing")})
    for stage in TRAINED:
        expected = {"bf16": False, "gradient_checkpointing": False, "tf32": True}
        assert arithmetic(model, dict(config[stage]), True) == expected


def test_small_steps_are_not_lost(tiny_llama):
    """At a learning rate of 3e-6 weights in bfloat16 stand still; what trains is therefore in fp32."""
    dtype = torch.bfloat16

    def moved(model) -> float:
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-6, weight_decay=0.0)
        for _ in range(4):
            ids = torch.randint(3, 20, (4, 8), generator=torch.Generator().manual_seed(0))
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        pairs = list(zip(before, model.parameters(), strict=True))
        return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a in before)

    assert moved(tiny_llama().to(dtype)) < 0.2
    model = tiny_llama().to(dtype)
    frozen = model.model.embed_tokens.weight.requires_grad_(False)
    train_in_full(model, sharded=True)
    assert {p.dtype for p in model.parameters()} == {dtype}
    train_in_full(model, sharded=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert frozen.dtype == dtype
    model = tiny_llama().to(dtype)
    train_in_full(model, sharded=False)
    assert moved(model) > 0.8


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_tf32_is_read_where_transformers_says_it(monkeypatch, precision):
    """From torch 2.9 on: reading the old flag beside the new one raises, on every GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.backends.fp32_precision
    try:
        torch.backends.fp32_precision = precision
        assert devices.computes_in_tf32() == (precision == "tf32")
        assert rounding(torch.float32) == (5e-3 if precision == "tf32" else 1e-4)
    finally:
        torch.backends.fp32_precision = before
