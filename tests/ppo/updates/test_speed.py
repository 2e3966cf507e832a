"""What makes PPO fast changes nothing: the same rollouts, and the same weights after updates, as the plain path."""

import pytest
import torch

from ppo_vs_dpo.ppo.roles.trained import PolicyAndValue
from ppo_vs_dpo.ppo.rollouts.responses import sample

SETTINGS = {"num_ppo_epochs": 2, "optim": "sgd", "learning_rate": 1e-2, "max_steps": 2}


def run(make_trainer, **settings):
    """All rollouts and the trainer after two updates."""
    trainer = make_trainer(**{**SETTINGS, **settings})
    collect, rollouts = trainer.collect, []

    def kept(*args):
        rollouts.append(collect(*args))
        return rollouts[-1]

    trainer.collect = kept
    trainer.train()
    return trainer, rollouts


def check_equal(plain, fast, weights):
    """Tokens exactly, numbers of the rollouts and trained weights within 1e-5, and a first ratio of 1 in both."""
    for expected, got in zip(plain[1], fast[1], strict=True):
        assert expected.lengths().unique().numel() > 1
        for name, tensor in vars(expected).items():
            torch.testing.assert_close(getattr(got, name), tensor, atol=1e-5, rtol=1e-5)
    before, after = weights(plain[0]), weights(fast[0])
    assert max((before[name] - after[name]).abs().max() for name in before) < 1e-5
    for trainer, _ in (plain, fast):
        deviations = [row["val/first_ratio_deviation"] for row in trainer.state.log_history if "episode" in row]
        assert len(deviations) == 2
        assert max(deviations) < 1e-5


@pytest.mark.parametrize("tokens", [1, 20, 1000])
def test_token_budget(make_trainer, weights, tokens):
    """Micro-batches of one row, of a few, and of all."""
    check_equal(run(make_trainer), run(make_trainer, micro_batch_tokens=tokens), weights)


def test_packed_and_reserved_against_padded(make_trainer, weights, monkeypatch):
    """Packed passes and generation's masks against padded passes with transformers' own attention."""
    fast = run(make_trainer)
    monkeypatch.setattr("ppo_vs_dpo.models.passes.logprobs.can_pack", lambda model: False)
    monkeypatch.setattr("ppo_vs_dpo.models.sampling.generation.can_pack", lambda model: False)
    check_equal(run(make_trainer), fast, weights)


def test_logprobs_from_sampling(make_trainer, weights, monkeypatch):
    """Taken from sampling in fp32 where asked for; worked out in a pass of their own otherwise."""
    passes = []
    forward = PolicyAndValue.forward

    def noted(self, *args, with_policy=True, **kwargs):
        passes.append((with_policy, torch.is_grad_enabled()))
        return forward(self, *args, with_policy=with_policy, **kwargs)

    monkeypatch.setattr(PolicyAndValue, "forward", noted)
    fast = run(make_trainer, logprobs_from_sampling=True)
    assert (True, False) not in passes
    passes.clear()
    plain = run(make_trainer)
    assert (True, False) in passes
    check_equal(plain, fast, weights)


@pytest.mark.parametrize("settings", [{"top_k": 5}, {"bf16": True}, {"parity": "trl-1.12"}])
def test_sampling_from_another_distribution_is_not_trusted(make_trainer, settings):
    trainer = make_trainer(logprobs_from_sampling=True, **settings)
    trainer.prepare()
    drawn = sample(trainer.roles, trainer.prompts.ids[:2], [0, 1], trainer.args)
    assert [one.logprobs for one in drawn] == [None, None]


def test_a_budget_must_be_positive(make_trainer):
    from ppo_vs_dpo.artifacts.errors import UserError

    with pytest.raises(UserError, match="micro_batch_tokens is 0"):
        make_trainer(micro_batch_tokens=0)
