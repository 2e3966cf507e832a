"""KL by every estimator against the enumeration of a space small enough, and against the other room's own sum."""

import itertools

import numpy as np
import pytest
import torch

from ppo_vs_dpo.compare.sampling import kl
from ppo_vs_dpo.compare.sampling.kl import k3, sequence_kl
from ppo_vs_dpo.models.passes.logprobs import full_kl, pad_batch, response_logprobs
from ppo_vs_dpo.models.sampling.generation import SamplingConfig, generate

EOS, LENGTH = 2, 3
PROMPT = [1, 6, 7]
TOKENS = 8


@pytest.fixture(scope="module")
def space(word_tokenizer):
    """Policy, reference, all sequences of up to three tokens over 8 tokens, and their exact log-probabilities."""
    from tests.compare.helpers import small_model

    policy, reference = (
        small_model(word_tokenizer, seed=s, vocab_size=TOKENS, initializer_range=0.4).double() for s in (1, 2)
    )
    others = [t for t in range(TOKENS) if t != EOS]
    sequences = [[*head, EOS] for n in range(LENGTH) for head in itertools.product(others, repeat=n)]
    sequences += [list(full) for full in itertools.product(others, repeat=LENGTH)]
    return policy, reference, sequences


def logprobs(model, sequences, temperature=1.0):
    with torch.no_grad():
        batch = pad_batch([PROMPT] * len(sequences), sequences, 0)
        return response_logprobs(model, batch, temperature)[0].double().sum(-1).numpy()


def exact_kl(space, temperature=1.0):
    policy, reference, sequences = space
    p, q = (logprobs(model, sequences, temperature) for model in (policy, reference))
    assert np.exp(p).sum() == pytest.approx(1.0, abs=1e-6)
    return float((np.exp(p) * (p - q)).sum())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_expectations_equal_the_enumeration(space, temperature):
    """Weighted by the policy's own probabilities every unbiased estimator is the KL, to rounding."""
    policy, reference, sequences = space
    found = sequence_kl(policy, reference, [PROMPT] * len(sequences), sequences, 0, temperature=temperature)
    p = np.exp(found.logprob)
    truth = exact_kl(space, temperature)
    assert truth > 0.3
    assert p @ found.exact == pytest.approx(truth, abs=1e-6)
    assert p @ found.k1 == pytest.approx(truth, abs=1e-6)
    assert p @ found.k3 == pytest.approx(truth, abs=1e-6)
    assert (found.k3 >= -1e-6).all()
    assert found.k1.min() < 0


def test_samples_of_one_temperature_say_nothing_about_another(space):
    """papers.md 3.5.4: completions drawn at 0.7 and measured at 1 do not average to either KL."""
    policy, reference, sequences = space
    measured = sequence_kl(policy, reference, [PROMPT] * len(sequences), sequences, 0, temperature=1.0)
    sharp = np.exp(logprobs(policy, sequences, 0.7))
    mixed = float(sharp @ measured.k1)
    assert abs(mixed - exact_kl(space, 1.0)) > 0.05
    assert abs(mixed - exact_kl(space, 0.7)) > 0.05


def test_the_exact_sum_has_the_least_variance(space):
    policy, reference, _ = space
    n = 3000
    drawn = generate(policy, [PROMPT] * n, SamplingConfig(LENGTH, batch_size=n), eos_token_ids=[EOS], seeds=range(n))
    found = sequence_kl(policy, reference, [PROMPT] * n, [sample.token_ids for sample in drawn], 0)
    truth = exact_kl(space)
    for estimate in (found.exact, found.k1, found.k3):
        assert estimate.mean() == pytest.approx(truth, abs=4 * estimate.std() / np.sqrt(n))
    assert found.exact.var() < 0.5 * found.k1.var()


def test_equals_the_models_own_sum_in_any_batching(space):
    policy, reference, sequences = space
    some = sequences[::37]
    prompts = [PROMPT if i % 2 else [1, 5] for i in range(len(some))]
    found = sequence_kl(policy, reference, prompts, some, 0, batch_size=3)
    whole = full_kl(policy, reference, pad_batch(prompts, some, 0)).double().sum(-1).numpy()
    assert found.exact == pytest.approx(whole, abs=1e-5)


def test_a_policy_against_itself_is_zero_exactly(space, monkeypatch):
    """And no sum over the vocabulary is made for it: its log-probabilities are all that is left to measure."""
    policy, _, sequences = space
    monkeypatch.setattr(kl, "token_kl", None)
    found = sequence_kl(policy, policy, [PROMPT] * 20, sequences[:20], 0, temperature=0.7)
    for values in (found.exact, found.k1, found.k3):
        assert (values == 0).all()
    for values in (found.logprob, found.reference_logprob):
        np.testing.assert_allclose(values, logprobs(policy, sequences[:20], 0.7), atol=1e-5)


def test_k3_and_its_bias():
    # papers.md 3.5.3: p = N(1, 1) against q = N(0, 1); KL 1/2, std/true of k1 is 2.
    x = np.random.default_rng(0).normal(size=400_000)
    log_ratio = -(x**2) / 2 + (x - 1) ** 2 / 2
    estimate = k3(torch.tensor(log_ratio)).numpy()
    assert estimate.mean() == pytest.approx(0.5, abs=0.01)
    assert log_ratio.std() / 0.5 == pytest.approx(2.0, abs=0.01)
    assert estimate.std() / 0.5 == pytest.approx(1.70, abs=0.05)
    assert (estimate >= 0).all()
