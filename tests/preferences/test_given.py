"""Pairs from files and from the configuration, through both steps; broken files as people have them."""

import gzip
import itertools
import json

import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset

from artifacts.errors import UserError
from artifacts.files import read_json, read_parquet
from preferences.config import SOURCES, DataConfig, data_settings
from preferences.schema import pair_set_hash
from tests.preferences.conftest import ROOT, make_run, run_here, run_step

ROWS = [{"prompt": f"Question {i}?", "chosen": f" Answer {i}.", "rejected": f" Nonsense {i}."} for i in range(60)]


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def given(tmp_path, model, name="run", **data):
    return make_run(tmp_path / name, {"source": "pairs", **data}, model={"path": str(model)})


def steps(folder):
    run_here(folder, "data")
    run_here(folder, "pairs")
    return read_json(folder / "data" / "done.json")["figures"], read_json(folder / "pairs" / "done.json")["figures"]


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


BROKEN = {
    "half a JSON line": (b'{"prompt": "Q", "chosen": "A", "rej', "broken_json", "line 3"),
    "broken UTF-8": (b'{"prompt": "Q\xff", "chosen": "A", "rejected": "B"}', "broken_utf8", "line 3"),
    "half an emoji": (
        b'{"prompt": "Q", "chosen": "A\\ud83e", "rejected": "B"}',
        "broken_utf8",
        "character 2 of chosen",
    ),
    "a list, not an object": (b'["Q", "A", "B"]', "wrong_type", "line 3"),
    "a missing column": (b'{"prompt": "Q", "chosen": "A"}', "missing_field", "no rejected"),
    "a null": (b'{"prompt": "Q", "chosen": "A", "rejected": null}', "missing_field", "rejected is empty"),
    "a number for a text": (b'{"prompt": "Q", "chosen": "A", "rejected": 5}', "wrong_type", "rejected is a int"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_lines_stop_with_their_place_or_are_dropped_when_told(tmp_path, plain_model, name):
    line, kind, said = BROKEN[name]
    good = [json.dumps(row).encode() for row in ROWS]
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n".join([*good[:2], line, *good[2:], line, b""]))
    folder = given(tmp_path, plain_model, path=str(path))
    with pytest.raises(UserError) as error:
        run_here(folder, "data")
    message = str(error.value)
    assert f"{kind} (" in message
    assert "): 2" in message
    assert f"{path}, line 3" in message
    assert f"{path}, line 62" in message
    assert said in message
    assert f"data.on_problem.{kind}=drop" in message
    assert not (folder / "data" / "done.json").exists()
    assert read_json(folder / "data" / "report.json")["problems"][kind]["count"] == 2

    dropped = given(tmp_path, plain_model, "dropped", path=str(path), on_problem={kind: "drop"})
    assert steps(dropped)[0]["train_pairs"] == 48


def test_all_kinds_of_problems_are_reported_at_once(tmp_path, plain_model):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n".join([*(line for line, _, _ in BROKEN.values()), json.dumps(ROWS[0]).encode()]))
    with pytest.raises(UserError) as error:
        run_here(given(tmp_path, plain_model, path=str(path)), "data")
    for kind in ("broken_json", "broken_utf8", "wrong_type", "missing_field"):
        assert kind in str(error.value)


def test_a_cut_off_archive_and_a_cut_off_parquet_are_never_dropped(tmp_path, plain_model):
    whole = gzip.compress(
        "".join(json.dumps({**row, "pad": str(number**40)}) + "\n" for number, row in enumerate(ROWS)).encode()
    )
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    Dataset.from_list(ROWS).to_parquet(tmp_path / "cut.parquet")
    content = (tmp_path / "cut.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[: len(content) // 2])
    for name in ("cut.jsonl.gz", "cut.parquet"):
        with pytest.raises(UserError, match=r"broken_file") as error:
            run_here(given(tmp_path, plain_model, f"run-{name}", path=str(tmp_path / name)), "data")
        assert name in str(error.value)
        assert "drop" not in str(error.value)
    with pytest.raises(UserError, match=r"on_problem\.broken_file: always an error"):
        run_here(
            given(
                tmp_path, plain_model, "told", path=str(tmp_path / "cut.parquet"), on_problem={"broken_file": "drop"}
            ),
            "data",
        )


def test_broken_csv_and_broken_json_name_the_line(tmp_path, plain_model):
    (tmp_path / "short.csv").write_text("prompt,chosen,rejected\nQ,A,B\nQ2,A2\n")
    (tmp_path / "long.csv").write_text("prompt,chosen,rejected\nQ,A,B,C\n")
    (tmp_path / "latin.csv").write_bytes("prompt,chosen,rejected\nQ,caf\xe9,B\n".encode("latin-1"))
    (tmp_path / "list.json").write_text('[{"prompt": "Q", "chosen": "A", "rejected": "B"},\n {"prompt": ')
    expected = {
        "short.csv": "line 3: fewer fields",
        "long.csv": "line 2: 1 more fields",
        "latin.csv": "line 2: byte 6 of the line is not UTF-8",
        "list.json": "line 2: column",
    }
    for name, said in expected.items():
        with pytest.raises(UserError) as error:
            run_here(given(tmp_path, plain_model, f"run-{name}", path=str(tmp_path / name)), "data")
        assert said in str(error.value)


def test_equal_empty_duplicate_and_contradictory_pairs(tmp_path, plain_model):
    extra = [
        {"prompt": "E1", "chosen": "same", "rejected": "same"},
        {"prompt": "E2", "chosen": "  ", "rejected": "b"},
        {"prompt": "", "chosen": "a", "rejected": "b"},
        ROWS[0],
        {**ROWS[1], "chosen": ROWS[1]["rejected"], "rejected": ROWS[1]["chosen"]},
    ]
    path = str(write_jsonl(tmp_path / "pairs.jsonl", ROWS + extra))
    whole = {"heldout_fraction": 0.0, "test_fraction": 0.0}
    figures, _ = steps(given(tmp_path, plain_model, path=path, **whole))
    assert figures["problems"] == {"equal": 1, "empty": 2, "duplicate": 1, "contradiction": 1}
    assert figures["train_pairs"] == 61
    # Dropped, a contradiction takes both of its pairs along.
    figures, _ = steps(given(tmp_path, plain_model, "b", path=path, **whole, on_problem={"contradiction": "drop"}))
    assert figures["train_pairs"] == 59
    keep = {"duplicate": "keep", "equal": "keep"}
    figures, _ = steps(given(tmp_path, plain_model, "c", path=path, **whole, on_problem=keep))
    assert figures["train_pairs"] == 63


def test_long_responses_are_counted_in_tokens(tmp_path, plain_model):
    rows = [*ROWS, {"prompt": "Q?", "chosen": "x" * 50, "rejected": "y"}]
    path = str(write_jsonl(tmp_path / "pairs.jsonl", rows))
    limits = {"max_response_tokens": 20, "heldout_fraction": 0.0, "test_fraction": 0.0}
    figures, _ = steps(given(tmp_path, plain_model, path=path, **limits))
    assert figures["problems"] == {"truncated": 1}
    assert figures["train_pairs"] == 61
    dropped = given(tmp_path, plain_model, "dropped", path=path, **limits, on_problem={"truncated": "drop"})
    assert steps(dropped)[0]["train_pairs"] == 60
    examples = read_json(dropped / "data" / "report.json")["problems"]["truncated"]["examples"]
    assert examples == [{"place": f"{path}, line 61", "detail": "chosen has 50 tokens of 20"}]


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


def test_plain_and_chat_rows_in_one_file(tmp_path, byte_model):
    chat = {key: [{"role": "user", "content": "x"}] for key in ("prompt", "chosen")}
    chat["rejected"] = [{"role": "user", "content": "y"}]
    path = str(write_jsonl(tmp_path / "mixed.jsonl", [*ROWS, chat]))
    with pytest.raises(UserError, match=r"line 61: a conversation; the rows before are plain text"):
        run_here(given(tmp_path, byte_model, path=path), "data")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"path": "nowhere/pairs.jsonl"}, "nowhere/pairs.jsonl does not exist"),
        ({"path": "owner/name"}, "Hub is switched off"),
        ({}, r"data\.path or data\.inline"),
        ({"path": "x.jsonl", "sft": "some"}, r"data\.sft is 'some'"),
        ({"path": "x.jsonl", "test_fraction": 1.5}, r"data\.test_fraction is 1\.5"),
        ({"path": "x.jsonl", "on_problem": {"duplicat": "drop"}}, "Did you mean duplicate"),
        ({"path": "x.jsonl", "on_problem": {"empty": "keep"}}, "such rows cannot be kept"),
        ({"path": "x.jsonl", "format": "hhh"}, r"data\.format is 'hhh'"),
        ({"path": "x.jsonl", "pats": "y"}, "Did you mean path"),
    ],
)
def test_bad_settings_name_the_key(tmp_path, plain_model, monkeypatch, data, said):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "x.jsonl")
    with pytest.raises(UserError, match=said):
        run_here(given(tmp_path, plain_model, **data), "data")


def test_a_model_is_needed(tmp_path):
    folder = make_run(tmp_path / "run", {"source": "pairs", "path": str(write_jsonl(tmp_path / "x.jsonl"))})
    with pytest.raises(UserError, match=r"model=pretrained model\.path"):
        run_here(folder, "data")


def test_too_few_prompts_to_split(tmp_path, plain_model):
    path = str(write_jsonl(tmp_path / "two.jsonl", ROWS[:2]))
    with pytest.raises(UserError, match=r"2 prompts cannot be split.*data\.test_fraction=0"):
        run_here(given(tmp_path, plain_model, path=path), "data")


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


@pytest.mark.real_data
def test_real_hh_dialogues(tmp_path, byte_model, real_data):
    path = real_data / "hh_rlhf" / "harmless_base.jsonl.gz"
    folder = given(tmp_path, byte_model, path=str(path), format="hh", conversational=True)
    figures, _ = steps(folder)
    report = read_json(folder / "data" / "report.json")
    assert report["rows"] == 1812
    assert figures["train_pairs"] + figures["test_pairs"] + figures["heldout_pairs"] > 1700
    assert all(found["policy"] == "drop" or kind == "contradiction" for kind, found in report["problems"].items())
    train = read_parquet(folder / "pairs" / "train.parquet")
    for row in train:
        roles = [message["role"] for message in row["prompt"]]
        assert roles[-1] == "user"
        assert all(a != b for a, b in itertools.pairwise(roles))
        assert [message["role"] for message in row["chosen"] + row["rejected"]] == ["assistant"] * 2
    # The original text comes back from the messages.
    with gzip.open(path, "rt") as lines:
        originals = {" ".join(json.loads(line)["chosen"].split()) for line in lines}
    whole = [
        "".join(
            f"\n\n{'Human' if m['role'] == 'user' else 'Assistant'}: {m['content']}"
            for m in row["prompt"] + row["chosen"]
        )
        for row in train
    ]
    assert sum(" ".join(text.split()) in originals for text in whole) > 0.99 * len(train)


@pytest.mark.real_data
def test_real_alpaca_eval_annotations(tmp_path, plain_model, real_data):
    path = real_data / "alpaca_eval" / "alpaca-7b.json.gz"
    folder = given(tmp_path, plain_model, path=str(path))
    figures, _ = steps(folder)
    report = read_json(folder / "data" / "report.json")
    assert report["format"] == "alpaca_eval"
    assert report["rows"] == 805
    kept = figures["train_pairs"] + figures["test_pairs"] + figures["heldout_pairs"]
    assert kept + sum(report["filtered"].values()) + sum(figures["problems"].values()) == 805
    # GPT-4 Turbo's answers are longer and win: length alone explains most of it.
    assert report["statistics"]["length_rule"]["longer_is_chosen"] > 0.8
