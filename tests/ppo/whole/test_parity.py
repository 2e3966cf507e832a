"""Conventions of other implementations: TRL 1.12 against numbers it computed, summarize-from-feedback worked by
hand."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ppo_vs_dpo.ppo.algorithm import gae, token_rewards, whiten
from ppo_vs_dpo.ppo.rollouts.advantages import extend_by_one

ROOT = Path(__file__).parents[3]
RECORDED = json.loads((Path(__file__).parents[1] / "trl_parity.json").read_text())


@pytest.mark.parametrize("case", RECORDED["cases"])
def test_numbers_that_trl_computed(case):
    """Rewards, advantages and returns of TRL 1.12 on its own log-probabilities, values and scores: 1e-5 in fp32.

    ``python benchmarks/parity_trl.py --record`` made the file; without ``--record`` it compares whole updates.
    """
    theirs = RECORDED["cases"][case]
    tensor = {name: torch.tensor(value) for name, value in theirs.items() if isinstance(value, list)}
    lengths = torch.tensor([len(row["response"]) for row in RECORDED["rollouts"]])
    mask = torch.arange(tensor["rewards"].shape[1])[None] < lengths[:, None]
    longer = extend_by_one(mask)
    settings = RECORDED["settings"]
    rewards = token_rewards(
        tensor["scores"],
        tensor["logprobs"],
        tensor["ref_logprobs"],
        mask,
        settings["kl_coef"],
        theirs["kl_estimator"],
        score_mask=longer,
    )
    if theirs["whiten_rewards"]:
        rewards = whiten(rewards, longer, shift_mean=False, unbiased=True)
    torch.testing.assert_close(rewards, tensor["rewards"], atol=1e-5, rtol=0)
    advantages, returns = gae(rewards, tensor["values"], longer, settings["gamma"], settings["lam"])
    advantages = whiten(advantages, mask, unbiased=True)
    torch.testing.assert_close(advantages, tensor["advantages"], atol=1e-5, rtol=0)
    real = longer  # beyond it TRL's returns are its zeros
    torch.testing.assert_close(returns[real], tensor["returns"][real], atol=1e-5, rtol=0)
    assert not tensor["returns"][~real].any()


def by_the_formulas(rollout, kl_coef, lam):
    """summarize_from_feedback_details/ppo.py in plain loops: score -1 without EOS, at the position after the last
    token;

    population variance; rewards whitened without shifting the mean; values one position longer than the tokens.
    """
    n, width = rollout.mask.shape
    lengths = rollout.mask.sum(1).tolist()
    rewards, values = np.zeros((n, width)), np.zeros((n, width))
    inside = np.zeros((n, width), dtype=bool)
    for i, length in enumerate(lengths):
        end = min(length, width - 1) if length < width else width - 1
        for t in range(length):
            rewards[i, t] = -kl_coef * (rollout.logprobs[i, t].item() - rollout.ref_logprobs[i, t].item())
        rewards[i, end] += rollout.scores[i].item() if rollout.finished[i] else -1.0
        for t in range(end + 1):
            inside[i, t] = True
            values[i, t] = rollout.values[i, t].item()
    mean = rewards[inside].mean()
    rewards = np.where(inside, (rewards - mean) / np.sqrt(rewards[inside].var() + 1e-8) + mean, 0)
    advantages = np.zeros((n, width))
    for i in range(n):
        running = 0.0
        for t in reversed(range(width)):
            following = values[i, t + 1] if t + 1 < width else 0.0
            running = rewards[i, t] + following - values[i, t] + lam * running
            advantages[i, t] = running
    returns = advantages + values
    mask = rollout.mask.numpy()
    whitened = np.where(mask, (advantages - advantages[mask].mean()) / np.sqrt(advantages[mask].var() + 1e-8), 0)
    return rewards, np.where(inside, returns, 0), whitened


def test_summarize_from_feedback_conventions(make_trainer, tiny_reward, tiny_llama):
    trainer = make_trainer(
        {"reward_model": tiny_reward(1), "ref_model": tiny_llama(0, initializer_range=0.2)},
        parity="summarize-from-feedback",
        whiten_rewards=True,
        kl_coef=0.05,
    )
    trainer.prepare()
    rollout = trainer.collect(0)
    assert 0 < rollout.finished.sum() < 16
    assert (rollout.logprobs != rollout.ref_logprobs).any()
    # Values count at one position more than tokens do, and are no zeros there.
    extra = rollout.value_mask & ~rollout.mask
    assert extra.any()
    assert rollout.values[extra].all()
    rewards, returns, advantages = by_the_formulas(rollout, 0.05, 0.95)
    np.testing.assert_allclose(rollout.rewards, rewards, atol=1e-5)
    np.testing.assert_allclose(rollout.returns, returns, atol=1e-5)
    np.testing.assert_allclose(rollout.advantages, advantages, atol=1e-5)


def test_the_value_after_the_last_token(make_trainer, tiny_reward):
    """The extra value of the parity conventions is that of the whole sequence: the reward model's own score at
    first."""
    trainer = make_trainer({"reward_model": tiny_reward(1)}, parity="trl-1.12")
    trainer.prepare()
    rollout = trainer.collect(0)
    extra = rollout.value_mask & ~rollout.mask
    rows = extra.any(1)
    torch.testing.assert_close(rollout.values[extra], rollout.scores[rows], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_whole_update_beside_trl(tmp_path):
    """Installs trl==1.12.0 into a throw-away folder; needs a package index."""
    probe = subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path), "trl==1.12.0"],
        capture_output=True,
    )
    if probe.returncode:
        pytest.skip("no package index to install trl==1.12.0 from")
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "parity_trl.py")], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "within 1e-05: yes" in done.stdout
