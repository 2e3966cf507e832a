"""Half precision: all roles and phases round alike, what trains is in fp32, a reference that moves does move."""

import collections
import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.prepared import halve_frozen
from ppo_vs_dpo.models.passes.logprobs import pad_batch, response_logprobs
from ppo_vs_dpo.ppo.roles.reference import Reference
from ppo_vs_dpo.ppo.rollouts.clock import Clock
from ppo_vs_dpo.ppo.watching.diagnosis import first_ratio
from tests.ppo.conftest import logs

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}


class Products(TorchDispatchMode):
    """The dtypes of the larger matrix products, by phase: those of a scalar head are meant to be in fp32."""

    def __init__(self):
        super().__init__()
        self.seen, self.phase = collections.defaultdict(set), "outside"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in PRODUCTS and out.shape[-1] > 1 and all(min(x.shape) > 1 for x in args[-2:]):
            self.seen[self.phase].add(args[-1].dtype)
        return out


@pytest.fixture
def products(monkeypatch):
    mode, timed = Products(), Clock.__call__

    @contextlib.contextmanager
    def phase(self, name):
        with timed(self, name):
            mode.phase = name
            yield
            mode.phase = "outside"

    monkeypatch.setattr(Clock, "__call__", phase)
    return mode


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_arithmetic_for_all_roles_and_phases(make_trainer, tiny_llama, tiny_reward, products, lora, dtype):
    """bf16: sampling, scoring, reference and update in bfloat16; policy and reference are equal at first, bit for
    bit, whatever the weights came in."""
    from ppo_vs_dpo.models.loading.config import LoraSettings

    parts = {"reward_model": tiny_reward().to(dtype), "model": tiny_llama(0, initializer_range=0.2).to(dtype)}
    if lora:
        parts["peft_config"] = LoraSettings(r=2, target_modules=["q_proj", "v_proj"]).peft_config("CAUSAL_LM")
    trainer = make_trainer(parts, bf16=True, diagnose=True, eval_strategy="no")
    trainer.prepare()
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    if not lora:
        assert trainer.roles.reference.module.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    with products:
        trainer.train()
    phases = {name: kinds for name, kinds in products.seen.items() if name.startswith("time/")}
    assert phases.keys() == {"time/generate", "time/score", "time/forward", "time/train"}
    for name, kinds in phases.items():
        # Adapters multiply in fp32 where peft does.
        assert torch.bfloat16 in kinds, name
        assert lora or kinds == {torch.bfloat16}, name
    first = logs(trainer)[0]
    assert abs(first["objective/kl"]) < 1e-6
    assert first["objective/kl_k3"] < 1e-6
    after = dict(trainer.model.named_parameters())
    moved = [float((after[name] != value).float().mean()) for name, value in before.items()]
    assert sum(moved) / len(moved) > 0.4


def test_half_the_memory_and_the_same_bits(tiny_llama, tiny_reward):
    """Frozen linear layers in bfloat16 give under autocast what fp32 ones give; a tied head is left alone."""
    batch = pad_batch([[5, 6, 7], [8, 9]], [[7, 8, 2], [4, 4, 4, 6]], 0)
    for tied in (False, True):
        model = tiny_llama(3, tie_word_embeddings=tied).requires_grad_(False)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = response_logprobs(model, batch)[0]
            halve_frozen(model, torch.bfloat16)
            assert torch.equal(response_logprobs(model, batch)[0], expected)
        assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
        assert model.model.embed_tokens.weight.dtype == torch.float32
        assert model.lm_head.weight.dtype == (torch.float32 if tied else torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reference_that_follows_gets_there(tiny_llama, dtype):
    """500 steps of a thousandth go 1 - 0.999^500 = 0.3936 of the way, also where each is less than half a step."""
    policy = tiny_llama(0).to(dtype)
    reference = Reference(None, policy)
    start = [p.detach().float().clone() for p in reference.module.parameters()]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_((torch.randn(p.shape, generator=generator) * 0.01 * p.float().abs()).to(dtype))
    for step in range(500):
        reference.follow(policy, 0.001)
        if step == 250:
            # A checkpoint in between, read by another process.
            state = {name: value.clone() for name, value in reference.state(keep=True).items()}
            reference = Reference(None, policy)
            reference.load(state)

    def apart(models):
        return (
            sum(float(((p.detach().float() - s) ** 2).sum()) for p, s in zip(models.parameters(), start, strict=True))
            ** 0.5
        )

    went = {name: value.float() for name, value in reference.state(keep=True).items()}
    exact = sum(float(((went[n] - s) ** 2).sum()) for (n, _), s in zip(policy.named_parameters(), start, strict=True))
    assert exact**0.5 / apart(policy) == pytest.approx(1 - 0.999**500, rel=1e-3)
    assert apart(reference.module) / apart(policy) == pytest.approx(0.39, abs=0.06)


@pytest.mark.parametrize("settings", [{}, {"bf16": True}])
def test_dropout_is_seen_in_every_arithmetic(make_trainer, tiny_llama, monkeypatch, settings):
    """Rounding is let pass, a policy that trains with dropout is not."""
    plain = make_trainer({}, max_steps=1, **settings)
    plain.train()
    assert logs(plain)
    noisy = make_trainer({}, max_steps=1, **settings)
    for layer in noisy.policy.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(UserError, match=r"(log ratio is off|policy and reference differ) by .*dropout"):
        noisy.train()


def test_the_diagnosis_knows_the_arithmetic():
    rounded = {"first_ratio/mean": 8e-3, "first_ratio/allowed": 3e-2, "val/first_ratio_deviation": 0.2}
    assert first_ratio([rounded]) is None
    found = first_ratio([{**rounded, "first_ratio/allowed": 1e-4}])
    assert "off by 0.008 on average" in str(found)


def test_weights_move_as_in_full_precision(tiny_llama):
    """Fifty steps on the same rows in both arithmetics: the ways differ by a hundredth of their length.

    The same rows, because sampling would take another way at the first token that rounding changes.
    """
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(4, 20, (n,), generator=generator).tolist() for n in (3, 5, 2, 6) * 4]
    answers = [torch.randint(4, 20, (n,), generator=generator).tolist() for n in (8, 3, 6, 5) * 4]
    batch, moved = pad_batch(prompts, answers, 0), []
    for half in (False, True):
        model = tiny_llama(4, initializer_range=0.2).train()
        start = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0, eps=1e-5)
        for _ in range(50):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = -response_logprobs(model, batch)[0].sum() / 88
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        moved.append(torch.cat([p.detach().flatten() for p in model.parameters()]) - start)
    full, half = moved
    assert float((half - full).norm() / full.norm()) < 0.03  # 0.009
    assert float(half.norm() / full.norm()) == pytest.approx(1, rel=0.01)
