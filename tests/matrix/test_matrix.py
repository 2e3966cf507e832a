"""Many architectures, equal to plain transformers and TRL: sampling, log-probabilities, exact KL, values, scores, one
step of every trainer, saving, adapters. What cannot be right is refused by name.

`tests.matrix.measures` measures, and ``python -m tests.matrix.table`` prints all of it (docs/models.md).
"""

import pytest
import torch

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.prepared import disable_dropout
from ppo_vs_dpo.models.passes.logprobs import pad_batch, response_logprobs
from ppo_vs_dpo.models.sampling.generation import SamplingConfig, generate
from ppo_vs_dpo.ppo.roles.given import value_model_from
from tests.matrix.measures import IN_DOUBLE, MEASURES, PROMPTS, RESPONSES, in_double, plain
from tests.matrix.tiny import ARCHITECTURES, REFUSED, UNSAMPLED, WITHOUT_VALUES, tiny

FAST = ("gpt2", "gemma3_text", "mixtral", "llama")
EVERY = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]
# In fp32, or else in fp64: there a mistake stays, and rounding goes.
CLOSE, CLOSE_IN_DOUBLE = 1e-5, 1e-9
# Of fp32 where rounding is the cause: states that go over many steps.
ROUNDED = 1e-3


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("name", EVERY)
def test_equal_to_transformers_and_trl(name, measure):
    apart = MEASURES[measure](name)
    if apart is None:
        assert name in WITHOUT_VALUES
        with pytest.raises(UserError, match=f"no model with a scalar head for {name}.*pass value_model"):
            value_model_from(None, tiny(name))
        return
    if apart > CLOSE and measure in IN_DOUBLE:
        with in_double():
            assert MEASURES[measure](name) <= CLOSE_IN_DOUBLE
        assert apart <= ROUNDED
    else:
        assert apart <= CLOSE


def test_a_mistake_does_not_hide_in_rounding(monkeypatch):
    """The bars of fp64 are for what is a thousand times smaller than the least mistake: one position off."""
    from ppo_vs_dpo.models.passes import logprobs

    plain = logprobs.pack

    def shifted(mask):
        packing = plain(mask)
        packing.positions = packing.positions * 1001 // 1000 + (packing.positions == 6)
        return packing

    monkeypatch.setattr(logprobs, "pack", shifted)
    with in_double():
        assert MEASURES["log-probabilities, KL"]("llama") > 1e3 * CLOSE_IN_DOUBLE
    assert MEASURES["log-probabilities, KL"]("llama") > CLOSE


@pytest.mark.parametrize("name", EVERY)
def test_training_and_evaluation_answer_alike(name):
    """No dropout, layer drop or router noise is left, whatever it is called: the ratio of the first pass is 1."""
    model = tiny(name)
    disable_dropout(model)
    ids = torch.tensor([PROMPTS[4]])
    with torch.no_grad():
        expected, *got = (model.train(mode)(input_ids=ids, use_cache=False).logits for mode in (False, True, True))
    assert all(torch.equal(expected, one) or (expected - one).abs().max() < 1e-5 for one in got)


@pytest.mark.parametrize("name", REFUSED)
def test_a_state_that_padding_reaches_is_refused(name):
    model = tiny(name)
    with pytest.raises(UserError, match=rf"\({name}\) does not leave out what the attention mask masks"):
        generate(model, PROMPTS, SamplingConfig(4), eos_token_ids=[2], seeds=list(range(len(PROMPTS))))
    with pytest.raises(UserError, match=rf"\({name}\) does not leave out"):
        response_logprobs(model, pad_batch(PROMPTS, RESPONSES, 0))


@pytest.mark.parametrize("name", UNSAMPLED)
def test_a_cache_of_its_own_is_refused(name):
    """Such a model can be trained on given texts, and says so when it is to be sampled from."""
    model = tiny(name)
    batch = pad_batch(PROMPTS, RESPONSES, 0)
    found = response_logprobs(model, batch)[0][0, :3].detach()
    expected = plain(model, PROMPTS[0], RESPONSES[0]).gather(1, torch.tensor(RESPONSES[0])[:, None])[:, 0]
    torch.testing.assert_close(found, expected, atol=CLOSE, rtol=0)
    with pytest.raises(UserError, match=rf"\({name}\) cannot be sampled from token by token here: it has no cache"):
        generate(model, PROMPTS, SamplingConfig(4), eos_token_ids=[2], seeds=list(range(len(PROMPTS))))


def test_a_cache_that_is_not_handed_on_is_refused(monkeypatch):
    """Sampling never goes on from a wrong state: what the cache gives is compared with one pass, once a model."""
    from ppo_vs_dpo.models.sampling import generation

    read = generation.read

    def forgetful(model, input_ids, attention_mask, position_ids, cache):
        if input_ids.shape[1] == 1:  # as a model would that knows its cache by another name
            cache = type(cache)(model.config, capacity=8)
        return read(model, input_ids, attention_mask, position_ids, cache)

    monkeypatch.setattr(generation, "read", forgetful)
    with pytest.raises(UserError, match=r"\(gpt2\) cannot be sampled from token by token"):
        generate(tiny("gpt2"), PROMPTS, SamplingConfig(4), eos_token_ids=[2], seeds=list(range(len(PROMPTS))))
