"""RLOO, GRPO and REINFORCE++: closed forms, an exact gradient, and a trainer that has no value model anywhere."""

import dataclasses
import itertools

import pytest
import torch

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.ppo.algorithm import gae, whiten
from ppo_vs_dpo.ppo.config import PPOConfig
from ppo_vs_dpo.ppo.rollouts.advantages import estimate, grpo, reinforce_pp, rloo
from ppo_vs_dpo.ppo.rollouts.cutting import minibatches
from ppo_vs_dpo.ppo.rollouts.rollout import Rollout
from ppo_vs_dpo.ppo.updates.losses import LossInputs, LossSettings, ppo_loss
from tests.ppo.conftest import logs, same, untimed

CRITIC_FREE = [("rloo", 2), ("grpo", 4), ("reinforce_pp", 1), ("reinforce_pp", 2)]


@pytest.mark.parametrize("k", [2, 3, 8])
def test_rloo_is_each_reward_less_the_mean_of_the_others(k, draw):
    rewards = draw(5 * k)
    found = rloo(rewards, k)
    for row in range(5 * k):
        others = [i for i in range(row // k * k, row // k * k + k) if i != row]
        assert abs(found[row] - (rewards[row] - rewards[others].mean())) < 1e-14
    assert found.view(-1, k).sum(1).abs().max() < 1e-13
    # Kept up to a factor by GRPO without its division (Dr. GRPO).
    assert torch.allclose(grpo(rewards, k, divide_by_std=False) * k / (k - 1), found, atol=1e-14)


def test_grpo_has_spread_one_and_gives_nothing_where_all_are_equal(draw):
    rewards = torch.cat([draw(4) * 100, torch.full((4,), 3.0, dtype=torch.float64)])
    found = grpo(rewards, 4)
    assert abs(found[:4].std() - 1) < 1e-5
    assert found[4:].abs().max() == 0


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_the_expected_gradient_is_the_exact_one(estimator, k):
    """On a bandit with four arms, summed over all k-tuples: RLOO's is grad E[R]; GRPO's (no std) is (k-1)/k of it."""
    logits = torch.tensor([0.3, -0.5, 0.1, 0.9], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=torch.float64)
    log_p = logits.log_softmax(0)
    exact = torch.autograd.grad((log_p.exp() * reward).sum(), logits)[0]
    found = torch.zeros(4, dtype=torch.float64)
    for drawn in itertools.product(range(4), repeat=k):
        arms = torch.tensor(drawn)
        advantages = rloo(reward[arms], k) if estimator == "rloo" else grpo(reward[arms], k, divide_by_std=False)
        log_p = logits.log_softmax(0)
        weight = log_p[arms].sum().exp().detach()
        found += torch.autograd.grad(weight * (advantages * log_p[arms]).mean(), logits)[0]
    assert torch.allclose(found, exact * (1 if estimator == "rloo" else (k - 1) / k), atol=1e-14)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_grpo_has_one_fixed_point_and_bounded_advantages(k):
    """Its expected advantage, over all groups, is 0 for every arm only where all rewards are equal; and however good
    a rare arm is, it gets no more than (k - 1) / sqrt(k)."""
    p = torch.tensor([0.4, 0.3, 0.2, 0.09, 0.01], dtype=torch.float64)

    def expected(reward: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(5, dtype=torch.float64)
        for drawn in itertools.product(range(5), repeat=k):
            arms = torch.tensor(drawn)
            total.index_add_(0, arms, p[arms].prod() * grpo(reward[arms], k))
        return total / (k * p)

    assert expected(torch.full((5,), 2.0, dtype=torch.float64)).abs().max() == 0
    for seed in range(5):
        reward = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        found = expected(reward)
        assert found[reward.argmax()] > 0.1
        assert found[reward.argmin()] < -0.1
    most = (k - 1) / k**0.5
    for height in (1.0, 1e3, 1e6):
        found = grpo(torch.tensor([height] + [0.0] * (k - 1), dtype=torch.float64), k)
        assert found[0] <= most
        assert found[0] == pytest.approx(most, rel=1e-3)


def _rollout(draw, rows=8, width=5) -> Rollout:
    mask = torch.arange(width) < torch.tensor([5, 3, 4, 1, 5, 2, 4, 3])[:rows, None]
    empty = Rollout.empty([[1, 2]] * rows, [[3] * int(n) for n in mask.sum(1)], [True] * rows, 0)
    rewards = torch.where(mask, draw(rows, width), 0)
    return dataclasses.replace(empty, rewards=rewards, values=torch.zeros_like(rewards), mask=mask, value_mask=mask)


def test_reinforce_pp_is_whitened_returns_to_go(draw):
    """With k = 1: GAE with values of 0 and lambda 1, whitened over all tokens."""
    rollout = _rollout(draw)
    args = PPOConfig(advantage="reinforce_pp", gamma=0.9, report_to="none")
    returns, _ = gae(rollout.rewards, rollout.values, rollout.mask, 0.9, 1.0)
    expected = whiten(returns, rollout.mask)
    assert torch.equal(estimate(_rollout_copy(rollout), args).advantages, expected)
    # by hand, one row: r_t + 0.9 r_{t+1} + ...
    row = rollout.rewards[1]
    assert abs(returns[1, 0] - (row[0] + 0.9 * row[1] + 0.81 * row[2])) < 1e-12


def test_the_baseline_of_reinforce_pp_is_the_groups_mean(draw):
    rollout = _rollout(draw)
    found = reinforce_pp(rollout, 2, 1.0)
    sums = rollout.rewards.sum(1)
    for row in range(8):
        mean = sums[row // 2 * 2 : row // 2 * 2 + 2].mean()
        assert abs(found[row, 0] - (sums[row] - mean)) < 1e-12
    assert found[~rollout.mask].abs().max() == 0


def _rollout_copy(rollout: Rollout) -> Rollout:
    return Rollout(**{name: value.clone() for name, value in vars(rollout).items()})


@pytest.mark.parametrize("average", ["tokens", "responses", "budget"])
def test_what_the_loss_is_a_mean_over(average, draw):
    """At ratio 1 the loss is minus the mean of the advantages, by the three means; cut into parts it adds up."""
    rollout = _rollout(draw)
    rollout.advantages = torch.where(rollout.mask, draw(8, 5), 0)
    logprobs = torch.zeros(8, 5, dtype=torch.float64)
    lengths = rollout.mask.sum(1)
    expected = {
        "tokens": rollout.advantages.sum() / lengths.sum(),
        "responses": (rollout.advantages.sum(1) / lengths).mean(),
        "budget": rollout.advantages.sum() / (8 * 6),
    }[average]
    settings = LossSettings(loss_average=average, response_length=6)
    total = 0.0
    for rows in (torch.arange(3), torch.arange(3, 8)):
        part = rollout.select(rows)
        sizes = {"tokens": rollout.mask.sum(), "value_tokens": rollout.mask.sum(), "responses": 8}
        here = logprobs[rows][:, : part.mask.shape[1]].requires_grad_()
        total = total + ppo_loss(LossInputs(rollout=part, logprobs=here, **sizes), settings).loss
    assert abs(total + expected) < 1e-6


@pytest.mark.parametrize(("advantage", "k"), CRITIC_FREE)
def test_no_value_model_anywhere(advantage, k, make_trainer, tiny_reward, tmp_path):
    """None is made, trained, saved or reported; the policy learns what the reward counts."""
    trainer = make_trainer(
        {"reward_model": tiny_reward()}, advantage=advantage, samples_per_prompt=k, save_strategy="steps", save_steps=2
    )
    assert trainer.value_model is None
    names = [name for name, _ in trainer.model.named_parameters()]
    assert names
    assert not [name for name in names if "value" in name or "score" in name]
    held = trainer.roles.held_bytes()
    assert "value" not in held
    assert held["policy"] == sum(p.numel() * p.element_size() for p in trainer.policy.parameters())
    trainer.train()
    assert {group["role"] for group in trainer.optimizer.param_groups} == {"policy"}
    (row, *_) = logs(trainer)
    assert not {"val/mean", "val/explained_variance", "loss/value_avg", "lr_value"} & row.keys()
    assert ("val/groups_without_signal" in row) == (k > 1)
    assert row["val/first_ratio_deviation"] < 1e-5
    saved = [path for path in (tmp_path / "out").rglob("*") if "value" in path.name]
    assert saved == []


def test_groups_are_the_responses_to_one_prompt(make_trainer):
    trainer = make_trainer(advantage="rloo", samples_per_prompt=4)
    rollout = trainer.collect(0)
    prompts = rollout.prompt_ids.view(4, 4, -1)
    assert (prompts == prompts[:, :1]).all()
    assert len({tuple(row.tolist()) for row in rollout.response_ids}) > 4
    of_responses = rollout.advantages.sum(1) / rollout.lengths()
    assert of_responses.view(4, 4).sum(1).abs().max() < 1e-5
    assert of_responses.abs().max() > 0.1
    for rows in minibatches(len(rollout), 2, seed=7, update=0, epoch=0, group=4):
        assert (rows.view(-1, 4) // 4 == rows.view(-1, 4)[:, :1] // 4).all()


def test_it_learns(make_trainer):
    trainer = make_trainer(
        advantage="rloo", samples_per_prompt=4, max_steps=12, rollout_batch_size=32, kl_coef=0.0, learning_rate=1e-2
    )
    trainer.train()
    scores = [row["objective/scores"] for row in logs(trainer)]
    assert sum(scores[-3:]) > sum(scores[:3]) + 0.5


@pytest.mark.parametrize(("advantage", "k"), CRITIC_FREE)
def test_goes_on_exactly(advantage, k, make_trainer, weights, tmp_path):
    settings = {
        "advantage": advantage,
        "samples_per_prompt": k,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 3,
    }
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    again = make_trainer(output_dir=str(tmp_path / "whole"), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert same(weights(whole), weights(again))
    assert untimed(logs(whole)) == untimed(logs(again))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"advantage": "rloo"}, "samples_per_prompt to at least 2"),
        ({"advantage": "grpo", "samples_per_prompt": 4, "value_warmup_updates": 3}, "it has no values"),
        ({"advantage": "rloo", "samples_per_prompt": 2, "gamma": 0.9}, "whole responses count"),
        ({"advantage": "ppo"}, "must be gae or rloo or grpo or reinforce_pp"),
        ({"loss_average": "mean"}, "must be tokens or responses or budget"),
        ({"samples_per_prompt": 0}, "at least 1"),
        ({"advantage": "rloo", "samples_per_prompt": 2, "parity": "trl-1.12"}, "of PPO with values"),
    ],
)
def test_what_cannot_be_meant_is_said(settings, words):
    with pytest.raises(UserError, match=words):
        PPOConfig(report_to="none", **settings)


def test_groups_that_do_not_fit_and_a_value_model_without_use(make_trainer, tiny_reward):
    with pytest.raises(UserError, match=r"16 responses .* whole groups of 3.*multiple of 6"):
        make_trainer(advantage="rloo", samples_per_prompt=3)
    with pytest.raises(UserError, match="advantage=rloo trains none"):
        make_trainer({"value_model": tiny_reward()}, advantage="rloo", samples_per_prompt=2)
