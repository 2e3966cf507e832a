"""The packed pass equals the padded one: values and gradients, with and without grouped queries and checkpointing."""

import pytest
import torch

from ppo_vs_dpo.models.passes.logprobs import full_kl, pad_batch, response_logprobs, response_values, sequence_scores
from ppo_vs_dpo.models.passes.packed import GROUPS, can_pack, pack

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
