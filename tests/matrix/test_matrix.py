"""Many architectures, equal to plain transformers one row at a time: sampling, log-probabilities, values, exact KL, a
PPO step, saving, adapters. What cannot be right is refused by name."""

import json

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.prepared import disable_dropout
from ppo_vs_dpo.models.passes.answers import answers
from ppo_vs_dpo.models.passes.logprobs import (
    backbone,
    full_kl,
    pad_batch,
    response_logprobs,
    response_values,
    score_head_of,
)
from ppo_vs_dpo.models.sampling.generation import SamplingConfig, generate
from ppo_vs_dpo.ppo.roles.given import value_model_from
from tests.matrix.tiny import ARCHITECTURES, REFUSED, WITHOUT_VALUES, tiny
from tests.ppo.conftest import logs, make_trainer, prompts  # noqa: F401 (fixtures)

FAST = ("gpt2", "opt", "gemma3_text", "mixtral")
EVERY = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]
PROMPTS = [[3, 4, 5, 6, 7], [8], [9, 10, 11], [12, 13], [3, 3, 4, 4, 5, 5, 6], [14, 15, 16, 17]]
RESPONSES = [[5, 6, 2], [7], [8, 9, 10, 11, 12, 2], [3, 2], [4, 5, 6], [2]]
# Log-probabilities here reach -20: a few units of fp32's last place, more where a state goes over many steps.
CLOSE = {"atol": 4e-5, "rtol": 0}


def plain(model, prompt, response) -> torch.Tensor:
    """Log-softmax ``(R, V)`` before each response token, from transformers' own pass over one row."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].float().log_softmax(-1)


@pytest.mark.parametrize("name", EVERY)
def test_sampling_and_log_probabilities(name):
    model, other = tiny(name), tiny(name, seed=1)
    for one in (model, other):
        disable_dropout(one)
    drawn = generate(
        model, PROMPTS, SamplingConfig(10), eos_token_ids=[2, 19], seeds=list(range(len(PROMPTS))), with_logprobs=True
    )
    assert len({len(one.token_ids) for one in drawn}) > 1  # rows leave the batch
    for prompt, one in zip(PROMPTS, drawn, strict=True):
        expected = plain(model, prompt, one.token_ids)
        picked = expected.gather(1, torch.tensor(one.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(one.logprobs), picked, **CLOSE)
        entropy = -(expected.exp() * expected).sum(-1)
        torch.testing.assert_close(torch.tensor(one.entropy), entropy, **CLOSE)
    batch = pad_batch(PROMPTS, RESPONSES, 0)
    logprobs, entropy = response_logprobs(model, batch, with_entropy=True)
    kl = full_kl(model, other, batch)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        ours, theirs, n = plain(model, prompt, response), plain(other, prompt, response), len(response)
        picked = ours.gather(1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(logprobs[row, :n].detach(), picked, **CLOSE)
        torch.testing.assert_close(entropy[row, :n].detach(), -(ours.exp() * ours).sum(-1), **CLOSE)
        torch.testing.assert_close(kl[row, :n], (ours.exp() * (ours - theirs)).sum(-1), **CLOSE)


@pytest.mark.parametrize("name", EVERY)
def test_training_and_evaluation_answer_alike(name):
    """No dropout, layer drop or router noise is left, whatever it is called: the ratio of the first pass is 1."""
    model = tiny(name)
    disable_dropout(model)
    ids = torch.tensor([PROMPTS[4]])
    with torch.no_grad():
        expected, *got = (model.train(mode)(input_ids=ids, use_cache=False).logits for mode in (False, True, True))
    assert all(torch.equal(expected, one) or (expected - one).abs().max() < 1e-5 for one in got)


@pytest.mark.parametrize("name", EVERY)
def test_values(name):
    model = tiny(name)
    if name in WITHOUT_VALUES:
        with pytest.raises(UserError, match=f"no model with a scalar head for {name}.*pass value_model"):
            value_model_from(None, model)
        return
    value_model = value_model_from(None, model).eval()
    disable_dropout(value_model)
    head = score_head_of(value_model)
    torch.nn.init.normal_(head.weight)
    with torch.no_grad():
        values = response_values(value_model, pad_batch(PROMPTS, RESPONSES, 0))
        for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            ids = torch.tensor([prompt + response])
            states = backbone(value_model)(input_ids=ids, use_cache=False).last_hidden_state
            expected = head(states)[0, len(prompt) - 1 : -1, 0]
            torch.testing.assert_close(values[row, : len(response)], expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_a_ppo_step(make_trainer, tiny_llama, tmp_path, name, adapters):  # noqa: F811
    """One update from a ratio of 1 and a KL of 0; what is saved is what was trained, and adapters merge into it."""
    parts: dict = {"model": tiny(name)}
    if name in WITHOUT_VALUES:
        config = tiny_llama(0).config
        config.num_labels = 1
        from transformers import LlamaForSequenceClassification

        parts["value_model"] = LlamaForSequenceClassification(config)
    if adapters:
        # PEFT refuses the output projection of these, which their kernels skip.
        layers = ["in_proj"] if name in ("mamba", "mamba2", "falcon_h1") else "all-linear"
        if layers == ["in_proj"]:
            # The value model is of another architecture, and its layers have other names.
            layers = ["in_proj", "q_proj"]
        parts["peft_config"] = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=layers)
    trainer = make_trainer(parts, max_steps=1, save_strategy="steps", save_steps=1, learning_rate=1e-2)
    before = answers(trainer.policy)
    trainer.train()
    row = logs(trainer)[0]
    assert row["val/first_ratio_deviation"] < 1e-4
    assert abs(row["objective/kl"]) < 1e-3
    assert row["loss/grad_norm"] > 0
    after, folder = answers(trainer.policy), tmp_path / "out" / "checkpoint-1"
    assert (after - before).abs().max() > 1e-4
    if adapters:
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2
        merged = trainer.policy.merge_and_unload()
        torch.testing.assert_close(answers(merged), after, atol=1e-4, rtol=0)
    else:
        assert torch.equal(answers(AutoModelForCausalLM.from_pretrained(folder)), after)


@pytest.mark.parametrize("name", REFUSED)
def test_a_state_that_padding_reaches_is_refused(name):
    model = tiny(name)
    with pytest.raises(UserError, match=rf"\({name}\) does not leave out what the attention mask masks"):
        generate(model, PROMPTS, SamplingConfig(4), eos_token_ids=[2], seeds=list(range(len(PROMPTS))))
    with pytest.raises(UserError, match=rf"\({name}\) does not leave out"):
        response_logprobs(model, pad_batch(PROMPTS, RESPONSES, 0))


def test_a_cache_that_is_not_handed_on_is_refused(monkeypatch):
    """Sampling never goes on from a wrong state: what the cache gives is compared with one pass, once a model."""
    from ppo_vs_dpo.models.sampling import generation

    read = generation._read

    def forgetful(model, input_ids, attention_mask, position_ids, cache):
        if input_ids.shape[1] == 1:  # as a model would that knows its cache by another name
            cache = type(cache)(model.config, capacity=8)
        return read(model, input_ids, attention_mask, position_ids, cache)

    monkeypatch.setattr(generation, "_read", forgetful)
    with pytest.raises(UserError, match=r"\(gpt2\) cannot be sampled from token by token"):
        generate(tiny("gpt2"), PROMPTS, SamplingConfig(4), eos_token_ids=[2], seeds=list(range(len(PROMPTS))))
