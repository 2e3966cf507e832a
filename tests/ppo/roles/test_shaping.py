"""Rewards that are harder to hack: closed forms, and each in the trainer: ensembles, PAR, length, GDPO, dense."""

import copy
import math

import pytest
import torch

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.ppo.config import PPOConfig
from ppo_vs_dpo.ppo.roles.rewards import make_rewards
from ppo_vs_dpo.ppo.roles.shaping import combined, normalised_apart, par
from ppo_vs_dpo.ppo.rollouts.responses import final_scores
from ppo_vs_dpo.preferences.recipes.functions import ScoreError, sums_of_dense
from ppo_vs_dpo.reward_model.scorer import RewardScorer
from tests.ppo.conftest import count_good, logs, same, untimed


def test_ensembles_by_hand():
    scores = torch.tensor([[1.0, 3.0], [2.0, 2.0], [-1.0, 5.0]])
    assert combined(scores, "mean", 9.0).tolist() == [2, 2, 2]
    assert combined(scores, "worst", 9.0).tolist() == [1, 2, -1]
    assert combined(scores, "uncertainty", 0.5).tolist() == [2 - 0.5 * 1, 2, 2 - 0.5 * 9]


def test_par_by_hand():
    """Half for a response as good as the reference's, bounded, and whatever is added to all scores cancels."""
    scores, references = torch.tensor([1.0, 5.0, 100.0]), torch.tensor([[1.0, 0.0], [5.0, 5.0], [0.0, 0.0]])
    expected = [(0.5 + 1 / (1 + math.exp(-1))) / 2, 0.5, 1.0]
    assert par(scores, references).tolist() == pytest.approx(expected)
    assert par(scores + 7, references + 7).tolist() == pytest.approx(expected)


def test_gdpo_by_hand_and_on_any_scale():
    """Group means 0 and spreads 1 of each part before the weights; a part's scale and offset change nothing."""
    parts = torch.tensor([[1.0, 0.0], [3.0, 100.0], [0.0, 5.0], [0.0, 5.0]])
    found = normalised_apart(parts, torch.tensor([1.0, 0.5]), 2)
    assert found.tolist() == pytest.approx([-1.5 / 2**0.5, 1.5 / 2**0.5, 0, 0], abs=1e-3)
    other = normalised_apart(parts * torch.tensor([50.0, 3.0]) + 7, torch.tensor([1.0, 0.5]), 2)
    torch.testing.assert_close(found, other, atol=1e-3, rtol=0)


def test_order_of_what_is_made_of_a_score(tmp_path):
    args = PPOConfig(
        output_dir=str(tmp_path), report_to="none", score_clip=0.3, missing_eos="subtract", missing_eos_penalty=2.0
    )
    scores, finished = torch.tensor([2.0, 2.0]), torch.tensor([True, False])
    lengths, references = torch.tensor([3, 5]), torch.tensor([[1.4], [1.0]])
    found = final_scores(scores, finished, args, 0.1, lengths, 0.2, references)
    # 2 - 0.2 x 3 = 1.4, sigma(0) = 0.5, - 0.1, clipped to 0.3; 2 - 1 = 1, the same, less 2.
    assert found.tolist() == pytest.approx([0.3, 0.3 - 2.0])


@pytest.mark.parametrize("kind", ["mean", "worst", "uncertainty"])
def test_an_ensemble_as_the_reward(kind, make_trainer, tiny_reward, word_tokenizer):
    """Scores are what the members' own are combined to; all are held, and the value model starts from the first."""
    models = [tiny_reward(seed) for seed in (1, 2, 3)]
    alone = [RewardScorer(copy.deepcopy(model), word_tokenizer) for model in models]
    trainer = make_trainer({"reward_model": models}, reward_ensemble=kind, reward_ensemble_coef=0.4)
    one = trainer.roles.held_bytes()["value"]
    trainer.prepare()
    rollout = trainer.collect(0)
    rows = [
        [*p[m].tolist(), *r[n].tolist()]
        for p, m, r, n in zip(rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.mask, strict=True)
    ]
    scores = torch.tensor([scorer.score_sequences(rows) for scorer in alone]).T
    torch.testing.assert_close(rollout.scores, combined(scores, kind, 0.4), atol=1e-5, rtol=0)
    held = trainer.roles.held_bytes()
    assert held["reward"] == sum(p.numel() * 4 for model in models for p in model.parameters())
    assert held["value"] == one
    # The value model's head has a bias.
    assert trainer.sizes.reward == 3 * (trainer.sizes.value - 1)
    trainer.update(rollout, 0)


def test_members_of_other_vocabularies(tiny_reward, word_tokenizer):
    other = copy.deepcopy(word_tokenizer)
    other.add_tokens(["another"])
    scorers = [RewardScorer(tiny_reward(1), word_tokenizer), RewardScorer(tiny_reward(2, vocab_size=200), other)]
    with pytest.raises(UserError, match=r"member 1 .* another vocabulary"):
        make_rewards(scorers, None, word_tokenizer, None, None, 8)
    with pytest.raises(UserError, match="two or more reward models"):
        make_rewards([count_good, count_good], None, word_tokenizer, None, None, 8)
    with pytest.raises(UserError, match="a list of 1"):
        make_rewards([scorers[0]], None, word_tokenizer, None, None, 8)


def test_par_compares_with_the_references_own(make_trainer, weights, tmp_path):
    """Scores lie in (0, 1); a prompt's references are drawn once, by its own seeds; going on is exact."""
    settings = {
        "reward_shaping": "par", "par_references": 3, "missing_eos_penalty": None, "save_strategy": "steps",
        "save_steps": 1, "max_steps": 3,
    }  # fmt: skip
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    known = whole.roles.reference_scores
    assert all(len(scores) == 3 for scores in known.values())
    assert len({tuple(scores) for scores in known.values()}) > 2
    again = make_trainer(output_dir=str(tmp_path / "whole"), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert same(weights(whole), weights(again))
    assert untimed(logs(whole)) == untimed(logs(again))
    assert all(0 < row["objective/final_scores"] < 1 for row in logs(whole))
    assert all(known[row] == scores for row, scores in again.roles.reference_scores.items())


def test_length_pays_nothing(make_trainer, tiny_reward):
    """A reward of 0.5 a token, less what a token is worth, is 0; auto asks the reward model."""

    def long_is_good(prompts, completions, response_ids, **columns):
        return [0.5 * len(ids) for ids in response_ids]

    trainer = make_trainer({"reward_funcs": long_is_good}, score_length_coef=0.5, missing_eos_penalty=None)
    trainer.prepare()
    rollout = trainer.collect(0)
    assert rollout.scores.max() > 0.5
    assert rollout.final_scores.abs().max() < 1e-6
    with pytest.raises(UserError, match="score_length_coef=auto"):
        make_trainer({"reward_funcs": long_is_good}, score_length_coef="auto")
    with pytest.raises(UserError, match="score_length_coef=auto"):
        make_trainer({"reward_model": tiny_reward()}, score_length_coef="auto")


def test_gdpo_in_the_trainer(make_trainer):
    """A part with a hundred times the spread does not decide alone; the logged score is the plain weighted sum."""

    def length(prompts, completions, response_ids, **columns):
        return [-100.0 * len(ids) for ids in response_ids]

    settings = {"advantage": "grpo", "grpo_divide_by_std": False, "samples_per_prompt": 4, "missing_eos_penalty": None}
    settings |= {"whiten_advantages": True, "reward_weights": [1.0, 0.5], "kl_coef": 0.0}
    trainer = make_trainer({"reward_funcs": [count_good, length]}, reward_aggregation="normalize_then_sum", **settings)
    trainer.prepare()
    rollout = trainer.collect(0)
    lengths = rollout.lengths().float()
    good = rollout.scores + 50 * lengths
    parts = torch.stack([good, -100 * lengths], dim=1)
    expected = normalised_apart(parts, torch.tensor([1.0, 0.5]), 4)
    torch.testing.assert_close(rollout.final_scores, expected, atol=1e-4, rtol=0)
    assert abs(rollout.advantages[rollout.mask].std(unbiased=False) - 1) < 1e-4
    with pytest.raises(UserError, match="there is one: reward function count_good"):
        make_trainer({"reward_funcs": count_good}, reward_aggregation="normalize_then_sum", samples_per_prompt=4)


def test_dense_rewards_are_paid_where_they_stand(make_trainer):
    """One number a token beside one for the whole: rewards add up, and lie at their tokens; the last has the rest."""

    def by_place(prompts, completions, response_ids, **columns):
        return [[0.25 * place for place in range(len(ids))] for ids in response_ids]

    trainer = make_trainer(
        {"reward_funcs": [by_place, count_good]}, reward_weights=[2.0, 1.0], kl_coef=0.0, missing_eos_penalty=None
    )
    trainer.prepare()
    rollout = trainer.collect(0)
    places = torch.arange(rollout.mask.shape[1]).expand_as(rollout.mask)
    dense = torch.where(rollout.mask, 0.5 * places, 0.0)
    last = rollout.lengths() - 1
    torch.testing.assert_close(rollout.dense_rewards, dense, atol=1e-6, rtol=0)
    counted = rollout.scores - dense.sum(1)
    assert counted.tolist() == pytest.approx(counted.round().tolist(), abs=1e-5)
    expected = dense.clone()
    expected[torch.arange(len(last)), last] += counted
    torch.testing.assert_close(rollout.rewards, expected, atol=1e-5, rtol=0)
    trainer.train()


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([[1.0, 2.0], 3.0], "2 rewards for sample 0, whose response has 3 tokens"),
        ([3.0, [1.0, float("nan")]], "nan for token 1 of sample 1"),
        ([3.0, ["a", 1.0]], "'a' for token 0 of sample 1"),
    ],
)
def test_dense_rewards_that_do_not_fit(found, words):
    with pytest.raises(ScoreError, match=words):
        sums_of_dense("reward function f", found, [3, 2])


def test_plain_scores_are_not_touched():
    scores = [1.0, None]
    assert sums_of_dense("f", scores, [3, 2]) == (scores, None)
    assert sums_of_dense("f", [torch.tensor([1.0, 2.0]), 5.0], [2, 3]) == ([3.0, 5.0], [[1.0, 2.0], [0.0] * 3])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reward_shaping": "par", "sync_ref_model": True}, "sync_ref_model moves it"),
        ({"reward_shaping": "par", "score_bias": "auto"}, "a bias cancels"),
        ({"reward_shaping": "tanh"}, "must be none or par"),
        ({"reward_aggregation": "normalize_then_sum"}, "samples_per_prompt to at least 2"),
        ({"reward_ensemble": "median"}, "must be mean or worst or uncertainty"),
        ({"reward_ensemble_coef": -1.0}, "must be at least 0"),
        ({"par_references": 0}, "at least 1"),
        ({"score_length_coef": "much"}, "a number or 'auto'"),
    ],
)
def test_what_cannot_be_meant_is_said(settings, words):
    with pytest.raises(UserError, match=words):
        PPOConfig(report_to="none", **settings)
