"""Broken files as people have them: each problem is counted, named with its line, and stops or is dropped as told."""

import gzip
import json

import pytest
from datasets import Dataset

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json
from ppo_vs_dpo.preferences.reading.readers import SUFFIXES, Broken, read_files
from tests.preferences.conftest import run_here
from tests.preferences.files import ROWS, given, steps, write_jsonl

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


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_of_file_may_be_an_archive(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)))
    else:
        getattr(Dataset.from_list(ROWS), f"to_{suffix[1:]}")(path)
    packed = path.with_name(f"{path.name}.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    found = [row for _, row in read_files(str(path))]
    assert len(found) == len(ROWS)
    assert [row for _, row in read_files(str(packed))] == found
    packed.write_bytes(packed.read_bytes()[:-20])
    assert isinstance(list(read_files(str(packed)))[-1][1], Broken)


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


def test_plain_and_chat_rows_in_one_file(tmp_path, byte_model):
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    chat = {key: [{"role": role, "content": key}] for key, role in roles.items()}
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


def test_too_few_prompts_to_split(tmp_path, plain_model):
    path = str(write_jsonl(tmp_path / "two.jsonl", ROWS[:2]))
    with pytest.raises(UserError, match=r"2 prompts cannot be split.*data\.test_fraction=0"):
        run_here(given(tmp_path, plain_model, path=path), "data")


def test_a_missing_column_is_named_with_the_ones_that_are_there(tmp_path, plain_model):
    rows = [{key: row[key] for key in ("prompt", "chosen")} for row in ROWS]
    Dataset.from_list(rows).to_parquet(tmp_path / "two.parquet")
    Dataset.from_list(rows).to_csv(tmp_path / "two.csv")
    for name, place in (("two.parquet", "row 1"), ("two.csv", "line 2")):
        with pytest.raises(UserError, match=r"missing_field .*\): 60") as error:
            run_here(given(tmp_path, plain_model, f"run-{name}", path=str(tmp_path / name)), "data")
        assert f"{tmp_path / name}, {place}: no rejected" in str(error.value)
        assert "the row has prompt, chosen" in str(error.value)


def test_sides_that_answer_different_prompts_are_dropped_and_counted(tmp_path, byte_model):
    """An HH file in which one row's dialogues part before the last answer."""
    say = "\n\nHuman: Question {}?\n\nAssistant: {}."
    rows = [{"chosen": say.format(i, "Yes"), "rejected": say.format(i, "No")} for i in range(30)]
    rows[4]["rejected"] = say.format(99, "No")
    path = str(write_jsonl(tmp_path / "hh.jsonl", rows))
    figures, _ = steps(given(tmp_path, byte_model, path=path))
    assert figures["problems"] == {"prompt_mismatch": 1}
    report = read_json(tmp_path / "run" / "data" / "report.json")
    assert report["problems"]["prompt_mismatch"]["examples"][0]["place"] == f"{path}, line 5"
    strict = given(tmp_path, byte_model, "strict", path=path, on_problem={"prompt_mismatch": "error"})
    with pytest.raises(UserError, match=r"prompt_mismatch .*: 1\n.*line 5"):
        run_here(strict, "data")
