"""Labels that are probabilities, in DPO: the same cross-entropy on the implicit reward."""

import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from ppo_vs_dpo.artifacts.files import read_parquet, write_parquet
from ppo_vs_dpo.dpo.data import dpo_dataset
from ppo_vs_dpo.dpo.train import run_stage
from ppo_vs_dpo.models.loading.config import LoraSettings
from tests.dpo.test_dpo import batch_of, log_ratio, trained_margin, trainer_for  # noqa: F401
from tests.sft.test_sft import fails
from tests.sft.tiny_run import context_of, make_run

ANSWERS = [(" good", " bad"), (" dull", " very good"), (" bright", " bad and dull"), (" bad", " good")]
LABELS = [0.9, 0.5, None, 0.6]


def pairs_with(labels, answers=ANSWERS):
    rows = [
        {"prompt": "the film was", "chosen": a, "rejected": b, "soft_label": p}
        for (a, b), p in zip(answers, labels, strict=True)
    ]
    return Dataset.from_list(rows)


def test_one_probability_gives_its_log_odds(trainer_for, tiny_llama, word_tokenizer):  # noqa: F811
    """papers.md 3.2.3 with p in place of the rate: beta (h_w - h_l) = logit p."""
    pairs = pairs_with([0.8] * 8, [(" good", " bad")] * 8)
    trainer = trainer_for(pairs, beta=0.5, max_steps=150, learning_rate=3e-3)
    assert 0.5 * trained_margin(trainer, tiny_llama, word_tokenizer) == pytest.approx(math.log(4), abs=1e-3)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] == pytest.approx(-(0.8 * math.log(0.8) + 0.2 * math.log(0.2)), abs=1e-4)


def test_the_loss_is_the_weighted_sum_of_both_directions(trainer_for, tiny_llama, word_tokenizer):  # noqa: F811
    """-p log sigma(beta d) - (1 - p) log sigma(-beta d), from the project's own log-probabilities."""
    beta, reference = 0.4, tiny_llama(seed=5)
    trainer = trainer_for(pairs_with(LABELS), reference=reference, beta=beta)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch_of(trainer)).item()
    ratios = [[log_ratio(tiny_llama(), reference, word_tokenizer, answer) for answer in pair] for pair in ANSWERS]
    d = beta * torch.tensor([chosen - rejected for chosen, rejected in ratios], dtype=torch.double)
    p = torch.tensor([0.9, 0.5, 1.0, 0.6], dtype=torch.double)
    assert d.abs().min() > 0.05
    expected = -(p * F.logsigmoid(d) + (1 - p) * F.logsigmoid(-d)).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_one_label_for_all_is_conservative_dpo(trainer_for, tiny_llama):  # noqa: F811
    """The gradient too: p = 0.8 against label_smoothing 0.2."""
    gradients = []
    for labels, settings in (([0.8] * 4, {}), ([None] * 4, {"label_smoothing": 0.2})):
        trainer = trainer_for(pairs_with(labels), reference=tiny_llama(seed=5), beta=0.4, **settings)
        trainer.model.train()
        trainer.compute_loss(trainer.model, batch_of(trainer)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_with_lora_and_in_an_evaluation(trainer_for, word_tokenizer):  # noqa: F811
    lora = LoraSettings(r=2, alpha=8, target_modules=["q_proj", "v_proj"])
    trainer = trainer_for(pairs_with(LABELS), lora=lora, beta=0.5, max_steps=2, learning_rate=1e-2)
    trainer.train()
    first = next(row for row in trainer.state.log_history if "loss" in row)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch_of(trainer)).item()
    again = dpo_dataset(pairs_with(LABELS), word_tokenizer)
    assert "soft_label" in again.column_names
    assert trainer.evaluate(again)["eval_loss"] == pytest.approx(loss, abs=1e-6)


def test_the_stage_trains_on_them_unless_told_otherwise(word_tokenizer, tiny_llama, tmp_path):
    margins = {}
    for use in (True, False):
        run = make_run(
            tmp_path / str(use),
            word_tokenizer,
            tiny_llama(),
            dpo={"max_steps": 60, "learning_rate": 5e-3, "use_soft_labels": use},
        )
        for split in ("train", "test"):
            path = run.path("pairs", f"{split}.parquet")
            write_parquet(path, [{**row, "soft_label": 0.7} for row in read_parquet(path)])
        run_stage(context_of(run, "dpo"))
        figures = run.done("dpo")["figures"]
        assert figures["soft_labels"] is use
        margins[use] = figures["implicit_margin"]
    # logit 0.7 = 0.85, where certain labels go on for ever.
    assert margins[True] == pytest.approx(math.log(7 / 3), abs=0.3)
    assert margins[False] > 2 * margins[True]


def test_a_loss_without_a_place_for_them_is_refused(word_tokenizer, tiny_llama, tmp_path):
    for number, settings in enumerate(({"loss_type": ["ipo"]}, {"label_smoothing": 0.1})):
        run = make_run(tmp_path / str(number), word_tokenizer, tiny_llama(), dpo=settings)
        path = run.path("pairs", "train.parquet")
        write_parquet(path, [{**row, "soft_label": 0.7} for row in read_parquet(path)])
        fails(run, run_stage, "set dpo.use_soft_labels=false", "dpo")
