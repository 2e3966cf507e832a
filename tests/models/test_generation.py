"""Generation: equal to a plain loop, independent of the batch, and drawn from the right distribution."""

import numpy as np
import pytest
import torch
from scipy import stats

from artifacts.errors import UserError
from models.generation import SamplingConfig, generate, pick_tokens, row_seed

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


def test_bad_input(tiny_llama):
    with pytest.raises(UserError, match="prompt 1 has no tokens"):
        draw(tiny_llama(), [[1], []], [0, 1], max_new_tokens=2)
    with pytest.raises(UserError, match="at least 1 token"):
        SamplingConfig(max_new_tokens=0)
    with pytest.raises(UserError, match="top_p"):
        SamplingConfig(top_p=0.0)
