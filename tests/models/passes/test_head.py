"""The head in pieces: log-probabilities, entropies and gradients of the whole, and no more logits than a piece."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.pretrained import load_value_or_reward
from ppo_vs_dpo.models.passes import head as heads
from ppo_vs_dpo.models.passes.head import compute_in_fp32, head_logprobs
from ppo_vs_dpo.models.passes.logprobs import full_kl, pad_batch, response_logprobs, sequence_scores
from ppo_vs_dpo.ppo.roles.reference import WithoutAdapters

N, WIDTH, VOCABULARY = 23, 6, 31


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of four rows."""
    monkeypatch.setattr(heads, "ROWS", 4)
    monkeypatch.setattr(heads, "PIECE", 1)


def expected(head, states, tokens, temperature):
    table = (head(states).double() / temperature).log_softmax(-1)
    return table[range(N), tokens], -(table.exp() * table).sum(-1)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equal_to_all_at_once(small_pieces, with_entropy, bias, temperature):
    """Against double precision, gradients of states, weight and bias included."""
    torch.manual_seed(0)
    head, states = nn.Linear(WIDTH, VOCABULARY, bias), torch.randn(N, WIDTH)
    tokens = torch.randint(VOCABULARY, (N,))
    weights, others = torch.randn(N), torch.randn(N)

    def gradients(function, head, states):
        states = states.clone().requires_grad_()
        logprobs, entropy = function(head, states)
        loss = (logprobs * weights).sum() + ((entropy * others).sum() if with_entropy else 0)
        loss.backward()
        return [logprobs, *([entropy] if with_entropy else []), states.grad, *[p.grad for p in head.parameters()]]

    got = gradients(lambda h, x: head_logprobs(h, x, tokens, temperature, with_entropy), head, states)
    assert head.forward.func is heads._head_forward
    plain = nn.Linear(WIDTH, VOCABULARY, bias).double()
    plain.load_state_dict(head.state_dict())
    wanted = gradients(lambda h, x: expected(h, x, tokens, temperature), plain, states.double())
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=2e-6, rtol=2e-6)
    # With logits alone it is the head it was.
    assert torch.equal(head(states), nn.functional.linear(states, head.weight, head.bias))


def test_under_autocast_products_are_in_half_precision(small_pieces):
    """The same logits, bit for bit, as an autocast head gives; gradients in the weights' own dtype."""
    torch.manual_seed(0)
    head, states, tokens = nn.Linear(WIDTH, VOCABULARY, False), torch.randn(N, WIDTH), torch.arange(N)
    with torch.autocast("cpu", torch.bfloat16):
        got = head_logprobs(head, states, tokens)[0]
        wanted = nn.functional.linear(states, head.weight)
    assert wanted.dtype == torch.bfloat16
    torch.testing.assert_close(got, wanted.float().log_softmax(-1)[range(N), tokens], atol=1e-6, rtol=1e-6)
    got.sum().backward()
    assert head.weight.grad.dtype == torch.float32


class Largest(TorchDispatchMode):
    """Rows of the largest tensor as wide as the vocabulary that is not the head's weight (of 16 rows, transposed)."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.dim() == 2
                and tensor.shape[1] == VOCABULARY
                and len(tensor) != 16
            ):
                self.rows = max(self.rows, len(tensor))
        return out


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("what", ["train", "train with entropy", "score", "exact kl"])
def test_never_the_logits_of_all_tokens(small_pieces, tiny_llama, what, lora):
    model, reference = tiny_llama(vocab_size=VOCABULARY), tiny_llama(1, vocab_size=VOCABULARY)
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        reference = WithoutAdapters(model)
    batch = pad_batch([[5, 6]] * 5, [[7] * n for n in (9, 3, 7, 8, 5)], 0)
    with Largest() as seen:
        if what == "exact kl":
            full_kl(model, reference, batch)
        elif what == "score":
            with torch.no_grad():
                response_logprobs(reference if lora else model, batch)
        else:
            logprobs, entropy = response_logprobs(model, batch, with_entropy="entropy" in what)
            (logprobs.sum() + (entropy.sum() if entropy is not None else 0)).backward()
    assert seen.rows == 4


def test_scores_are_in_full_precision(tiny_llama, tmp_path):
    """A bfloat16 reward model: the head's product with the states is that of fp32 (Huang et al. 2024, detail 22)."""
    tiny_llama().save_pretrained(tmp_path)
    model = load_value_or_reward(tmp_path).to(torch.bfloat16)
    with torch.no_grad():
        model.score.weight.mul_(8)
    ids = torch.randint(4, 18, (64, 12), generator=torch.Generator().manual_seed(0))
    states = []
    with torch.no_grad():
        sequence_scores(model, ids, torch.ones_like(ids))
        model.score.register_forward_pre_hook(lambda module, given: states.append(given[0]))
        scores = sequence_scores(model, ids, torch.ones_like(ids))
    assert scores.dtype == torch.float32
    assert states[0].dtype == torch.bfloat16
    exact = (states[0].double() @ model.score.weight.double().T).squeeze(-1)
    assert (scores - exact).abs().max() < 1e-6 * exact.abs().max()
    # The steps of bfloat16 at this size are a thousand times that.
    assert (exact.bfloat16() - exact).abs().max() > 1e-3 * exact.abs().max()


@pytest.mark.parametrize("rows", [3, 23])
def test_logits_in_fp32_of_a_model_in_half_precision(tiny_llama, small_pieces, rows):
    """Those of an fp32 head on the very states, in sampling and in a pass, with the gradients of one."""
    torch.manual_seed(0)
    model = tiny_llama(vocab_size=400).bfloat16()
    head, states = model.get_output_embeddings(), torch.randn(rows, model.config.hidden_size).bfloat16()
    tokens = torch.randint(400, (rows,))
    weight = head.weight.detach().float().requires_grad_()
    exact = nn.functional.linear(states.float(), weight).log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    exact.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = head_logprobs(head, states, tokens)[0]
    assert (rounded - exact).abs().max() > 1e-3
    compute_in_fp32(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = head_logprobs(head, states, tokens)[0]
        sampled = head(states).log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    torch.testing.assert_close(found, exact, atol=2e-5, rtol=0)
    torch.testing.assert_close(sampled, exact, atol=2e-5, rtol=0)
    found.sum().backward()
    error = (head.weight.grad.float() - weight.grad).abs().max() / weight.grad.abs().max()
    assert error < 2**-8  # the gradient's own dtype
    copied = copy.deepcopy(model).get_output_embeddings()
    assert copied.forward.args[0] is copied


def test_a_head_with_adapters_stays_as_it_is(tiny_llama):
    policy = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match=r"cast_lm_head_to_fp32 needs a plain output layer"):
        compute_in_fp32(policy)
