"""The layers written for packed rows equal transformers' own: each piece in float64, whole models in fp32."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from ppo_vs_dpo.models.loading.pretrained import load_value_or_reward
from ppo_vs_dpo.models.passes import fused
from ppo_vs_dpo.models.passes.fused import GatedUnit, RMSNorm, Rotary, fuse, gated_unit, layer_forward, norm_forward
from ppo_vs_dpo.models.passes.logprobs import pad_batch, response_logprobs, response_values, sequence_scores

PROMPTS = [[3, 4, 5], [6, 7], [8, 9, 10, 11, 12, 13, 14], [5, 6], [4]]
RESPONSES = [[6, 7, 8, 9], [5], [], [10, 11, 12], [13, 14, 15, 16, 17, 18, 4, 3]]


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_norm():
    torch.manual_seed(0)
    x, weight = double(2, 5, 8), double(8)
    expected = weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(RMSNorm.apply(x, weight, 1e-6), expected)
    assert gradcheck(lambda x, weight: RMSNorm.apply(x, weight, 1e-6), (x, weight))
    # Frozen weights, as under adapters; a frozen input, as in the first layer.
    assert gradcheck(lambda x: RMSNorm.apply(x, weight.detach(), 1e-6), (x,))
    assert gradcheck(lambda weight: RMSNorm.apply(x.detach(), weight, 1e-6), (weight,))


def test_gated_unit():
    torch.manual_seed(0)
    gate, up = double(5, 7), double(5, 7)
    torch.testing.assert_close(GatedUnit.apply(gate, up), F.silu(gate) * up)
    assert gradcheck(GatedUnit.apply, (gate, up))


def test_rotary():
    torch.manual_seed(0)
    x, angles = double(6, 3, 8), torch.rand(6, 4, dtype=torch.float64)
    # Long-context variants scale both.
    cos, sin = (1.3 * torch.cat([f(angles)] * 2, -1).unsqueeze(1) for f in (torch.cos, torch.sin))
    expected, _ = apply_rotary_pos_emb(
        x[None].transpose(1, 2), x[None].transpose(1, 2), cos[None, :, 0], sin[None, :, 0]
    )
    torch.testing.assert_close(Rotary.apply(x, cos, sin), expected.transpose(1, 2)[0])
    assert gradcheck(lambda x: Rotary.apply(x, cos, sin), (x,))


def small(architecture: str, **settings):
    torch.manual_seed(1)
    shape = {
        "vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2,
    }  # fmt: skip
    config = AutoConfig.for_model(architecture, **{**shape, **settings})
    return AutoModelForCausalLM.from_config(config)


def results(model, batch) -> list[torch.Tensor]:
    model.zero_grad()
    logprobs, _ = response_logprobs(model, batch, 0.7)
    logprobs.pow(2).sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [logprobs.detach(), *grads]


@pytest.mark.parametrize("settings", [{}, {"hidden_act": "gelu"}], ids=["silu", "gelu"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_whole_models(architecture, checkpointing, settings, monkeypatch):
    """Log-probabilities and all gradients, with grouped queries, an empty response, and recomputed activations."""
    if architecture == "mistral":
        settings = {**settings, "sliding_window": None}
    ours, plain = small(architecture, **settings), small(architecture, **settings)
    for model in (ours, plain):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = pad_batch(PROMPTS, RESPONSES, 0)
    got = results(ours, batch)
    assert ours.model.layers[0].forward.func is layer_forward
    monkeypatch.setattr(fused, "LAYERS", ())
    expected = results(plain, batch)
    assert "forward" not in vars(plain.model.layers[0])
    for one, other in zip(got, expected, strict=True):
        assert (one - other).abs().max() <= 5e-6 * other.abs().max().clamp_min(1)


def test_values_and_scores(tiny_llama, tmp_path, monkeypatch):
    tiny_llama().save_pretrained(tmp_path)
    model = load_value_or_reward(tmp_path, trainable=True)
    batch = pad_batch(PROMPTS, RESPONSES, 0)

    def compute():
        model.zero_grad()
        values, scores = response_values(model, batch), sequence_scores(model, batch.input_ids, batch.attention_mask)
        (values.pow(2).sum() + scores.pow(2).sum()).backward()
        return [values.detach(), scores.detach(), *[p.grad.clone() for p in model.parameters()]]

    got = compute()
    monkeypatch.setattr("ppo_vs_dpo.models.passes.logprobs.can_pack", lambda model: False)
    for one, other in zip(got, compute(), strict=True):
        assert (one - other).abs().max() <= 5e-6 * other.abs().max().clamp_min(1)


def test_without_gradients_the_same_bits_in_less_memory():
    torch.manual_seed(0)
    gate, up, x = torch.randn(3, 5, 16).unbind()
    norm = LlamaRMSNorm(16, eps=1e-6)
    norm.weight.data.normal_()
    expected = [GatedUnit.apply(gate, up), RMSNorm.apply(x, norm.weight, 1e-6)]
    before = [one.clone() for one in (gate, up, x)]
    with torch.no_grad():
        found = [gated_unit(gate, up), norm_forward(norm, x, packed=True)]
    for one, other in zip([*found, gate, up, x], [*expected, *before], strict=True):
        assert one.equal(other)


def test_nothing_to_keep(tiny_llama):
    """A micro-batch of empty responses asks for no state; gradients are zeros, not errors."""
    model = tiny_llama()
    batch = pad_batch([[3, 4], [5]], [[], []], 0)
    logprobs, _ = response_logprobs(model, batch)
    logprobs.sum().backward()
    assert logprobs.shape == (2, 1)
    assert not logprobs.any()


def test_the_last_layer_skips_prompts(tiny_llama):
    """Its feed-forward sees the places before response tokens, and no others."""
    model, seen = tiny_llama(), []
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    response_logprobs(model, pad_batch(PROMPTS, RESPONSES, 0))
    assert seen == [sum(map(len, PROMPTS + RESPONSES)), sum(map(len, RESPONSES))]


def test_a_copy_has_layers_of_its_own(tiny_llama):
    """The value model may be a copy of the reward model, which has scored already."""
    model = tiny_llama()
    assert fuse(model.model)
    twin = copy.deepcopy(model)
    assert twin.model.layers[0].forward.args[0] is twin.model.layers[0]
    norm = twin.model.layers[0].input_layernorm
    assert norm.forward.args[0] is norm


def test_half_precision_keeps_transformers_norms(tiny_llama):
    norm = tiny_llama().model.layers[0].input_layernorm.bfloat16()
    x = torch.randn(3, 16).bfloat16()
    assert torch.equal(fused.norm_forward(norm, x, packed=True), type(norm).forward(norm, x))


def test_every_piece_is_used(tiny_llama, monkeypatch):
    """A model of this kind goes through all three; none is passed by for a class of another name."""
    used = []
    for piece in (RMSNorm, GatedUnit, Rotary):
        forward = piece.forward
        monkeypatch.setattr(
            piece, "forward", staticmethod(lambda *given, p=piece, f=forward: (used.append(p.__name__), f(*given))[1])
        )
    response_logprobs(tiny_llama(), pad_batch(PROMPTS, RESPONSES, 0))
    # Two layers: two norms and two rotations (queries, keys) in each.
    assert sorted(used) == ["GatedUnit"] * 2 + ["RMSNorm"] * 4 + ["Rotary"] * 4
