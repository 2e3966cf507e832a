"""Generation: equal to a plain loop, independent of the batch, and drawn from the right distribution."""

import copy

import numpy as np
import pytest
import torch
from scipy import stats
from tokenizers import AddedToken
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
)

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.passes.logprobs import pad_batch, response_logprobs
from ppo_vs_dpo.models.sampling.generation import SamplingConfig, generate, pick_tokens, row_seed
from ppo_vs_dpo.models.sampling.kv_cache import SHARE, ReservedCache, ReservedLayer, row_bytes, rows_that_fit

SMALL = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.5,
}  # fmt: skip
PROMPTS = [[1, 6, 7], [1, 9], [1, 10, 11, 12, 13], [1, 6, 8, 14]]


def draw(model, prompts, seeds, **settings):
    return generate(model, prompts, SamplingConfig(**settings), eos_token_ids=[2], seeds=seeds)


def test_greedy_equals_transformers_generate(tiny_llama):
    model = tiny_llama()
    ours = draw(model, PROMPTS, range(4), max_new_tokens=12, temperature=0)
    for prompt, generated in zip(PROMPTS, ours, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=12,
        )[0, len(prompt) :].tolist()
        assert generated.token_ids == theirs


def test_a_row_does_not_depend_on_its_batch(tiny_llama):
    model = tiny_llama(seed=3)
    prompts, seeds = PROMPTS * 8, [row_seed(0, i) for i in range(32)]
    together = draw(model, prompts, seeds, max_new_tokens=20, batch_size=32)
    alone = draw(model, prompts, seeds, max_new_tokens=20, batch_size=1)
    backwards = draw(model, prompts[::-1], seeds[::-1], max_new_tokens=20, batch_size=5)[::-1]
    assert together == alone == backwards
    assert len({tuple(g.token_ids) for g in together}) > 16
    assert {g.finished for g in together} == {True, False}
    assert all(g.finished == (g.token_ids[-1] == 2) for g in together)


def plainly(model, prompt, seed, budget):
    """One row alone, the whole sequence through the model for every token, no cache."""
    ids, uniforms = list(prompt), np.random.Generator(np.random.Philox(key=seed)).random(budget)
    for number in uniforms:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[:, -1]
        ids.append(pick_tokens(logits, torch.tensor([number]), SamplingConfig(budget)).item())
        if ids[-1] == 2:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("model_type", ["llama", "grouped queries", "sliding window", "alternating windows", "gpt2"])
@pytest.mark.parametrize("lengths", [[3], [1, 3, 2, 9, 5, 3, 4, 14]])
def test_equal_to_one_row_without_a_cache(tiny_llama, model_type, lengths):
    """Prompts read in runs, the cache that grows and closes gaps, masks: the same tokens as without all of it."""
    torch.manual_seed(5)
    if model_type == "sliding window":
        model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)).eval()
    elif model_type == "alternating windows":
        model = Gemma2ForCausalLM(Gemma2Config(**SMALL, sliding_window=4)).eval()
    elif model_type == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=128, initializer_range=0.5)
        ).eval()
    else:
        heads = 1 if model_type == "grouped queries" else 2
        model = tiny_llama(seed=3, num_key_value_heads=heads, max_position_embeddings=256)
    prompts = [torch.randint(3, 20, (n,)).tolist() for n in lengths * (16 // len(lengths))]
    # More than is reserved at first, where all is reserved.
    budget = 90 if model_type == "llama" else 24
    drawn = draw(model, prompts, range(16), max_new_tokens=budget)
    assert [g.token_ids for g in drawn] == [plainly(model, p, s, budget) for s, p in enumerate(prompts)]
    assert len({len(g.token_ids) for g in drawn}) > 1


@pytest.mark.parametrize("every", [3, 8])
def test_looking_seldom_changes_nothing(tiny_llama, monkeypatch, every):
    """An accelerator is asked which rows have ended once in a while; what they sample after their end is cut off."""
    model = tiny_llama(seed=3, initializer_range=0.2)
    prompts, seeds = PROMPTS * 4, range(16)

    def completions():
        sampling = SamplingConfig(21)
        return generate(model, prompts, sampling, eos_token_ids=[2], seeds=seeds, with_logprobs=True)

    each = completions()
    monkeypatch.setattr("ppo_vs_dpo.models.sampling.generation._look_every", lambda *_: every)
    seldom = completions()
    assert [(g.token_ids, g.finished) for g in seldom] == [(g.token_ids, g.finished) for g in each]
    assert len({len(g.token_ids) for g in each}) > 4
    assert any(g.finished and len(g.token_ids) % every for g in each)
    for one, other in zip(each, seldom, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_what_is_reserved_is_what_is_needed(tiny_llama, monkeypatch):
    """One reservation a layer, of the columns that the longest row can get: nothing is copied to grow."""
    reserved = []
    reserve = ReservedLayer._reserve

    def noted(self, *args):
        reserve(self, *args)
        reserved.append(tuple(self.room[0].shape))

    monkeypatch.setattr(ReservedLayer, "_reserve", noted)
    model = tiny_llama(seed=3, max_position_embeddings=512)
    generate(model, [[1, 5, 6], [1, 7]], SamplingConfig(150), eos_token_ids=[99], seeds=[1, 2])
    assert reserved == [(2, 2, 3 + 150 - 1, 8)] * 2


def test_rows_are_cut_to_the_free_memory(tiny_llama, monkeypatch):
    model, prompts = tiny_llama(seed=3), PROMPTS * 4
    # 2 layers x (keys, values) x 2 heads x 8 wide x 30 columns x 4 bytes, and 20 logits at 24 bytes.
    assert row_bytes(model.config, 30, torch.float32) == 2 * 2 * 2 * 8 * 30 * 4 + 20 * 24
    free = draw(model, prompts, range(16), max_new_tokens=20)
    columns = max(map(len, prompts)) + 20
    per_row = row_bytes(model.config, columns, torch.float32)
    monkeypatch.setattr("ppo_vs_dpo.models.sampling.kv_cache.free_bytes", lambda device: int(5.5 * per_row / SHARE))
    assert rows_that_fit(model, columns, 256) == 5
    assert rows_that_fit(model, columns, 3) == 3
    with torch.autocast("cpu", torch.bfloat16):
        assert rows_that_fit(model, columns, 256) > 5
    done = []
    cut = generate(
        model, prompts, SamplingConfig(20), eos_token_ids=[2], seeds=range(16), progress=lambda n, _: done.append(n)
    )
    assert done == [5, 10, 15, 16]
    assert [g.token_ids for g in cut] == [g.token_ids for g in free]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_of_sampling_are_those_of_a_whole_pass(tiny_llama, temperature):
    model = tiny_llama(seed=3, initializer_range=0.2)
    prompts = PROMPTS * 4
    drawn = generate(
        model, prompts, SamplingConfig(20, temperature), eos_token_ids=[2], seeds=range(16), with_logprobs=True
    )
    assert len({len(g.token_ids) for g in drawn}) > 4
    batch = pad_batch(prompts, [g.token_ids for g in drawn], 0)
    with torch.no_grad():
        expected = response_logprobs(model, batch, temperature, with_entropy=True)
    for row, one in enumerate(drawn):
        for got, whole in zip((one.logprobs, one.entropy), expected, strict=True):
            torch.testing.assert_close(torch.tensor(got), whole[row][: len(one.token_ids)], atol=1e-5, rtol=1e-5)
    free = draw(model, prompts, range(16), max_new_tokens=20, temperature=temperature)
    assert [g.token_ids for g in free] == [g.token_ids for g in drawn]
    assert free[0].logprobs is None
    with pytest.raises(UserError, match="greedy"):
        generate(model, prompts, SamplingConfig(2, 0), eos_token_ids=[2], seeds=range(16), with_logprobs=True)


def test_the_cache_grows_and_closes_gaps(tiny_llama):
    """Rows that leave, and more tokens than were reserved: what is left is what was put there."""
    cache, plain = ReservedCache(tiny_llama().config), []
    layer = cache.layers[0]
    torch.manual_seed(0)
    rows = torch.arange(5)
    for step in range(150):
        keys = torch.randn(len(rows), 2, 1, 8)
        plain.append(torch.zeros(5, 2, 1, 8).index_copy_(0, rows, keys))
        layer.update(keys, -keys)
        if step in (3, 80):
            keep = torch.tensor([4, 1, 2, 3]) if step == 3 else torch.tensor([0, 3])
            layer.batch_select_indices(keep)
            rows = rows[keep]
    assert rows.tolist() == [4, 3]
    assert torch.equal(layer.keys, torch.cat(plain, dim=2)[rows])
    assert torch.equal(layer.values, -layer.keys)
    assert layer.get_seq_length() == 150


def test_samples_follow_the_model(tiny_llama):
    model = tiny_llama(seed=1)
    n = 4000
    drawn = draw(model, [PROMPTS[0]] * n, range(n), max_new_tokens=1, batch_size=n)
    counts = np.bincount([g.token_ids[0] for g in drawn], minlength=20)
    with torch.no_grad():
        expected = model(torch.tensor([PROMPTS[0]])).logits[0, -1].double().softmax(-1).numpy() * n
    big = expected >= 5
    observed, expected = np.append(counts[big], counts[~big].sum()), np.append(expected[big], expected[~big].sum())
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_inverse_cdf_edges():
    logits = torch.tensor([[0.0, -torch.inf, 0.0]])
    sampling = SamplingConfig(max_new_tokens=1)
    picks = [
        pick_tokens(logits, torch.tensor([u], dtype=torch.double), sampling).item() for u in (0, 0.499, 0.5, 1 - 1e-16)
    ]
    assert picks == [0, 0, 2, 2]


def test_top_k_and_top_p():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).repeat(500, 1)
    uniforms = torch.linspace(0, 0.999, 500)
    assert set(pick_tokens(logits, uniforms, SamplingConfig(1, top_k=2)).tolist()) == {0, 1}
    # softmax: .644 .237 .087 .032; the smallest set with mass .8 is {0, 1}
    assert set(pick_tokens(logits, uniforms, SamplingConfig(1, top_p=0.8)).tolist()) == {0, 1}
    assert set(pick_tokens(logits, uniforms, SamplingConfig(1, top_p=0.6)).tolist()) == {0}
    assert set(pick_tokens(logits, uniforms, SamplingConfig(1)).tolist()) == {0, 1, 2, 3}


def test_stop_strings_end_a_row(tiny_llama, word_tokenizer):
    model = tiny_llama(seed=3)
    free = draw(model, PROMPTS * 4, range(16), max_new_tokens=20)
    row = max(range(16), key=lambda i: len(free[i].token_ids))
    word = word_tokenizer.decode([free[row].token_ids[3]])
    stopped = generate(
        model,
        PROMPTS * 4,
        SamplingConfig(20, stop_strings=[word]),
        eos_token_ids=[2],
        seeds=range(16),
        tokenizer=word_tokenizer,
    )[row]
    assert stopped.finished
    assert len(stopped.token_ids) <= 4
    assert free[row].token_ids[: len(stopped.token_ids)] == stopped.token_ids


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="stop_strings has an empty text"):
        SamplingConfig(8, stop_strings=["good", ""])


def test_bad_input(tiny_llama):
    with pytest.raises(UserError, match="prompt 1 has no tokens"):
        draw(tiny_llama(), [[1], []], [0, 1], max_new_tokens=2)
    with pytest.raises(UserError, match="at least 1 token"):
        SamplingConfig(max_new_tokens=0)
    with pytest.raises(UserError, match="top_p"):
        SamplingConfig(top_p=0.0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_model_of_nan_is_not_sampled_from(tiny_llama, temperature, broken):
    # Its inverse of the distribution is one token for ever, which looks like a model that has collapsed.
    model = tiny_llama()
    model.get_output_embeddings().weight.data[3] = broken
    sampling = SamplingConfig(max_new_tokens=4, temperature=temperature)
    with pytest.raises(UserError, match="LlamaForCausalLM gives next tokens scores that are not finite"):
        generate(model, [[5, 6], [7]], sampling, eos_token_ids=[2], seeds=[1, 2])


@pytest.mark.parametrize("kind", ["named", "added", "with text"])
def test_stop_strings_of_special_tokens(tiny_llama, word_tokenizer, kind):
    """``<|im_end|>`` and the like are no part of the plain text, and end a response all the same."""
    tokenizer, model = copy.deepcopy(word_tokenizer), tiny_llama(0, initializer_range=0.2)
    if kind == "added":
        tokenizer.add_tokens([AddedToken("<|user|>", special=True)], special_tokens=True)
    else:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    end = tokenizer.convert_tokens_to_ids("<|user|>")
    with torch.no_grad():
        model.lm_head.weight[end] = 1.5 * model.lm_head.weight[10]
    stop = "<|user|> the" if kind == "with text" else "<|user|>"
    sampling = SamplingConfig(12, stop_strings=[stop, "dull"])
    drawn = generate(model, [[7, 8]] * 200, sampling, eos_token_ids=[2], seeds=list(range(200)), tokenizer=tokenizer)
    ended = 0
    for one in drawn:
        before, whole = (tokenizer.decode(ids) for ids in (one.token_ids[:-1], one.token_ids))
        assert stop not in before
        assert "dull" not in before
        ended += stop in whole
        assert one.finished == (stop in whole or "dull" in whole or one.token_ids[-1] == 2)
    assert ended > (2 if kind == "with text" else 20)
