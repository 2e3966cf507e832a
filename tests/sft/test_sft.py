"""SFT: what it learns from, where it starts, what it leaves behind, and that an interrupted run ends the same."""

import json
import os
import shutil
from pickle import UnpicklingError

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

import ppo_vs_dpo.sft.train as sft_train
from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, read_jsonl, write_parquet
from ppo_vs_dpo.artifacts.guards import refusals
from ppo_vs_dpo.artifacts.guards.checkpoints import numbered, stamp
from ppo_vs_dpo.models.loading.config import ModelConfig
from ppo_vs_dpo.models.loading.pretrained import load_policy
from ppo_vs_dpo.models.training import ORDERS, callbacks
from ppo_vs_dpo.sft.data import sft_dataset
from ppo_vs_dpo.sft.train import run_stage, save_unchanged
from tests.sft.tiny_run import ARCHITECTURE, context_of, make_run, weights

TEXTS = Dataset.from_dict({"prompt": ["the film was", "a story"], "completion": [" very good", " dull and bad"]})


def same_as_trl(tokenizer, tiny_llama, tmp_path, completion_only_loss):
    args = SFTConfig(
        str(tmp_path), completion_only_loss=completion_only_loss, use_cpu=True, bf16=False, report_to="none"
    )
    trainer = SFTTrainer(tiny_llama(), args, train_dataset=TEXTS, processing_class=tokenizer)
    return trainer.train_dataset


@pytest.mark.parametrize("completion_only_loss", [True, False])
def test_tokens_and_labels_are_those_of_trl(word_tokenizer, tiny_llama, tmp_path, completion_only_loss):
    ours = sft_dataset(TEXTS, word_tokenizer, completion_only_loss, None, None)
    theirs = same_as_trl(word_tokenizer, tiny_llama, tmp_path, completion_only_loss)
    # TRL appends the text of EOS; the word tokenizer of these tests splits at spaces only, so it must be its own word.
    spaced = [
        word_tokenizer(f"{p}{c} </s>")["input_ids"] for p, c in zip(TEXTS["prompt"], TEXTS["completion"], strict=True)
    ]
    assert ours["input_ids"][:] == spaced
    for mine, other, prompt in zip(ours["labels"][:], theirs["labels"][:], TEXTS["prompt"][:], strict=True):
        length = len(word_tokenizer(prompt)["input_ids"])
        assert (mine[:length] == [-100] * length) is completion_only_loss
        assert (other[:length] == [-100] * length) is completion_only_loss
        assert mine[-1] == word_tokenizer.eos_token_id


def test_a_tiny_policy_is_trained_from_scratch(word_tokenizer, tmp_path):
    run = make_run(tmp_path, word_tokenizer, sft={"max_steps": 30, "learning_rate": 1e-2})
    run_stage(context_of(run, "sft"))
    rows = [row for row in read_jsonl(tmp_path / "sft" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    figures = read_json(tmp_path / "sft" / "done.json")["figures"]
    assert (figures["examples"], figures["left_out"], figures["steps"]) == (32, 0, 30)
    # What is saved is a plain model: nothing of how it was trained remains in its config.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sft" / "model")
    assert model.config._attn_implementation == "sdpa"
    assert "grouped" not in (tmp_path / "sft" / "model" / "config.json").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "sft" / "model").eos_token == "</s>"
    assert {p.name for p in (tmp_path / "sft" / "checkpoints").glob("checkpoint-*")} == {
        "checkpoint-28",
        "checkpoint-30",
    }


class InterruptAt(TrainerCallback):
    """Ctrl-C at the end of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def without_time(rows):
    timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


@pytest.mark.parametrize("order", ["random", "batch_rebalance"])
def test_an_interrupted_run_ends_bit_for_bit_as_if_it_had_not_been(word_tokenizer, tmp_path, monkeypatch, order):
    """In its second epoch, whose order is another one than the first's."""
    settings = {"train_sampling_strategy": order}
    whole = make_run(tmp_path / "whole", word_tokenizer, sft=settings)
    run_stage(context_of(whole, "sft"))
    cut = make_run(tmp_path / "cut", word_tokenizer, sft=settings)
    with monkeypatch.context() as patch:
        patch.setattr(sft_train, "callbacks", lambda context: [*callbacks(context), InterruptAt(5)])
        with pytest.raises(KeyboardInterrupt):
            run_stage(context_of(cut, "sft"))
    # The newest checkpoint was half written: it is passed over, and step 3 is done again.
    newest = cut.path("sft", "checkpoints", "checkpoint-4")
    (newest / "trainer_state.json").write_text("{")
    run_stage(context_of(cut, "sft"))
    assert weights(cut.path("sft", "model")) == weights(whole.path("sft", "model"))
    same_account(whole, cut)


def same_account(whole, cut, stage="sft"):
    """Every line of the log, the summary of the whole run included, and the stage's figures."""
    logs = [without_time(read_jsonl(run.path(stage, "metrics.jsonl"))) for run in (whole, cut)]
    assert logs[0] == logs[1]
    tokens = [row["num_tokens"] for row in logs[1] if "num_tokens" in row]
    assert tokens == sorted(tokens)
    assert whole.done(stage)["figures"] == cut.done(stage)["figures"]


class StopAt(TrainerCallback):
    """As transformers' callback for SIGTERM does, and whatever else ends training in order."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


def test_training_that_ends_before_its_last_step_is_no_result(word_tokenizer, tmp_path, monkeypatch):
    run = make_run(tmp_path, word_tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(sft_train, "callbacks", lambda context: [*callbacks(context), StopAt(3)])
        fails(run, run_stage, "sft: training ended at step 3 of 6")
    run_stage(context_of(run, "sft"))
    assert run.done("sft")["figures"]["steps"] == 6
    with pytest.raises(UserError, match="on SIGTERM it ends training, and a stage that ends is done"):
        run_stage(context_of(make_run(tmp_path / "jit", word_tokenizer, sft={"enable_jit_checkpoint": True}), "sft"))


def test_killed_before_a_checkpoint_counts_the_one_before_is_there(word_tokenizer, tmp_path, monkeypatch, capsys):
    """Also where one is kept: it goes when the next can be gone on from."""
    run = make_run(tmp_path, word_tokenizer, sft={"save_total_limit": 1})
    steps = []

    def killed(folder, *arguments, **keys):
        steps.append(folder.name)
        if len(steps) == 2:
            raise KeyboardInterrupt
        stamp(folder, *arguments, **keys)

    with monkeypatch.context() as patch:
        patch.setattr("ppo_vs_dpo.models.callbacks.stamp", killed)
        with pytest.raises(KeyboardInterrupt):
            run_stage(context_of(run, "sft"))
    assert steps == ["checkpoint-2", "checkpoint-4"]
    run_stage(context_of(run, "sft"))
    assert f"going on from {run.path('sft', 'checkpoints', 'checkpoint-2')}" in capsys.readouterr().err
    assert [path.name for path in numbered(run.path("sft", "checkpoints"))] == ["checkpoint-6"]


@pytest.mark.parametrize("lost", [[], ["checkpoint-6"]])
def test_killed_after_its_last_step(word_tokenizer, tmp_path, lost):
    """The log had its summary already, or steps that no checkpoint knows of: each line is there once."""
    runs = [make_run(tmp_path / name, word_tokenizer) for name in ("whole", "cut")]
    for run in runs:
        run_stage(context_of(run, "sft"))
    whole, cut = runs
    for path in (cut.path("sft", "done.json"), *(cut.path("sft", "checkpoints", name) for name in lost)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(cut.path("sft", "model"))
    run_stage(context_of(cut, "sft"))
    assert weights(cut.path("sft", "model")) == weights(whole.path("sft", "model"))
    same_account(whole, cut)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "model.safetensors"])
@pytest.mark.parametrize("how", ["missing", "torn", "changed and stamped"])
def test_a_spoilt_checkpoint_is_named_and_the_one_before_taken(word_tokenizer, tmp_path, capsys, name, how):
    whole = make_run(tmp_path / "whole", word_tokenizer, pairs=16)
    run_stage(context_of(whole, "sft"))
    before = weights(whole.path("sft", "model"))
    whole.path("sft", "done.json").unlink()
    newest = whole.path("sft", "checkpoints", "checkpoint-6")
    spoilt = newest / name
    if how == "missing":
        spoilt.unlink()
    else:
        spoilt.write_bytes(spoilt.read_bytes()[:-20] if how == "torn" else b"\0" * spoilt.stat().st_size)
    if how == "changed and stamped":  # as a large file's, whose bytes are not hashed
        stamp(newest, None)
        with pytest.raises(UserError, match=r"checkpoint-6 could not be read .*the same command"):
            run_stage(context_of(whole, "sft"))
    run_stage(context_of(whole, "sft"))
    assert (
        f"checkpoint-6 cannot be gone on from: {name if how != 'changed and stamped' else ''}"
        in capsys.readouterr().err
    )
    assert weights(whole.path("sft", "model")) == before


def test_lora_is_merged_into_a_plain_model(word_tokenizer, tmp_path, tiny_llama):
    tiny_llama().save_pretrained(tmp_path / "base")
    word_tokenizer.save_pretrained(tmp_path / "base")
    lora = {"r": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    run = make_run(tmp_path / "run", word_tokenizer, model={"path": str(tmp_path / "base")}, sft={"lora": lora})
    run_stage(context_of(run, "sft"))
    ids = torch.tensor([[5, 7, 9, 11]])
    merged = AutoModelForCausalLM.from_pretrained(run.path("sft", "model"))
    adapter = AutoPeftModelForCausalLM.from_pretrained(run.path("sft", "adapter"))
    base = load_policy(tmp_path / "base")
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapter(ids).logits, atol=1e-5, rtol=0)
        assert (merged(ids).logits - base(ids).logits).abs().max() > 1e-3
    figures = run.done("sft")["figures"]
    assert figures["trainable_parameters"] == 2 * 2 * 2 * (16 + 16)


def test_an_adapter_alone(word_tokenizer, tmp_path, tiny_llama):
    tiny_llama().save_pretrained(tmp_path / "base")
    word_tokenizer.save_pretrained(tmp_path / "base")
    run = make_run(
        tmp_path / "run",
        word_tokenizer,
        model={"path": str(tmp_path / "base")},
        sft={"lora": {"r": 2}, "merge_lora": False},
    )
    run_stage(context_of(run, "sft"))
    assert (run.path("sft", "model") / "adapter_config.json").is_file()
    assert not run.path("sft", "adapter").exists()
    assert load_policy(run.path("sft", "model")).num_parameters() == tiny_llama().num_parameters()


def test_a_trained_model_may_be_taken_as_it_is(word_tokenizer, tmp_path, tiny_llama):
    tiny_llama(seed=3).save_pretrained(tmp_path / "base")
    word_tokenizer.save_pretrained(tmp_path / "base")
    run = make_run(
        tmp_path / "run", word_tokenizer, model={"path": str(tmp_path / "base")}, sft={"skip_training": True}
    )
    run_stage(context_of(run, "sft"))
    assert weights(run.path("sft", "model")) == weights(tmp_path / "base")
    assert run.done("sft")["figures"]["trained"] is False
    # The same bytes under two names: no second copy on the disk; whoever deletes one keeps the other.
    ours, theirs = run.path("sft", "model", "model.safetensors"), tmp_path / "base" / "model.safetensors"
    assert ours.samefile(theirs)
    theirs.unlink()
    AutoModelForCausalLM.from_pretrained(run.path("sft", "model"))


def test_an_untrained_model_is_copied_where_it_cannot_be_linked(tiny_llama, tmp_path, monkeypatch):
    model = tiny_llama(seed=3)
    model.save_pretrained(tmp_path / "base", max_shard_size="10KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    config = ModelConfig(path=str(tmp_path / "base"))
    for name, refuse in (("linked", False), ("copied", True)):
        (tmp_path / name).mkdir()
        if refuse:
            monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("other disk")))
        save_unchanged(model, config, tmp_path / name)
        found = AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())


def test_conversations(word_tokenizer, tmp_path):
    """Prompt and completion as messages, and whole conversations, both learn."""
    run = make_run(tmp_path / "pairs", word_tokenizer, conversational=True)
    run_stage(context_of(run, "sft"))
    assert run.done("sft")["figures"]["examples"] == 32
    run = make_run(tmp_path / "messages", word_tokenizer)
    talk = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "was good"}]
    write_parquet(run.path("data", "sft_train.parquet"), [{"messages": talk}] * 16)
    run_stage(context_of(run, "sft"))
    assert run.done("sft")["figures"]["examples"] == 16


def fails(run, stage_function, message, stage="sft"):
    with pytest.raises(UserError) as caught:
        stage_function(context_of(run, stage))
    assert message in str(caught.value)
    assert not (run.path(stage) / "done.json").exists()


def test_messages_for_bad_input(word_tokenizer, tmp_path):
    make = lambda name, **sft: make_run(tmp_path / name, word_tokenizer, sft=sft)  # noqa: E731
    fails(make("key", learning_rte=1), run_stage, "sft.learning_rte: no such key. Did you mean learning_rate?")
    fails(make("value", lr_scheduler_type="linar"), run_stage, "sft: linar is not a valid SchedulerType")
    fails(make("skip", skip_training=True), run_stage, "sft.skip_training needs a trained model in model.path")
    fails(make("short", max_length=2), run_stage, "Raise sft.max_length")
    order = "sft.train_sampling_strategy=group_by_length draws an order that no checkpoint holds"
    fails(make("order", train_sampling_strategy="group_by_length"), run_stage, order)
    for (key, value), why in ORDERS.items():
        message = f"sft.accelerator_config.{key}={str(value).lower()} {why}"
        fails(make(key, accelerator_config={key: value}), run_stage, message)
    run = make("columns")
    write_parquet(run.path("data", "sft_train.parquet"), [{"question": "a", "answer": "b"}])
    fails(run, run_stage, "SFT needs prompt and completion, or messages, or text")
    run = make("long", max_length=500)
    write_parquet(run.path("data", "sft_train.parquet"), [{"prompt": "the", "completion": " good" * 90}])
    fails(run, run_stage, "row 0 has 92 tokens and the model takes 64")
    run = make("diverge", learning_rate=1e38, max_grad_norm=0)
    fails(run, run_stage, "training diverged")


def test_chat_data_needs_a_chat_template(word_tokenizer, tmp_path):
    import copy

    mute = copy.deepcopy(word_tokenizer)
    mute.chat_template = None
    run = make_run(tmp_path, mute, conversational=True)
    fails(run, run_stage, "has no chat template")


def test_a_checkpoint_of_another_model_is_not_loaded(word_tokenizer, tmp_path):
    run_stage(context_of(make_run(tmp_path, word_tokenizer), "sft"))
    (tmp_path / "sft" / "done.json").unlink()
    larger = {**ARCHITECTURE, "hidden_size": 32}
    run = make_run(tmp_path, word_tokenizer, model={"path": None, "architecture": larger})
    # Nothing but the name of its settings says so; here they have none.
    fails(run, run_stage, "checkpoint-6 could not be read (size mismatch")
    context = context_of(run, "sft")
    context.fingerprint = "larger"
    run_stage(context)
    assert {path.name for path in (tmp_path / "sft" / "checkpoints").glob("unfit-*")} == {
        "unfit-1-checkpoint-4",
        "unfit-1-checkpoint-6",
    }


def test_progress_is_written(word_tokenizer, tmp_path):
    run_stage(context_of(make_run(tmp_path, word_tokenizer), "sft"))
    assert json.loads((tmp_path / "sft" / "progress.json").read_text())["total"] == 6


class Code:
    """What a pickled file runs when it is read as any Python object."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_code_in_a_training_state_or_in_weights_is_not_run(word_tokenizer, tiny_llama, tmp_path):
    """A pickled file that names code is refused in a sentence; a state's checkpoint is set aside, and work goes on."""
    run, ran = make_run(tmp_path / "run", word_tokenizer), tmp_path / "ran"
    run_stage(context_of(run, "sft"))
    expected = (run.path("sft", "model", "model.safetensors")).read_bytes()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (run.path("sft") / "done.json").unlink()
        newest, before, *_ = numbered(run.path("sft", "checkpoints"))
        if name == "rng_state.pth":  # read where a step is still to come
            shutil.rmtree(newest)
            newest = before
        torch.save({"state": Code(ran)}, newest / name)
        stamp(newest, None)  # whoever can write the file can write its hash
        fails(run, run_stage, "could not be read (it holds more than tensors (posix.mkdir), which could run anything;")
        assert not ran.exists()
        run_stage(context_of(run, "sft"))
        assert run.path("sft", "model", "model.safetensors").read_bytes() == expected
    tiny_llama().save_pretrained(tmp_path / "base")
    word_tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Code(ran)}, tmp_path / "base" / "pytorch_model.bin")
    run = make_run(tmp_path / "weights", word_tokenizer, model={"path": str(tmp_path / "base")})
    with pytest.raises(UnpicklingError) as caught:
        run_stage(context_of(run, "sft"))
    said = refusals.explain(caught.value)
    assert said == (
        f"{tmp_path}/base/pytorch_model.bin is not loaded: it holds more than tensors (posix.mkdir), which could run "
        f"anything; only tensors are loaded."
    )
    assert not ran.exists()
    torch.load(tmp_path / "base" / "pytorch_model.bin", weights_only=False)  # the trap is one
    assert ran.exists()
