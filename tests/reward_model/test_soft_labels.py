"""Labels that are probabilities: the reward model's loss is the cross-entropy to them, and what it converges to."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl.trainer.reward_config import RewardConfig

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_parquet, write_parquet
from ppo_vs_dpo.models.loading.pretrained import load_tokenizer, load_value_or_reward
from ppo_vs_dpo.reward_model.data import reward_dataset
from ppo_vs_dpo.reward_model.scorer import RewardScorer
from ppo_vs_dpo.reward_model.train import build_trainer, initial_model, run_stage
from tests.sft.test_sft import fails
from tests.sft.tiny_run import context_of, make_run


@pytest.fixture
def base(tiny_llama, word_tokenizer, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    word_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trainer_on(base, folder, pairs, model=None, **settings):
    args = RewardConfig(
        str(folder),
        **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True},
        **{"per_device_train_batch_size": 64, "lr_scheduler_type": "constant", "save_strategy": "no", **settings},
    )
    tokenizer = load_tokenizer(base)
    model = initial_model(base, None, "zero", 0) if model is None else model
    dataset = reward_dataset(Dataset.from_list(pairs), tokenizer, use_margin="margin" in pairs[0])
    return build_trainer(model, tokenizer, dataset, args)


def pair(chosen, rejected, **more):
    return {"prompt": "the film was", "chosen": chosen, "rejected": rejected, **more}


def loss_of(trainer):
    trainer.model.train()
    rows = [trainer.train_dataset[row] for row in range(len(trainer.train_dataset))]
    return trainer.compute_loss(trainer.model, trainer.data_collator(rows)).item()


def scores(model, base, answers):
    return RewardScorer(model, load_tokenizer(base)).score(["the film was"] * len(answers), answers)


def test_one_probability_gives_its_log_odds(base, tmp_path):
    """Cross-entropy with p = 3/4 is least at r(good) - r(bad) = logit p = log 3, as 3 wins in 4 would be."""
    trainer = trainer_on(
        base, tmp_path, [pair(" good", " bad", soft_label=0.75)] * 8, max_steps=150, learning_rate=1e-2
    )
    trainer.train()
    good, bad = scores(trainer.model, base, [" good", " bad"])
    assert good - bad == pytest.approx(math.log(3), abs=1e-3)
    losses = [row["train_loss"] for row in trainer.state.log_history if "train_loss" in row]
    assert losses[-1] > -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) - 1e-6  # the entropy is the floor


def test_the_judges_scores_come_back_up_to_a_shift(base, tmp_path):
    """papers.md M8: labels sigma(s_i - s_j) of a judge with scores s; some pairs lack a label of their own."""
    judge = {" good": 1.1, " dull": 0.4, " bad": 0.0}
    pairs = [
        pair(a, b, soft_label=1 / (1 + math.exp(judge[b] - judge[a])))
        for a in judge
        for b in judge
        if judge[a] > judge[b]
    ]
    trainer = trainer_on(base, tmp_path, pairs * 8, max_steps=300, learning_rate=1e-2)
    trainer.train()
    found = np.array(scores(trainer.model, base, list(judge)))
    wanted = np.array(list(judge.values()))
    np.testing.assert_allclose(found - found.mean(), wanted - wanted.mean(), atol=2e-3)


@pytest.mark.parametrize("margin", [None, 0.7])
def test_the_loss_is_the_weighted_sum_of_both_directions(base, tmp_path, margin):
    """-p log sigma(d) - (1 - p) log sigma(-d), d = r(chosen) - r(rejected) - margin, of a model with a random head."""
    torch.manual_seed(1)
    model = load_value_or_reward(base, None, trainable=True)
    torch.nn.init.normal_(model.score.weight)
    labels = [0.9, 0.5, None, 0.6]
    answers = [(" good", " bad"), (" dull", " very good"), (" bright", " bad and dull"), (" bad", " good")]
    more = {} if margin is None else {"margin": margin}
    rows = [pair(a, b, soft_label=p, **more) for (a, b), p in zip(answers, labels, strict=True)]
    found = loss_of(trainer_on(base, tmp_path, rows, model=model))
    r = torch.tensor([scores(model, base, side) for side in zip(*answers, strict=True)], dtype=torch.double)
    d = r[0] - r[1] - (margin or 0.0)
    p = torch.tensor([0.9, 0.5, 1.0, 0.6], dtype=torch.double)
    expected = -(p * torch.nn.functional.logsigmoid(d) + (1 - p) * torch.nn.functional.logsigmoid(-d)).mean()
    assert d.abs().min() > 0.05
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_without_labels_the_loss_is_trls_to_the_last_bit(base, tmp_path):
    rows = [pair(" good", " bad"), pair(" dull and bad", " bright")]
    torch.manual_seed(1)
    model = load_value_or_reward(base, None, trainable=True)
    torch.nn.init.normal_(model.score.weight)
    plain = loss_of(trainer_on(base, tmp_path, rows, model=model))
    certain = loss_of(trainer_on(base, tmp_path, [{**row, "soft_label": 1.0} for row in rows], model=model))
    assert plain == certain
    # A column that holds nothing is no column.
    empty = reward_dataset(
        Dataset.from_dict({**{k: [row[k] for row in rows] for k in rows[0]}, "soft_label": [None, None]}),
        load_tokenizer(base),
    )
    assert "soft_label" not in empty.column_names


def test_the_stage_trains_on_them_unless_told_otherwise(word_tokenizer, tiny_llama, tmp_path):
    settings = {"max_steps": 60, "learning_rate": 1e-2}
    spread = {}
    for use in (True, False):
        run = make_run(
            tmp_path / str(use), word_tokenizer, tiny_llama(), reward_model={**settings, "use_soft_labels": use}
        )
        path = run.path("pairs", "train.parquet")
        rows = [{**row, "soft_label": 0.55} for row in read_parquet(path)]
        write_parquet(path, rows)
        run_stage(context_of(run, "reward_model"))
        figures = run.done("reward_model")["figures"]
        assert figures["soft_labels"] is use
        scorer = RewardScorer.load(run.path("reward_model", "model"))
        chosen, rejected = (scorer.score([row["prompt"] for row in rows], [row[s] for row in rows]) for s in SIDES)
        spread[use] = np.mean(np.array(chosen) - np.array(rejected))
    # Labels of 55 % are worth a difference of logit .55 = 0.2; certain ones grow without end.
    assert abs(spread[True] - math.log(0.55 / 0.45)) < 0.15
    assert spread[False] > 2


SIDES = ("chosen", "rejected")


def test_a_label_that_is_no_probability_is_named(word_tokenizer, tiny_llama, tmp_path):
    run = make_run(tmp_path, word_tokenizer, tiny_llama())
    path = run.path("pairs", "train.parquet")
    rows = [{**row, "soft_label": 1.5 if number == 3 else 0.5} for number, row in enumerate(read_parquet(path))]
    write_parquet(path, rows)
    fails(run, run_stage, "pair pair3 has soft_label 1.5; it is the probability", "reward_model")
    with pytest.raises(UserError, match=r"set reward_model\.use_soft_labels=false"):
        reward_dataset(path, word_tokenizer)
