"""Log-probabilities, entropies, KL, values and scores against the plain full computation."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.pretrained import context_length
from ppo_vs_dpo.models.passes.head import Logprobs
from ppo_vs_dpo.models.passes.logprobs import (
    full_kl,
    pad_batch,
    response_logprobs,
    response_values,
    sequence_scores,
    token_kl,
)
from ppo_vs_dpo.models.sampling.generation import SamplingConfig, generate

PROMPTS = [[1, 6, 7], [1, 9], [1, 10, 11, 12, 13]]
RESPONSES = [[8, 9, 2], [7], [10, 11, 12, 13, 2]]


def plain(model, prompt, response, temperature=1.0):
    """One row, no padding, all logits."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].float() / temperature
    table = logits.log_softmax(-1)
    return table[range(len(response)), response], -(table.exp() * table).sum(-1), table


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("pad", [0, 2])
def test_equal_to_each_row_alone(tiny_llama, temperature, pad):
    model = tiny_llama()
    batch = pad_batch(PROMPTS, RESPONSES, pad)
    logprobs, entropy = response_logprobs(model, batch, temperature, with_entropy=True)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        expected, expected_entropy, _ = plain(model, prompt, response, temperature)
        n = len(response)
        torch.testing.assert_close(logprobs[row, :n], expected, atol=5e-6, rtol=0)
        torch.testing.assert_close(entropy[row, :n], expected_entropy, atol=5e-6, rtol=0)
        assert logprobs[row, n:].abs().sum() == 0


def test_chunks_and_checkpointing_change_nothing(tiny_llama, monkeypatch):
    model = tiny_llama()
    batch = pad_batch(PROMPTS, RESPONSES, 0)

    def value_and_gradient():
        model.zero_grad()
        logprobs, entropy = response_logprobs(model, batch, 0.9, with_entropy=True)
        (logprobs.sum() + entropy.pow(2).sum()).backward()
        return logprobs.detach(), model.lm_head.weight.grad.clone()

    whole = value_and_gradient()
    monkeypatch.setattr("ppo_vs_dpo.models.passes.head.ROWS", 2)
    monkeypatch.setattr("ppo_vs_dpo.models.passes.head.PIECE", 1)
    for chunked, expected in zip(value_and_gradient(), whole, strict=True):
        torch.testing.assert_close(chunked, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("piece", [7, 1 << 18])
def test_log_softmax_in_place_equals_torchs(monkeypatch, temperature, piece):
    """Values and gradients against the plain formula in double precision; some probabilities underflow."""
    monkeypatch.setattr("ppo_vs_dpo.models.passes.head.CACHED", piece)
    torch.manual_seed(0)
    states, head = torch.randn(9, 6), torch.nn.Linear(6, 5)
    head.weight.data *= torch.tensor([1.0, 1.0, 1.0, 60.0, 60.0])[:, None]
    tokens, weight = torch.tensor([0, 4, 3, 2, 1, 0, 4, 3, 3]), torch.linspace(-1, 1, 9)

    def run(function, dtype):
        layer, inputs = copy.deepcopy(head).to(dtype), states.to(dtype).requires_grad_()
        out = function(layer(inputs))
        (out * weight).sum().backward()
        return out.detach().double(), inputs.grad.double(), layer.weight.grad.double()

    exact = run(lambda x: (x / temperature).log_softmax(-1)[range(9), tokens], torch.double)
    ours = run(lambda x: Logprobs.apply(x, tokens, temperature), torch.float)
    assert exact[0].min() < -100
    for mine, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


def test_log_softmax_in_place_can_be_differentiated_once():
    logits = torch.randn(3, 4, requires_grad=True)
    out = Logprobs.apply(logits * 1.0, torch.tensor([0, 1, 2]), 1.0).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        out.backward()


def test_exact_kl(tiny_llama):
    policy, reference = tiny_llama(0), tiny_llama(1)
    kl = full_kl(policy, reference, pad_batch(PROMPTS, RESPONSES, 0), 0.8)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        _, _, p = plain(policy, prompt, response, 0.8)
        _, _, q = plain(reference, prompt, response, 0.8)
        torch.testing.assert_close(kl[row, : len(response)], (p.exp() * (p - q)).sum(-1), atol=2e-6, rtol=1e-6)
    assert full_kl(policy, policy, pad_batch(PROMPTS, RESPONSES, 0)).abs().max() == 0


@pytest.fixture
def scorer(tiny_llama, tmp_path, word_tokenizer):
    from ppo_vs_dpo.models.loading.pretrained import load_value_or_reward

    tiny_llama().save_pretrained(tmp_path)
    torch.manual_seed(5)
    return load_value_or_reward(tmp_path)


def test_a_new_head_and_a_saved_one(scorer, tmp_path):
    from ppo_vs_dpo.models.loading.pretrained import load_value_or_reward

    assert 0.1 < scorer.score.weight.std() < 0.5  # N(0, 1/sqrt(17)): .24
    scorer.save_pretrained(tmp_path / "saved")
    again = load_value_or_reward(tmp_path / "saved")
    assert torch.equal(again.score.weight, scorer.score.weight)


def test_values_are_those_of_the_state_before_each_token(scorer):
    values = response_values(scorer, pad_batch(PROMPTS, RESPONSES, 0))
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        for t in range(len(response)):
            state = torch.tensor([prompt + response[:t]])
            expected = scorer.score(scorer.model(state).last_hidden_state[0, -1])
            torch.testing.assert_close(values[row, t], expected[0], atol=2e-6, rtol=0)


@pytest.mark.parametrize("pad", [0, 2])
def test_scores_do_not_depend_on_padding(scorer, pad):
    rows = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    width = max(map(len, rows)) + 3
    alone = torch.stack(
        [sequence_scores(scorer, torch.tensor([r]), torch.ones(1, len(r), dtype=int))[0] for r in rows]
    )
    for side in ("left", "right"):
        ids = torch.tensor(
            [[pad] * (width - len(r)) + r if side == "left" else r + [pad] * (width - len(r)) for r in rows]
        )
        mask = torch.tensor(
            [
                [0] * (width - len(r)) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * (width - len(r))
                for r in rows
            ]
        )
        torch.testing.assert_close(sequence_scores(scorer, ids, mask), alone, atol=2e-6, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_longrope_stays_where_its_positions_stay(kind):
    """Beyond the length of its first training LongRoPE embeds all positions anew: a long row would change others."""
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "short_factor": [1.0] * 4}
    rope |= {"long_factor": [4.0] * 4, "original_max_position_embeddings": 12}
    size = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.3}
    config = AutoConfig.for_model(kind, **size, rope_parameters=rope, original_max_position_embeddings=12)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert context_length(model) == 12
    short, long = ([3, 4, 5], [6, 7]), ([3] * 8, [4] * 5)
    alone = response_logprobs(model, pad_batch([short[0]], [short[1]], 0))[0]
    beside = pad_batch([short[0], long[0]], [short[1], long[1][:4]], 0)
    torch.testing.assert_close(response_logprobs(model, beside)[0][:1, :2], alone, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match=r"has LongRoPE: beyond 12 tokens .* a row of 13 would change"):
        response_logprobs(model, pad_batch([short[0], long[0]], [short[1], long[1]], 0))
    with pytest.raises(UserError, match="LongRoPE"):
        generate(model, [long[0]], SamplingConfig(5), eos_token_ids=[2], seeds=[0])
    assert len(generate(model, [long[0]], SamplingConfig(4), eos_token_ids=[2], seeds=[0])) == 1


def test_a_kl_of_next_to_nothing_is_not_negative():
    """Of a policy that has hardly moved: rounding alone would give both signs."""
    torch.manual_seed(0)
    logits = torch.randn(500, 64)
    p, q = (one.log_softmax(-1) for one in (logits, logits + 1e-6 * torch.randn(500, 64)))
    assert (p.exp() * (p - q)).sum(-1).min() < 0
    assert token_kl(p, q).min() == 0
    assert token_kl(p, q).max() < 1e-6
