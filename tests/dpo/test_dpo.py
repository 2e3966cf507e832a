"""DPO: closed forms through TRL's trainer, the reference and its cache, and that an interrupted run ends the same."""

import ast
import math
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
from trl.trainer.dpo_config import DPOConfig

import ppo_vs_dpo.dpo.train as dpo_train
from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_jsonl, read_parquet, write_parquet
from ppo_vs_dpo.artifacts.guards.fingerprints import OF_A_PASS
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.dpo.config import smoothed_loss
from ppo_vs_dpo.dpo.data import dpo_dataset
from ppo_vs_dpo.dpo.train import build_trainer, run_stage
from ppo_vs_dpo.dpo.trainer import PairTrainer
from ppo_vs_dpo.models.loading.config import LoraSettings
from ppo_vs_dpo.models.loading.pretrained import load_policy
from ppo_vs_dpo.models.passes.logprobs import pad_batch, response_logprobs
from ppo_vs_dpo.models.text.encoding import count_rows
from ppo_vs_dpo.models.training import callbacks
from tests import warm
from tests.killed import killed_after
from tests.sft.test_sft import InterruptAt, fails, without_time
from tests.sft.tiny_run import context_of, make_rows, make_run, weights


def arguments(folder, **settings):
    defaults = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
    more = {"disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", "per_device_train_batch_size": 64}
    return DPOConfig(str(folder), **{**defaults, **more, "lr_scheduler_type": "constant", **smoothed_loss(settings)})


def pairs_of(*sides):
    """Pairs of two answers to one prompt; each side is (chosen, rejected, how often)."""
    rows = [{"prompt": "the film was", "chosen": a, "rejected": b} for a, b, n in sides for _ in range(n)]
    return Dataset.from_list(rows)


@pytest.fixture
def trainer_for(tiny_llama, word_tokenizer, tmp_path):
    """A trainer on a tiny policy in memory: ``trainer_for(pairs, beta=..., ...)``."""

    def build(pairs, reference=None, lora=None, **settings):
        dataset = dpo_dataset(pairs, word_tokenizer)
        args = arguments(tmp_path, **settings)
        return build_trainer(tiny_llama(), word_tokenizer, dataset, args, reference=reference, lora=lora)

    return build


def batch_of(trainer):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])


def log_ratio(model, reference, tokenizer, answer):
    """log pi(y|x) - log ref(y|x), summed over the answer and its EOS, by the project's own log-probabilities."""
    prompt = tokenizer("the film was")["input_ids"]
    ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    batch = pad_batch([prompt], [ids], tokenizer.pad_token_id)
    with torch.no_grad():
        return (response_logprobs(model, batch)[0].sum() - response_logprobs(reference, batch)[0].sum()).item()


PAIRS = Dataset.from_list(make_rows(8, conversational=False))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"beta": 0.3}, math.log(2)),
        ({"beta": 0.3, "label_smoothing": 0.2}, math.log(2)),
        ({"beta": 0.3, "loss_type": ["ipo"]}, (1 / (2 * 0.3)) ** 2),
        ({"beta": 0.3, "loss_type": ["hinge"]}, 1.0),
        ({"beta": 0.3, "precompute_ref_log_probs": False}, math.log(2)),
    ],
)
def test_loss_before_the_first_step(trainer_for, tiny_llama, settings, expected):
    """papers.md 3.2.1: at policy = reference the margin is 0, so DPO and cDPO lose log 2 and IPO (1 / 2 tau)^2."""
    reference = tiny_llama() if settings.get("precompute_ref_log_probs") is False else None
    trainer = trainer_for(PAIRS, reference=reference, **settings)
    trainer.model.train()
    assert trainer.compute_loss(trainer.model, batch_of(trainer)).item() == pytest.approx(expected, abs=1e-6)


def test_gradient_before_the_first_step(trainer_for, tiny_llama, word_tokenizer):
    """papers.md 3.2.1: -(beta / 2) (grad log pi(chosen) - grad log pi(rejected)), averaged over the pairs."""
    beta = 0.7
    trainer = trainer_for(PAIRS, beta=beta)
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch_of(trainer)).backward()
    model = tiny_llama()
    rows = dpo_dataset(PAIRS, word_tokenizer)
    total = 0.0
    for side, sign in (("chosen_ids", 1), ("rejected_ids", -1)):
        batch = pad_batch(rows["prompt_ids"][:], rows[side][:], 0)
        total = total + sign * response_logprobs(model, batch)[0].sum()
    (-(beta / 2) * total / len(rows)).backward()
    ours = dict(trainer.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.grad - ours[name].grad).abs().max() <= 1e-5 * parameter.grad.abs().max().clamp_min(1), name


def trained_margin(trainer, tiny_llama, tokenizer):
    """h(good) - h(bad) after training."""
    trainer.train()
    reference = tiny_llama()
    good, bad = (log_ratio(trainer.model, reference, tokenizer, answer) for answer in (" good", " bad"))
    return good - bad


def test_two_answers_reach_the_log_odds(trainer_for, tiny_llama, word_tokenizer):
    """papers.md 3.2.3: at rate q = 3/4 the implicit reward difference beta (h_w - h_l) is log 3."""
    pairs = pairs_of((" good", " bad", 12), (" bad", " good", 4))
    trainer = trainer_for(pairs, beta=0.5, max_steps=150, learning_rate=3e-3)
    assert 0.5 * trained_margin(trainer, tiny_llama, word_tokenizer) == pytest.approx(math.log(3), abs=1e-3)


def test_conservative_dpo_reaches_the_smoothed_log_odds(trainer_for, tiny_llama, word_tokenizer):
    """papers.md 3.2.3: cDPO with eps on clean labels gives logit(1 - eps), where plain DPO would go on for ever."""
    trainer = trainer_for(
        pairs_of((" good", " bad", 8)), beta=0.5, label_smoothing=0.2, max_steps=150, learning_rate=3e-3
    )
    assert 0.5 * trained_margin(trainer, tiny_llama, word_tokenizer) == pytest.approx(math.log(4), abs=1e-3)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    entropy = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    assert losses[-1] == pytest.approx(entropy, abs=1e-4)


def test_ipo_stops_at_its_margin(trainer_for, tiny_llama, word_tokenizer):
    """papers.md 3.2.4: clean labels give h_w - h_l = 1 / (2 tau). TRL averages log-ratios over the answer's tokens."""
    tau, tokens = 0.5, 2  # one word and EOS
    trainer = trainer_for(
        pairs_of((" good", " bad", 8)), beta=tau, loss_type=["ipo"], max_steps=200, learning_rate=3e-3
    )
    assert trained_margin(trainer, tiny_llama, word_tokenizer) / tokens == pytest.approx(1 / (2 * tau), abs=2e-3)


def test_swapping_the_sides_changes_the_sign_of_the_margin(trainer_for, tiny_llama):
    """papers.md 3.2.8: loss(w, l) at margin D is loss(l, w) at -D."""
    other = tiny_llama(seed=5)
    swapped = PAIRS.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    losses, margins = [], []
    for pairs in (PAIRS, swapped):
        trainer = trainer_for(pairs, reference=other, beta=0.1, precompute_ref_log_probs=True)
        trainer.model.train()
        losses.append(trainer.compute_loss(trainer.model, batch_of(trainer)).item())
        margins.append(trainer._metrics["train"]["rewards/margins"][-1])
    assert margins[0] == pytest.approx(-margins[1], rel=1e-5)
    # -log sigma(D) - (-log sigma(-D)) = -D, in the mean over pairs.
    assert losses[0] - losses[1] == pytest.approx(-margins[0], rel=1e-4)


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.4])
def test_conservative_loss_is_the_weighted_sum(trainer_for, tiny_llama, eps):
    """(1 - eps) L(w, l) + eps L(l, w), computed here from the margins that the trainer reports."""
    trainer = trainer_for(PAIRS.select([0]), reference=tiny_llama(seed=5), beta=0.4, label_smoothing=eps)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch_of(trainer)).item()
    margin = torch.tensor(trainer._metrics["train"]["rewards/margins"][-1], dtype=torch.double)
    expected = -(1 - eps) * F.logsigmoid(margin) - eps * F.logsigmoid(-margin)
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_losses_that_depend_on_the_rows_of_a_pass_are_known(trainer_for, tiny_llama):
    """Of all others the loss of a batch is the mean of its halves', so that rows may be cut up in any way."""

    def loss_of(loss, batches):
        made = trainer_for(PAIRS, reference=tiny_llama(seed=9), beta=0.3)
        made.loss_types, made.loss_weights, made.label_smoothing = [loss], [1.0], 0.1
        made.model.train()
        with torch.no_grad():
            return [made.compute_loss(made.model, made.data_collator(rows)).item() for rows in batches(made)]

    def cut(made):
        rows = [made.train_dataset[i] for i in range(8)]
        return rows, rows[:4], rows[4:]

    with pytest.raises(ValueError, match="Should be one of") as caught:
        loss_of("nonsense", cut)
    names = ast.literal_eval(re.search(r"\[.*\]", str(caught.value)).group())
    assert "sigmoid" in names
    for loss in names:
        whole, *halves = loss_of(loss, cut)
        alike = whole == pytest.approx(sum(halves) / 2, abs=1e-5)
        assert alike is (loss not in OF_A_PASS), loss


def test_smoothing_that_would_be_ignored_is_refused():
    assert smoothed_loss({"beta": 0.1}) == {"beta": 0.1}
    for settings, words in [
        ({"label_smoothing": 0.5}, "must be in"),
        ({"label_smoothing": 0.1, "loss_type": ["ipo"]}, "has no effect on the loss ipo"),
        ({"label_smoothing": 0.1, "loss_type": ["sigmoid", "sft"]}, "ambiguous"),
        ({"beta": 0}, "dpo.beta is 0"),
    ]:
        with pytest.raises(UserError, match=words):
            smoothed_loss(settings)
    kept = {"label_smoothing": 0.1, "loss_type": ["robust"]}
    assert smoothed_loss(kept) == kept


def test_precomputed_reference_equals_the_one_in_the_batch(trainer_for, tiny_llama):
    losses = []
    for precompute in (True, False):
        trainer = trainer_for(
            PAIRS, reference=tiny_llama(seed=5), beta=0.5, precompute_ref_log_probs=precompute, max_steps=5
        )
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_with_lora_the_reference_is_the_model_with_adapters_off(trainer_for, tiny_llama, word_tokenizer):
    lora = LoraSettings(r=2, alpha=8, target_modules=["q_proj", "v_proj"])
    trainer = trainer_for(PAIRS, lora=lora, beta=0.5, max_steps=10, learning_rate=1e-2)
    trainer.train()
    first, *_, last = [row for row in trainer.state.log_history if "loss" in row]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert last["rewards/margins"] > 0.1
    reported = trainer.evaluate(dpo_dataset(pairs_of((" good", " bad", 1)), word_tokenizer))
    reference = tiny_llama()
    expected = 0.5 * log_ratio(trainer.model, reference, word_tokenizer, " good")
    assert reported["eval_rewards/chosen"] == pytest.approx(expected, abs=1e-5)


def test_texts_go_trls_way(tiny_llama, word_tokenizer, tmp_path):
    """`build_trainer` also takes TRL's preference format as it is."""
    trainer = build_trainer(tiny_llama(), word_tokenizer, PAIRS, arguments(tmp_path, beta=0.2, max_steps=2))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_reference_that_is_not_where_the_policy_starts_stops(tiny_llama, word_tokenizer, tmp_path):
    """The first loss is log 2, or the run ends before its first step; a reference that is meant to differ may."""

    def build(**given):
        args = arguments(tmp_path, beta=0.3, max_steps=1)
        return build_trainer(tiny_llama(), word_tokenizer, dpo_dataset(PAIRS, word_tokenizer), args, **given)

    wrong = build(reference=tiny_llama(1), starts_from_reference=True)
    before = {name: tensor.clone() for name, tensor in wrong.model.named_parameters()}
    with pytest.raises(UserError, match=r"before the first step .* nats from the reference's .* should be log 2"):
        wrong.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in wrong.model.named_parameters())
    other = build(reference=tiny_llama(1))
    other.train()
    assert other.state.log_history[0]["loss"] != pytest.approx(math.log(2), abs=1e-3)
    assert "the reference is another model than the policy starts from" in other.start_note
    same = build(reference=tiny_llama(), starts_from_reference=True)
    same.train()
    assert same.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert same.start_note is None


def test_a_trained_adapter_is_a_part_of_the_reference(tiny_llama, word_tokenizer, tmp_path):
    """A policy that comes with an adapter from SFT: its reference is the model with it, or the run stops."""
    from peft import LoraConfig, get_peft_model

    policy = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    args = arguments(tmp_path, beta=0.3, max_steps=1)
    trainer = build_trainer(policy, word_tokenizer, dpo_dataset(PAIRS, word_tokenizer), args)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_other_vocabulary(trainer_for, tiny_llama):
    with pytest.raises(UserError, match="the policy has 20 tokens and the reference 24"):
        trainer_for(PAIRS, reference=tiny_llama(vocab_size=24))


def test_stage(word_tokenizer, tiny_llama, tmp_path):
    run = make_run(tmp_path, word_tokenizer, tiny_llama(), dpo={"max_steps": 30, "learning_rate": 5e-3})
    run_stage(context_of(run, "dpo"))
    figures = run.done("dpo")["figures"]
    assert figures["pair_set"]["hash"] == "abc"
    assert figures["implicit_accuracy"] > 0.9
    assert (figures["pairs"], figures["left_out"], figures["steps"], figures["beta"]) == (32, 0, 30, 0.5)
    first = read_jsonl(run.path("dpo", "metrics.jsonl"))[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("logps/chosen", "logps/rejected", "rewards/margins", "rewards/accuracies"):
        assert name in first
    # The figures agree with the saved model, read by the project's own functions.
    policy, reference = load_policy(run.path("dpo", "model")), tiny_llama()
    rows = dpo_dataset(Dataset.from_parquet(str(run.path("pairs", "test.parquet"))), word_tokenizer)
    sides = []
    for side in ("chosen_ids", "rejected_ids"):
        batch = pad_batch(rows["prompt_ids"][:], rows[side][:], 0)
        with torch.no_grad():
            sides.append(response_logprobs(policy, batch)[0].sum(-1) - response_logprobs(reference, batch)[0].sum(-1))
    assert figures["implicit_accuracy"] == pytest.approx((sides[0] > sides[1]).float().mean().item(), abs=1e-6)
    assert figures["implicit_margin"] == pytest.approx(0.5 * (sides[0] - sides[1]).mean().item(), abs=1e-4)


def test_a_sweep_computes_the_reference_once(word_tokenizer, tiny_llama, tmp_path, monkeypatch):
    run = make_run(tmp_path, word_tokenizer, tiny_llama(), dpo={"precompute_ref_log_probs": True})
    context, said = context_of(run, "dpo"), []
    monkeypatch.setattr(context, "progress", lambda *what: said.append(what))
    run_stage(context)
    # Before the first step the overview is told how far the reference has read, to the last pair.
    number = count_rows(run.path("pairs", "train.parquet"))
    assert (number, number, "read by the reference") in said
    assert said[0][0] < number
    kept = sorted(run.path("pairs", "reference_logprobs").iterdir())
    assert len(kept) == 2  # training and test pairs
    with monkeypatch.context() as patch:
        patch.setattr("trl.trainer.dpo_trainer.DPOTrainer._precompute_ref_logps", None)
        run_stage(context_of(run, "dpo", {"beta": 0.1}))
        # Read instead of computed, the same settings end in the same bits.
        first = weights(run.path("dpo", "model"))
        run.clear("dpo")
        run_stage(context_of(run, "dpo"))
    assert weights(run.path("dpo", "model")) == first
    assert weights(run.path("sweep", "dpo,beta=0.1", "model")) != first
    assert run.done("dpo,beta=0.1")["figures"]["beta"] == 0.1
    # What cannot be read, or is of fewer pairs, is computed again.
    write_parquet(kept[1], read_parquet(kept[1]).select(range(2)))
    kept[0].write_bytes(b"PAR1")
    run.clear("dpo")
    run_stage(context_of(run, "dpo"))
    assert weights(run.path("dpo", "model")) == first
    # Another reference has other values: nothing old is read.
    tiny_llama(seed=9).save_pretrained(run.path("sft", "model"))
    run.clear("dpo")
    run_stage(context_of(run, "dpo"))
    assert len(list(run.path("pairs", "reference_logprobs").iterdir())) == 4
    assert read_jsonl(run.path("dpo", "metrics.jsonl"))[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("settings", [{}, {"train_sampling_strategy": "sequential"}, {"data_seed": 5}])
def test_the_reference_reads_the_pairs_that_are_trained_and_no_others(trainer_for, tiny_llama, settings, monkeypatch):
    rows = Dataset.from_list(make_rows(200, conversational=False))
    read, drawn = [], []
    plain, of_step = PairTrainer.compute_ref_log_probs, PairTrainer.compute_loss

    def noted(into, call):
        def inner(self, *args, **kwargs):
            batch = next(arg for arg in args if isinstance(arg, dict))
            into.extend(batch["input_ids"].tolist())
            return call(self, *args, **kwargs)

        return inner

    monkeypatch.setattr(PairTrainer, "compute_ref_log_probs", noted(read, plain))
    monkeypatch.setattr(PairTrainer, "compute_loss", noted(drawn, of_step))
    few = {"max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, **settings}
    trainer = trainer_for(rows, beta=0.5, learning_rate=1e-2, precompute_ref_log_probs=True, **few)
    assert len(read) == 2 * 24
    assert trainer.share_read == 24 / 200
    known = [value == value for value in trainer.train_dataset["ref_chosen_logps"][:]]
    assert sum(known) == 24
    # Somebody draws random numbers between making and training: the order is the one that was foreseen.
    torch.manual_seed(1234)
    trainer.train()
    words = lambda rows: sorted([token for token in row if token] for row in rows)  # noqa: E731
    assert words(drawn) == words(read)
    # The same steps as where the reference reads along.
    beside = trainer_for(
        rows, reference=tiny_llama(), beta=0.5, learning_rate=1e-2, precompute_ref_log_probs=False, **few
    )
    beside.train()
    for one, other in zip(trainer.model.parameters(), beside.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)
    # More steps than the trainer was made for stop with a sentence, not with NaN.
    trainer.args.max_steps = 12
    with pytest.raises(UserError, match=r"step \d+ draws pairs that the reference has not read"):
        trainer.train()


def test_the_reference_reads_all_where_all_are_trained_or_nobody_can_say(trainer_for):
    rows = Dataset.from_list(make_rows(24, conversational=False))
    for settings in (
        {"num_train_epochs": 1},
        {"max_steps": 6},
        {"max_steps": 2, "train_sampling_strategy": "group_by_length"},
        {"max_steps": 2, "accelerator_config": {"use_seedable_sampler": False}},
    ):
        trainer = trainer_for(rows, beta=0.5, precompute_ref_log_probs=True, per_device_train_batch_size=4, **settings)
        assert trainer.share_read == 1.0, settings
        assert all(value == value for value in trainer.train_dataset["ref_chosen_logps"][:])


def test_another_reference_than_the_start(word_tokenizer, tiny_llama, tmp_path):
    tiny_llama(seed=9).save_pretrained(tmp_path / "other")
    run = make_run(
        tmp_path / "run", word_tokenizer, tiny_llama(), dpo={"reference_path": str(tmp_path / "other"), "max_steps": 1}
    )
    run_stage(context_of(run, "dpo"))
    assert abs(read_jsonl(run.path("dpo", "metrics.jsonl"))[0]["loss"] - math.log(2)) > 1e-3
    (said,) = run.done("dpo")["figures"]["warnings"]
    assert "another model than the policy starts from" in said
    tiny_llama(vocab_size=24).save_pretrained(tmp_path / "strange")
    run = make_run(tmp_path / "bad", word_tokenizer, tiny_llama(), dpo={"reference_path": str(tmp_path / "strange")})
    fails(run, run_stage, "Use a policy and a reference with the same tokenizer", "dpo")


def test_an_interrupted_run_ends_bit_for_bit_as_if_it_had_not_been(word_tokenizer, tiny_llama, tmp_path, monkeypatch):
    whole = make_run(tmp_path / "whole", word_tokenizer, tiny_llama())
    run_stage(context_of(whole, "dpo"))
    cut = make_run(tmp_path / "cut", word_tokenizer, tiny_llama())
    with monkeypatch.context() as patch:
        patch.setattr(dpo_train, "callbacks", lambda context: [*callbacks(context), InterruptAt(5)])
        with pytest.raises(KeyboardInterrupt):
            run_stage(context_of(cut, "dpo"))
    run_stage(context_of(cut, "dpo"))
    assert weights(cut.path("dpo", "model")) == weights(whole.path("dpo", "model"))
    logs = [without_time(read_jsonl(run.path("dpo", "metrics.jsonl"))) for run in (whole, cut)]
    assert logs[0][:-2] == logs[1][:-2]


def command(run: RunFolder) -> list[str]:
    return [sys.executable, "-m", "ppo_vs_dpo.dpo", str(run.root)]


def test_killed_process(word_tokenizer, tiny_llama, tmp_path):
    """kill -9 in the middle of training, then the same command: the same model, bit for bit."""
    settings = {"max_steps": 30, "save_steps": 5}
    whole = make_run(tmp_path / "whole", word_tokenizer, tiny_llama(), dpo=settings)
    run_stage(context_of(whole, "dpo"))
    cut = make_run(tmp_path / "cut", word_tokenizer, tiny_llama(), dpo=settings)
    killed_after("ppo_vs_dpo.models.callbacks.stamp", 2, "ppo_vs_dpo.dpo", str(cut.root))
    assert cut.done("dpo") is None
    with warm.forks():
        finished = subprocess.run(command(cut), capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "going on from" in finished.stderr
    assert weights(cut.path("dpo", "model")) == weights(whole.path("dpo", "model"))


def test_lora_on_conversations(word_tokenizer, tiny_llama, tmp_path):
    lora = {"r": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    run = make_run(
        tmp_path,
        word_tokenizer,
        tiny_llama(),
        conversational=True,
        dpo={"lora": lora, "max_steps": 30, "learning_rate": 2e-2, "gradient_checkpointing": True},
    )
    run_stage(context_of(run, "dpo"))
    assert run.done("dpo")["figures"]["implicit_accuracy"] > 0.8
    ids = torch.tensor([[5, 7, 9, 11]])
    merged = AutoModelForCausalLM.from_pretrained(run.path("dpo", "model"))
    adapter = AutoPeftModelForCausalLM.from_pretrained(run.path("dpo", "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapter(ids).logits, atol=1e-5, rtol=0)


def test_without_test_pairs_nothing_is_evaluated(word_tokenizer, tiny_llama, tmp_path):
    run = make_run(tmp_path, word_tokenizer, tiny_llama(), dpo={"max_steps": 1})
    run.path("pairs", "test.parquet").unlink()
    run_stage(context_of(run, "dpo"))
    assert run.done("dpo")["figures"]["implicit_accuracy"] is None


def test_messages_for_bad_input(word_tokenizer, tiny_llama, tmp_path):
    make = lambda name, **keys: make_run(tmp_path / name, word_tokenizer, tiny_llama(), dpo=keys)  # noqa: E731
    fails(make("beta", beta=0.0), run_stage, "dpo.beta is 0.0; it must be above 0", "dpo")
    fails(make("key", betta=0.1), run_stage, "dpo.betta: no such key. Did you mean beta?", "dpo")
    fails(make("reserved", output_dir="x"), run_stage, "dpo.output_dir: set by the stage itself", "dpo")
    order = "dpo.train_sampling_strategy=batch_rebalance reads one length a row, and a pair has two"
    fails(make("order", train_sampling_strategy="batch_rebalance"), run_stage, order, "dpo")
    fails(make("short", max_length=2), run_stage, "Raise dpo.max_length", "dpo")
    run = make("long", max_length=500)
    rows = [{"prompt": "the", "chosen": " good" * 90, "rejected": " bad", "pair_id": "p7"}]
    write_parquet(run.path("pairs", "train.parquet"), rows)
    fails(run, run_stage, "row p7 has 92 tokens and the model takes 64", "dpo")
    run = make("nopairs")
    run.path("pairs", "done.json").unlink()
    fails(run, run_stage, "stage pairs", "dpo")
