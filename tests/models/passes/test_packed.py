"""The packed pass equals the padded one: values and gradients, with and without grouped queries and checkpointing."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from ppo_vs_dpo.models.passes import fused
from ppo_vs_dpo.models.passes.fused import packed_states
from ppo_vs_dpo.models.passes.logprobs import (
    backbone,
    full_kl,
    pad_batch,
    response_logprobs,
    response_values,
    sequence_scores,
)
from ppo_vs_dpo.models.passes.packed import GROUPS, can_pack, pack, uses_varlen, varlen_kernel

torch.manual_seed(0)
PROMPTS = [torch.randint(3, 20, (n,)).tolist() for n in (3, 2, 7, 3, 1, 5, 2, 2)]
RESPONSES = [torch.randint(3, 20, (n,)).tolist() for n in (4, 1, 6, 4, 9, 2, 0, 1)]


def both(compute, monkeypatch):
    packed = compute()
    with monkeypatch.context() as patch:
        patch.setattr("ppo_vs_dpo.models.passes.logprobs.can_pack", lambda model: False)
        padded = compute()
    return packed, padded


def test_layout():
    mask = torch.tensor([[0, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]])
    packing = pack(mask)
    assert packing.order.tolist() == [4, 1, 2, 3, 13, 14, 15]
    assert packing.positions.tolist() == [0, 0, 1, 2, 0, 1, 2]
    assert packing.starts.tolist()[:2] == [1, 0]


def test_groups():
    """Every token once, rows padded to the longest of their group only, equal rows in one group without padding."""
    lengths = torch.tensor([9, 2, 5, 5, 12, 1, 7, 3, 9, 4])
    groups = pack((torch.arange(12) < lengths[:, None]).long()).groups
    assert len(groups) == GROUPS
    assert [(group.rows, group.longest) for group in groups] == [(3, 3), (3, 5), (3, 9), (1, 12)]
    assert [group.stop - group.start for group in groups] == [6, 14, 25, 12]
    assert groups[0].places.tolist() == [0, 3, 4, 6, 7, 8]
    assert groups[3].places is None
    (whole,) = pack(torch.ones(6, 4, dtype=torch.long)).groups
    assert (whole.rows, whole.longest, whole.places) == (6, 4, None)


def test_pieces():
    """Whole sequences, shortest first, never more tokens than asked for but where one sequence has more."""
    lengths = torch.tensor([9, 2, 0, 5, 5, 12, 1, 7, 3])
    packing = pack((torch.arange(12) < lengths[:, None]).long())
    found = list(packing.pieces(10))
    assert [len(piece.order) for _, piece in found] == [6, 10, 7, 9, 12]
    assert [start for start, _ in found] == [0, 6, 16, 23, 32]
    assert torch.cat([piece.order for _, piece in found]).equal(packing.order)
    assert torch.cat([piece.positions for _, piece in found]).equal(packing.positions)
    for _, piece in found:
        # As if the piece's rows had been packed alone.
        alone = pack((torch.arange(12) < piece.lengths[:, None]).long())
        assert alone.positions.equal(piece.positions)
        assert alone.starts.equal(piece.starts)
        assert alone.groups.bounds.equal(piece.groups.bounds)
        assert [(g.start, g.stop, g.rows, g.longest) for g in alone.groups] == [
            (g.start, g.stop, g.rows, g.longest) for g in piece.groups
        ]
    assert list(pack(torch.zeros(2, 3, dtype=torch.long)).pieces(10)) == []


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_a_cpu_reads_a_piece_at_a_time(tiny_llama, tmp_path, monkeypatch, architecture):
    """The same states of few tokens at a time, wanted in any order, of a fused model and of another; where gradients
    flow or a rank holds a part of the weights, all go at once."""
    if architecture == "llama":
        model = tiny_llama()
    else:
        config = AutoConfig.for_model(
            architecture, vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, initializer_range=0.2,
        )  # fmt: skip
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    batch = pad_batch(PROMPTS, RESPONSES, 0)
    inner, packing = backbone(model), batch.places.packing
    sizes = []
    inner.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    backwards = torch.arange(len(packing.order)).flip(0)[::2]
    with torch.no_grad():
        for keep in (None, batch.places.before, backwards, backwards[:0]):
            whole = packed_states(inner, model, packing, batch.input_ids, keep)
            with monkeypatch.context() as patch:
                patch.setattr(fused, "TOKENS", 11)
                sizes.clear()
                states = packed_states(inner, model, packing, batch.input_ids, keep)
            torch.testing.assert_close(states, whole, atol=2e-6, rtol=1e-5)
            assert (keep is not None and not len(keep)) or (len(sizes) > 3 and max(sizes) <= 16)
    monkeypatch.setattr(fused, "TOKENS", 11)
    assert not fused.reads_in_pieces(inner, packing)
    with torch.no_grad():
        assert fused.reads_in_pieces(inner, packing)
        next(inner.parameters()).ds_id = 0
        assert not fused.reads_in_pieces(inner, packing)


@pytest.mark.parametrize("heads", [2, 1])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lengths", ["mixed", "equal"])
def test_logprobs_and_gradients(tiny_llama, monkeypatch, heads, checkpointing, lengths):
    model = tiny_llama(num_key_value_heads=heads)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert can_pack(model)
    batch = pad_batch(PROMPTS, RESPONSES, 0)
    if lengths == "equal":
        batch = pad_batch([[5, 6, 7]] * 6, [[8, 9, number] for number in range(3, 9)], 0)

    def compute():
        model.zero_grad()
        logprobs, entropy = response_logprobs(model, batch, 0.7, with_entropy=True)
        (logprobs.pow(2).sum() + entropy.sum()).backward()
        return [logprobs.detach(), entropy.detach(), *[p.grad.clone() for p in model.parameters()]]

    for packed, padded in zip(*both(compute, monkeypatch), strict=True):
        # Gradients of this loss reach hundreds: rounding is measured against the largest entry.
        assert (packed - padded).abs().max() <= 1e-5 * padded.abs().max().clamp_min(1)


def test_a_model_that_was_packed_still_takes_padded_rows(tiny_llama):
    """Generation and plain calls go on as before after a packed pass."""
    model, fresh = tiny_llama(), tiny_llama()
    batch = pad_batch(PROMPTS, RESPONSES, 0)
    response_logprobs(model, batch)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    real = batch.attention_mask.bool()
    torch.testing.assert_close(model(**inputs).logits[real], fresh(**inputs).logits[real], atol=0, rtol=0)


def test_kl_values_and_scores(tiny_llama, tmp_path, monkeypatch):
    from ppo_vs_dpo.models.loading.pretrained import load_value_or_reward

    policy, reference = tiny_llama(0), tiny_llama(1)
    policy.save_pretrained(tmp_path)
    value = load_value_or_reward(tmp_path, trainable=True)
    batch = pad_batch(PROMPTS, RESPONSES, 0)

    def compute():
        value.zero_grad()
        values = response_values(value, batch)
        values.pow(2).sum().backward()
        scores = sequence_scores(value, batch.input_ids, batch.attention_mask).detach()
        return [full_kl(policy, reference, batch), values.detach(), scores, value.score.weight.grad.clone()]

    for packed, padded in zip(*both(compute, monkeypatch), strict=True):
        torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)


def test_models_that_need_more_than_a_causal_mask_are_left_alone(tiny_llama):
    from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

    small = {
        "vocab_size": 20,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    assert not can_pack(Gemma2ForCausalLM(Gemma2Config(**small)))
    assert not can_pack(MistralForCausalLM(MistralConfig(**small, sliding_window=4)))
    assert can_pack(MistralForCausalLM(MistralConfig(**small, sliding_window=None)))


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "gemma2"])
def test_other_architectures(architecture, monkeypatch):
    """Padded or packed as each allows, the log-probabilities are those of the plain full pass."""
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"intermediate_size": 32} if architecture != "gpt2" else {"n_inner": 32}
    small |= {"head_dim": 8, "num_key_value_heads": 2} if architecture == "gemma2" else {}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **small)).eval()
    logprobs, _ = response_logprobs(model, pad_batch(PROMPTS, RESPONSES, 0))
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        if response:
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].float()
            expected = logits.log_softmax(-1)[range(len(response)), response]
            torch.testing.assert_close(logprobs[row, : len(response)], expected, atol=3e-6, rtol=0)


class Nested(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


def reference_kernel(query, key, value, bounds, bounds_k, longest, longest_k, *, scale, window_size, enable_gqa):
    """What torch's varlen attention is documented to do, one sequence at a time; checks what it is given."""
    assert bounds.dtype == torch.int32
    assert torch.equal(bounds, bounds_k)
    assert window_size == (-1, 0)
    assert longest == longest_k == int(bounds.diff().max())
    assert (int(bounds[0]), int(bounds[-1])) == (0, len(query))
    assert enable_gqa == (query.shape[1] != key.shape[1])
    pieces = []
    for start, stop in itertools.pairwise(bounds.tolist()):
        heads = [x[start:stop].transpose(0, 1)[None] for x in (query, key, value)]
        out = F.scaled_dot_product_attention(*heads, is_causal=True, scale=scale, enable_gqa=enable_gqa)
        pieces.append(out[0].transpose(0, 1))
    return torch.cat(pieces)


@pytest.mark.parametrize("heads", [2, 1])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_kernel_for_all_lengths(tiny_llama, monkeypatch, heads, checkpointing):
    """Where a GPU's kernel takes sequences of all lengths at once, it gets the right bounds: the groups' results."""
    model = tiny_llama(num_key_value_heads=heads)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = pad_batch(PROMPTS, RESPONSES, 0)
    calls = []

    def compute():
        model.zero_grad()
        logprobs = response_logprobs(model, batch)[0]
        logprobs.pow(2).sum().backward()
        return [logprobs.detach(), *[p.grad.clone() for p in model.parameters()]]

    def kernel():
        calls.append(1)
        return lambda *args, **kwargs: reference_kernel(*args[:3], args[3].int(), args[4].int(), *args[5:], **kwargs)

    expected = compute()
    monkeypatch.setattr("ppo_vs_dpo.models.passes.packed.uses_varlen", lambda query, width: True)
    monkeypatch.setattr("ppo_vs_dpo.models.passes.packed.varlen_kernel", kernel)
    for got, wanted in zip(compute(), expected, strict=True):
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp_min(1)
    assert len(calls) == 2 * (1 + checkpointing)


def test_the_kernel_is_for_half_precision_on_cuda(monkeypatch):
    from torch.nn.attention.varlen import varlen_attn

    assert varlen_kernel() is varlen_attn
    query = torch.zeros(2, 8, dtype=torch.bfloat16)
    monkeypatch.setattr("ppo_vs_dpo.models.passes.packed.has_flash", lambda device: True)
    assert not uses_varlen(query, 8)
    assert uses_varlen(query.as_subclass(Nested), 8)
    assert not uses_varlen(query.float().as_subclass(Nested), 8)
    # Widths that flash attention has not.
    assert not uses_varlen(query.as_subclass(Nested), 4)
    assert not uses_varlen(query.as_subclass(Nested), 264)
    # A V100, a T4: half precision, and no flash attention.
    monkeypatch.setattr("ppo_vs_dpo.models.passes.packed.has_flash", lambda device: False)
    assert not uses_varlen(query.as_subclass(Nested), 8)


@pytest.mark.parametrize("heads", [4, 2])
def test_the_kernel_of_each_torch(monkeypatch, heads):
    """2.11's takes no ``enable_gqa``, 2.10's no window; what is called must take what it is given."""
    import torch.nn.attention.varlen as theirs

    def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                window_size=(-1, -1)):  # fmt: skip
        assert query.shape == key.shape == value.shape
        return reference_kernel(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=False
        )

    def of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        raise AssertionError("it has no scale")

    torch.manual_seed(0)
    query, (key, value) = torch.randn(5, 4, 8), torch.randn(2, 5, heads, 8)
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
    given = (query, key, value, bounds, bounds, 3, 3)
    options = {"scale": 0.3, "window_size": (-1, 0), "enable_gqa": heads != 4}
    monkeypatch.setattr(theirs, "varlen_attn", of_2_11)
    found = varlen_kernel.__wrapped__()(*given, **options)
    torch.testing.assert_close(found, reference_kernel(*given, **options), rtol=0, atol=1e-6)
    monkeypatch.setattr(theirs, "varlen_attn", of_2_10)
    assert varlen_kernel.__wrapped__() is None


def kept_bytes(model, batch) -> int:
    """Bytes that a forward pass keeps for its backward pass, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        response_logprobs(model, batch)[0].sum()
    return sum(seen.values())


def test_checkpointing_saves_memory_on_packed_rows(tiny_llama):
    """Of ten layers a third is kept at most; the kind of checkpoint makes no difference."""
    batch = pad_batch([[5] * n for n in (20, 25, 30, 22)], [[7] * n for n in (6, 9, 4, 8)], 0)
    model = tiny_llama(num_hidden_layers=10).train()
    plain = kept_bytes(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert kept_bytes(model, batch) < plain / 3
