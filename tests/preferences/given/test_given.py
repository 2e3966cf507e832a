"""Pairs from files and from the configuration, through both steps: splits, test sets, SFT examples, settings."""

import gzip
import json

import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, read_parquet
from ppo_vs_dpo.preferences.config import SOURCES, DataConfig, data_settings
from ppo_vs_dpo.preferences.schema import pair_set_hash
from tests.preferences.conftest import ROOT, make_run, run_here, run_step
from tests.preferences.files import ROWS, given, steps, write_jsonl


def test_a_file_goes_through_both_steps(tmp_path, plain_model):
    folder = given(tmp_path, plain_model, path=str(write_jsonl(tmp_path / "pairs.jsonl")))
    done = run_step(folder, "data")
    assert done.returncode == 0, done.stderr
    run_here(folder, "pairs")
    figures = read_json(folder / "data" / "done.json")["figures"]
    assert (figures["train_pairs"], figures["test_pairs"], figures["heldout_prompts"]) == (48, 6, 6)
    train, test = (read_parquet(folder / "pairs" / f"{name}.parquet") for name in ("train", "test"))
    assert set(train.column_names) == {"prompt", "chosen", "rejected", "prompt_id", "pair_id"}
    heldout = read_parquet(folder / "data" / "prompts_heldout.parquet")
    splits = [set(train["prompt"]), set(test["prompt"]), set(heldout["prompt"])]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 60
    # A held-out prompt brings the preferred response along, to be compared with.
    assert {(row["prompt"], row["reference"]) for row in heldout} <= {(row["prompt"], row["chosen"]) for row in ROWS}
    sft = read_parquet(folder / "data" / "sft_train.parquet")
    assert list(zip(sft["prompt"], sft["completion"], strict=True)) == list(
        zip(train["prompt"], train["chosen"], strict=True)
    )
    assert set(read_parquet(folder / "data" / "prompts_train.parquet")["prompt"]) == set(train["prompt"])
    assert read_json(folder / "pairs" / "done.json")["figures"]["pair_set"] == {
        "hash": pair_set_hash({"train": train["pair_id"], "test": test["pair_id"]}),
        "n_train": 48,
        "n_test": 6,
    }
    assert not (folder / "data" / "staging").exists()


def test_every_file_kind_gives_the_same_pair_set(tmp_path, plain_model):
    write_jsonl(tmp_path / "a.jsonl")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as out:
        out.write((tmp_path / "a.jsonl").read_text())
    (tmp_path / "c.json").write_text(json.dumps(ROWS))
    (tmp_path / "d.json").write_text(json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}))
    (tmp_path / "e.json").write_text((tmp_path / "a.jsonl").read_text())
    Dataset.from_list(ROWS).to_parquet(tmp_path / "f.parquet")
    Dataset.from_list(ROWS).to_csv(tmp_path / "g.csv")
    (tmp_path / "h").mkdir()
    write_jsonl(tmp_path / "h" / "1.jsonl", ROWS[:25])
    write_jsonl(tmp_path / "h" / "2.jsonl", ROWS[25:])
    (tmp_path / "h" / "README.md").write_text("not data")
    hashes = set()
    for name in ("a.jsonl", "b.jsonl.gz", "c.json", "d.json", "e.json", "f.parquet", "g.csv", "h"):
        _, figures = steps(given(tmp_path, plain_model, f"run-{name}", path=str(tmp_path / name)))
        hashes.add(figures["pair_set"]["hash"])
    assert len(hashes) == 1


def test_the_hash_knows_content_split_and_sides_but_not_the_order(tmp_path, plain_model):
    def pair_hash(name, rows, **data):
        path = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        return steps(given(tmp_path, plain_model, name, path=str(path), **data))[1]["pair_set"]["hash"]

    base = pair_hash("base", ROWS)
    assert pair_hash("reversed", ROWS[::-1]) == base
    assert pair_hash("split", ROWS, test_fraction=0.2) != base
    swapped = [{**ROWS[0], "chosen": ROWS[0]["rejected"], "rejected": ROWS[0]["chosen"]}, *ROWS[1:]]
    # Only where the first pair is not held out does swapping its sides change the set.
    moved = pair_hash("swapped", swapped, heldout_fraction=0.0)
    assert moved != pair_hash("unswapped", ROWS, heldout_fraction=0.0)


def test_pairs_in_the_configuration(tmp_path, byte_model):
    inline = {key: [row[key] for row in ROWS[:4]] for key in ROWS[0]}
    folder = given(
        tmp_path, byte_model, inline=inline, conversational=True, test_fraction=0.0, heldout_fraction=0.0, sft="none"
    )
    figures, pairs = steps(folder)
    assert (figures["train_pairs"], figures["test_pairs"], figures["heldout_prompts"]) == (4, 0, 0)
    train = read_parquet(folder / "pairs" / "train.parquet")
    assert train["prompt"][0] == [{"role": "user", "content": "Question 0?"}]
    assert train["chosen"][0] == [{"role": "assistant", "content": "Answer 0."}]
    assert len(read_parquet(folder / "pairs" / "test.parquet")) == 0
    assert pairs["pair_set"]["n_train"] == 4
    assert not (folder / "data" / "sft_train.parquet").exists()


def test_columns_of_different_length_in_the_configuration(tmp_path, plain_model):
    folder = given(tmp_path, plain_model, inline={"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e"]})
    with pytest.raises(
        UserError, match=r"data\.inline: the columns differ in length \(prompt 2, chosen 2, rejected 1\)"
    ):
        run_here(folder, "data")


def test_a_given_test_split_and_leaking_prompts(tmp_path, plain_model):
    train = write_jsonl(tmp_path / "train.jsonl", ROWS[:40])
    test = write_jsonl(tmp_path / "test.jsonl", ROWS[38:])
    paths = {"path": str(train), "test_path": str(test), "on_problem": {"duplicate": "keep"}}
    folder = given(tmp_path, plain_model, **paths)
    figures, _ = steps(folder)
    assert figures["problems"] == {"duplicate": 2, "leakage": 2}
    assert (figures["train_pairs"], figures["test_pairs"], figures["heldout_prompts"]) == (38, 11, 11)
    report = read_json(folder / "data" / "report.json")
    assert report["problems"]["leakage"]["examples"][0]["place"].endswith("train.jsonl, line 39")
    kept = given(tmp_path, plain_model, "kept", **{**paths, "on_problem": {"duplicate": "keep", "leakage": "keep"}})
    assert steps(kept)[0]["train_pairs"] == 40
    # Where duplicates are dropped, the training side loses them first, and nothing leaks.
    clean = given(tmp_path, plain_model, "clean", **{**paths, "on_problem": {"leakage": "error"}})
    assert steps(clean)[0]["problems"] == {"duplicate": 2}
    paths["on_problem"] = {"duplicate": "keep", "leakage": "error"}
    strict = given(tmp_path, plain_model, "strict", **paths)
    with pytest.raises(UserError, match=r"leakage.*2\n.*train\.jsonl, line 39"):
        run_here(strict, "data")


def test_more_prompts_never_bring_a_heldout_one_back(tmp_path, plain_model):
    pairs = write_jsonl(tmp_path / "pairs.jsonl")
    more = write_jsonl(tmp_path / "more.jsonl", [{"prompt": f"Question {i}?"} for i in range(80)])
    folder = given(tmp_path, plain_model, path=str(pairs), prompts_path=str(more))
    figures, _ = steps(folder)
    assert (figures["added_prompts"], figures["withheld_prompts"], figures["train_prompts"]) == (20, 12, 68)
    train = set(read_parquet(folder / "data" / "prompts_train.parquet")["prompt"])
    kept_out = set(read_parquet(folder / "data" / "prompts_heldout.parquet")["prompt"])
    assert not train & kept_out


def test_sft_examples_from_a_file_of_their_own(tmp_path, plain_model, byte_model):
    """N+'s SFT set beside its pairs; an example whose prompt is kept from training is left out."""
    pairs = write_jsonl(tmp_path / "pairs.jsonl")
    rows = [{"query": f"Question {i}?", "reference_response": f" Reference {i}.<|endoftext|>"} for i in range(70)]
    sft = write_jsonl(tmp_path / "sft.jsonl", rows)
    folder = given(tmp_path, plain_model, path=str(pairs), sft_path=str(sft))
    figures, _ = steps(folder)
    assert (figures["sft_examples"], figures["withheld_examples"]) == (58, 12)
    examples = read_parquet(folder / "data" / "sft_train.parquet")
    kept_out = {
        *read_parquet(folder / "data" / "prompts_heldout.parquet")["prompt"],
        *read_parquet(folder / "data" / "pairs_test.parquet")["prompt"],
    }
    assert not kept_out & set(examples["prompt"])
    assert all(
        row["completion"] == row["prompt"].replace("Question", " Reference").replace("?", ".") for row in examples
    )
    chat = given(tmp_path, byte_model, "chat", path=str(pairs), sft_path=str(sft), conversational=True)
    steps(chat)
    example = read_parquet(chat / "data" / "sft_train.parquet")[0]
    assert (example["prompt"][0]["role"], example["completion"][0]["role"]) == ("user", "assistant")
    wrong = write_jsonl(tmp_path / "wrong.jsonl", [{"prompt": "Q"}])
    with pytest.raises(UserError, match=r"wrong\.jsonl, line 1: no completion.*data\.sft_path"):
        run_here(given(tmp_path, plain_model, "wrong", path=str(pairs), sft_path=str(wrong)), "data")


def test_conversations_need_a_chat_template(tmp_path, plain_model, byte_model):
    rows = [
        {key: [{"role": "user" if key == "prompt" else "assistant", "content": value}] for key, value in row.items()}
        for row in ROWS
    ]
    path = str(write_jsonl(tmp_path / "chat.jsonl", rows))
    folder = given(tmp_path, plain_model, path=path)
    with pytest.raises(UserError, match=r"has no chat template.*model\.chat_template=FILE"):
        run_here(folder, "data")
    assert steps(given(tmp_path, byte_model, "with", path=path))[0]["train_pairs"] == 48
    # As plain text they need none.
    assert steps(given(tmp_path, plain_model, "text", path=path, conversational=False))[0]["train_pairs"] == 48


def test_a_model_is_needed(tmp_path):
    folder = make_run(tmp_path / "run", {"source": "pairs", "path": str(write_jsonl(tmp_path / "x.jsonl"))})
    with pytest.raises(UserError, match=r"model=pretrained model\.path"):
        run_here(folder, "data")


def test_scores_and_margins_are_kept_and_empty_columns_are_not(tmp_path, plain_model):
    rows = [{**row, "chosen_score": 2.0 + i, "rejected_score": 1.0} for i, row in enumerate(ROWS)]
    folder = given(tmp_path, plain_model, path=str(write_jsonl(tmp_path / "x.jsonl", rows)))
    steps(folder)
    names = pq.read_schema(folder / "pairs" / "train.parquet").names
    assert {"chosen_score", "rejected_score"} <= set(names)
    assert "margin" not in names


def test_memory_does_not_grow_with_max_pairs(tmp_path, plain_model):
    """Reading stops at max_pairs: what follows is not even looked at."""
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:30]) + "this is not JSON\n")
    folder = given(tmp_path, plain_model, path=str(path), max_pairs=30)
    figures, _ = steps(folder)
    assert figures["rows"] == 30
    assert figures["train_pairs"] + figures["test_pairs"] + figures["heldout_pairs"] == 30


@pytest.mark.parametrize("name", ["hh", "files", "inline"])
def test_yaml_files_have_every_key_with_a_comment(name):
    text = (ROOT / "configs" / "data" / f"{name}.yaml").read_text()
    values = yaml.safe_load(text)
    cls = SOURCES[values["source"]]
    assert list(values) == list(cls.__dataclass_fields__)
    assert set(values) <= set(DataConfig.__dataclass_fields__)
    lines = text.splitlines()
    assert all(lines[i - 1].startswith("#") for i, line in enumerate(lines) if line and not line.startswith("#"))
    filled = {
        key: {"path": "x.jsonl", "inline": {"prompt": ["a"]}}[key] if value == "???" else value
        for key, value in values.items()
    }
    assert data_settings(filled).source == values["source"]
