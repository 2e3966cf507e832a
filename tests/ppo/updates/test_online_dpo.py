"""Online DPO: TRL's loss on the same pairs, the optimum whoever samples, Xu's counterexample, and the loop."""

import copy
import dataclasses
import itertools

import pytest
import torch
from datasets import Dataset
from trl.trainer.dpo_config import DPOConfig

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.dpo.train import build_trainer
from ppo_vs_dpo.ppo.config import PPOConfig
from ppo_vs_dpo.ppo.rollouts.rollout import Rollout
from ppo_vs_dpo.ppo.stage.config import trained_share, trains_values
from ppo_vs_dpo.ppo.updates.losses import LossInputs, LossSettings
from ppo_vs_dpo.ppo.updates.online_dpo import chosen_and_rejected, dpo_loss
from tests.ppo.conftest import logs, same, untimed

ONLINE = {"loss": "dpo", "samples_per_prompt": 4, "kl_coef": 0.1}


def letters(prompts, completions, **columns):
    """A reward that seldom ties."""
    return [sum(ord(letter) for letter in completion) / 100 for completion in completions]


def rollout_of(scores, ref=None) -> Rollout:
    """Responses of one token each, with the scores given."""
    scores = torch.as_tensor(scores, dtype=torch.float64)
    empty = Rollout.empty([[1]] * len(scores), [[2]] * len(scores), [True] * len(scores), 0)
    ref = torch.zeros(len(scores)) if ref is None else ref
    return dataclasses.replace(empty, final_scores=scores, ref_logprobs=ref[:, None])


def test_a_pair_is_the_best_and_the_worst_of_a_group():
    rollout = rollout_of([1.0, 3.0, 2.0, 0.0, 5.0, 5.0, 5.0, 5.0, 2.0, 1.0, 1.0, 2.0])
    rollout.response_ids[:, 0] = torch.arange(12)
    # Ties: the first and the last, so never one row twice.
    assert chosen_and_rejected(rollout, 4).response_ids[:, 0].tolist() == [1, 3, 4, 7, 8, 10]


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_the_update_is_that_of_trls_dpo_on_the_same_pairs(loss, make_trainer, tiny_llama, word_tokenizer, tmp_path):
    """Samples, pairs and one step of ours; TRL's DPOTrainer on those pairs: the same loss, the same weights after."""
    reference = tiny_llama(3, initializer_range=0.2)
    sgd = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    trainer = make_trainer(
        {"ref_model": copy.deepcopy(reference), "reward_funcs": letters}, **{**ONLINE, "loss": loss},
        num_mini_batches=1, num_ppo_epochs=1,
        max_steps=1, per_device_train_batch_size=4, **sgd,
    )  # fmt: skip
    policy = copy.deepcopy(trainer.policy)
    trainer.prepare()
    rollout = trainer.collect(0)
    assert rollout.scores.unique().numel() > 2
    pairs = chosen_and_rejected(rollout, 4)
    rows = [ids[mask].tolist() for ids, mask in zip(pairs.response_ids, pairs.mask, strict=True)]
    prompts = [ids[mask].tolist() for ids, mask in zip(pairs.prompt_ids, pairs.prompt_mask, strict=True)]
    # Pairs whose scores tie say nothing, and TRL's data could not hold them.
    scores = pairs.final_scores.view(-1, 2)
    told = [i for i in range(len(scores)) if scores[i, 0] != scores[i, 1]]
    data = {"prompt_ids": prompts[::2], "chosen_ids": rows[::2], "rejected_ids": rows[1::2]}
    data = Dataset.from_dict({name: [column[i] for i in told] for name, column in data.items()})
    theirs = build_trainer(
        reference, word_tokenizer, data,
        DPOConfig(
            output_dir=str(tmp_path / "dpo"), beta=0.1, loss_type=["sigmoid" if loss == "dpo" else "ipo"],
            per_device_train_batch_size=8, report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
        ),
    )  # fmt: skip
    batch = next(iter(theirs.get_train_dataloader()))
    theirs._check_start = lambda inputs: None  # this policy is not the reference
    theirs.model.load_state_dict(policy.state_dict())
    theirs.model.train()
    expected = theirs.compute_loss(theirs.model, batch) * len(told) / len(scores)
    expected.backward()
    done = trainer.update(rollout, 0)
    assert done.metrics["loss/policy_avg"] == pytest.approx(expected.item(), abs=1e-5)
    assert done.metrics["rewards/ties"] == pytest.approx(1 - len(told) / len(scores))
    for name, before in policy.named_parameters():
        after = before.detach() - 0.1 * dict(theirs.model.named_parameters())[name].grad
        torch.testing.assert_close(trainer.policy.get_parameter(name).detach(), after, atol=1e-5, rtol=0)
    assert trainer.value_model is None


def expected_loss(logits, ref, reward, weights, settings) -> torch.Tensor:
    """Of all pairs of one-token answers, each as often as ``weights`` ``(A, A)`` says."""
    logprobs, total = logits.log_softmax(0), 0.0
    for i, j in itertools.combinations(range(len(reward)), 2):
        first, second = (i, j) if reward[i] >= reward[j] else (j, i)
        pair = torch.tensor([first, second])
        inputs = LossInputs(
            rollout=rollout_of(reward[pair], ref[pair]), logprobs=logprobs[pair][:, None], responses=2,
            tokens=torch.tensor(2), value_tokens=torch.tensor(2),
        )  # fmt: skip
        total = total + weights[i, j] * dpo_loss(inputs, settings).loss
    return total


BETA = 0.5


def optimum(ref, reward, beta=BETA):
    return (ref + reward / beta).log_softmax(0)


@pytest.mark.parametrize("sampler", ["itself", "reference", "uniform"])
def test_its_optimum_is_that_of_the_regularised_reward_whoever_samples(sampler):
    """With Bradley-Terry labels the expected gradient is 0 at pi*, and nowhere else; with certain labels it is not."""
    ref = torch.tensor([0.2, -1.0, 0.7, 0.1], dtype=torch.float64).log_softmax(0)
    reward = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=torch.float64)
    best = optimum(ref, reward)
    by = {"itself": best, "reference": ref, "uniform": torch.zeros(4, dtype=torch.float64)}[sampler].softmax(0)
    weights = by[:, None] * by[None]

    def gradient(at, labels):
        logits = at.clone().requires_grad_()
        settings = LossSettings(loss="dpo", beta=BETA, preference_labels=labels)
        return torch.autograd.grad(expected_loss(logits, ref, reward, weights, settings), logits)[0].abs().max()

    assert gradient(best, "bradley_terry") < 1e-12
    assert gradient(ref, "bradley_terry") > 1e-3
    assert gradient(best, "certain") > 1e-3


def test_xus_counterexample():
    """Xu et al. 2024 (2404.10719), table 1: an answer that neither the data nor the reference has.

    DPO on the one pair of the data is as content with 0.9 of the mass on it as with none, and nothing moves that
    answer (its gradient is 0); online it is sampled, compared, and goes, to the optimum.
    """
    ref = torch.tensor([0.5, 0.5, 1e-6], dtype=torch.float64).log()
    reward = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    start = torch.tensor([0.0999, 0.0001, 0.9], dtype=torch.float64).log()
    without = torch.tensor([0.999, 0.001, 1e-9], dtype=torch.float64).log()
    settings = LossSettings(loss="dpo", beta=BETA, preference_labels="bradley_terry")
    pair = torch.zeros(3, 3, dtype=torch.float64)
    pair[0, 1] = 1.0
    logits = start.clone().requires_grad_()
    offline = expected_loss(logits, ref, reward, pair, settings)
    assert abs(offline - expected_loss(without, ref, reward, pair, settings)) < 1e-9
    assert torch.autograd.grad(offline, logits)[0][2] == 0
    optimizer = torch.optim.Adam([logits], lr=0.2)
    for _ in range(150):
        own = logits.detach().softmax(0)
        optimizer.zero_grad()
        expected_loss(logits, ref, reward, own[:, None] * own[None], settings).backward()
        optimizer.step()
    assert logits.softmax(0)[2] < 1e-3
    torch.testing.assert_close(logits.detach().softmax(0), optimum(ref, reward).exp(), atol=1e-3, rtol=0)


def test_micro_batches_part_no_pair(make_trainer, weights):
    """Two rows at a time or all at once: the same update, also where tokens are counted."""
    found = []
    sgd = {"optim": "sgd", "learning_rate": 0.1}
    for size, tokens in ((16, None), (2, None), (16, 30)):
        trainer = make_trainer(**ONLINE, **sgd, per_device_train_batch_size=size, micro_batch_tokens=tokens)
        trainer.train()
        found.append(weights(trainer))
    for other in found[1:]:
        for name, tensor in found[0].items():
            torch.testing.assert_close(tensor, other[name], atol=2e-6, rtol=0)


@pytest.mark.parametrize("k", [2, 4])
def test_it_learns(k, make_trainer):
    trainer = make_trainer(
        loss="dpo",
        samples_per_prompt=k,
        max_steps=12,
        rollout_batch_size=32,
        kl_coef=0.05,
        learning_rate=1e-2,
        missing_eos_penalty=None,
    )
    trainer.train()
    rows = logs(trainer)
    scores = [row["objective/scores"] for row in rows]
    assert sum(scores[-3:]) > sum(scores[:3]) + 0.5
    assert rows[0]["val/first_ratio_deviation"] < 1e-5
    assert not {"val/mean", "val/explained_variance", "loss/value_avg", "policy/clipfrac_avg"} & rows[0].keys()
    assert "value" not in trainer.roles.held_bytes()


def test_goes_on_exactly(make_trainer, weights, tmp_path):
    settings = {**ONLINE, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    again = make_trainer(output_dir=str(tmp_path / "whole"), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert same(weights(whole), weights(again))
    assert untimed(logs(whole)) == untimed(logs(again))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"samples_per_prompt": 1}, "samples_per_prompt to at least 2"),
        ({"per_device_train_batch_size": 1}, "both responses of a pair"),
        ({"kl_coef": 0.0}, "must be positive"),
        ({"advantage": "rloo"}, "advantage=rloo with loss=dpo"),
        ({"whiten_rewards": True}, "no part in that loss"),
        ({"value_warmup_updates": 2}, "it has no values"),
        ({"loss": "kto"}, "must be ppo or dpo or ipo"),
        ({"preference_labels": "hard"}, "must be certain or bradley_terry"),
    ],
)
def test_what_cannot_be_meant_is_said(settings, words):
    with pytest.raises(UserError, match=words):
        PPOConfig(report_to="none", **{**ONLINE, **settings})


def test_a_value_model_without_use(make_trainer, tiny_reward):
    with pytest.raises(UserError, match="loss=dpo trains none"):
        make_trainer({"value_model": tiny_reward()}, **ONLINE)


def test_pairs_that_cannot_be_shared_out():
    args = PPOConfig(report_to="none", rollout_batch_size=24, **{**ONLINE, "samples_per_prompt": 4})
    with pytest.raises(UserError, match=r"2 ranks no equal number of pairs.*multiple of 16"):
        dataclasses.replace(args, num_mini_batches=2).rollout_size(2)


@pytest.mark.parametrize("loss", ["ppo", "dpo", "ipo"])
@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo", "reinforce_pp"])
def test_who_plans_knows_who_trains_values(loss, advantage):
    section = {"loss": loss, "advantage": advantage, "samples_per_prompt": 4}
    if loss == "ppo" or advantage == "gae":
        assert trains_values(section) == PPOConfig(report_to="none", **section).has_critic
    assert trained_share(section) == (1.0 if loss == "ppo" else 0.5)
