"""``ppo-vs-dpo data inspect``: the report of a file, for people and as JSON."""

import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from rich.console import Console
from scipy.stats import binomtest
from transformers import AutoTokenizer

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.dpo.data import dpo_dataset
from ppo_vs_dpo.pipeline.composing.compose import load
from ppo_vs_dpo.preferences.reading.importing import mapped
from ppo_vs_dpo.preferences.reading.inspect import main, show
from ppo_vs_dpo.preferences.reading.mappings import MappingOptions
from ppo_vs_dpo.preferences.reading.readers import read_files
from ppo_vs_dpo.preferences.reading.validation import Checker, Report, Statistics, policies
from tests.preferences.conftest import ROOT, run_here
from tests.preferences.files import ROWS, given, write_jsonl


def report_of(capsys, *argv):
    code = main([*map(str, argv), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_clean_file(tmp_path, capsys):
    code, report = report_of(capsys, write_jsonl(tmp_path / "pairs.jsonl"))
    assert code == 0
    assert (report["rows"], report["pairs"], report["prompts"], report["format"]) == (60, 60, 60, "pairs")
    assert report["problems"] == {}
    # "Answer 1." and "Nonsense 1." have the same number of words: length says nothing.
    assert report["statistics"]["length_rule"]["longer_is_chosen"] == 0.5
    assert report["statistics"]["length_rule"]["explained"] == 0


def test_length_rule_by_hand():
    statistics = Statistics()
    for chosen, rejected in (("a b", "a"), ("a b c", "a"), ("a", "a b"), ("a", "b")):
        statistics.add({"prompt": "q", "chosen": chosen, "rejected": rejected})
    rule = statistics.summary()["length_rule"]
    assert (rule["chosen_longer"], rule["chosen_shorter"], rule["same_length"]) == (0.5, 0.25, 0.25)
    assert rule["longer_is_chosen"] == 0.5 + 0.25 / 2
    assert rule["explained"] == 0.25


@pytest.mark.parametrize(("right", "n"), [(0, 4), (3, 4), (4, 4), (60, 100)])
def test_what_length_explains_has_a_score_interval(right, n):
    statistics, report = Statistics(), Report("x")
    for chosen in ["a b"] * right + ["a"] * (n - right):
        statistics.add({"prompt": "q", "chosen": chosen, "rejected": "a" if chosen == "a b" else "a b"})
    report.statistics = statistics.summary()
    found = binomtest(right, n).proportion_ci(method="wilson")
    assert report.statistics["length_rule"]["interval"] == pytest.approx((found.low, found.high), abs=1e-12)
    console = Console(file=io.StringIO(), width=200)
    show(report, None, console)
    # Of the better of the two rules: longer, or shorter.
    ends = (found.low, found.high) if right >= n / 2 else (1 - found.high, 1 - found.low)
    says = f"right in {max(right, n - right) / n:.1%} (95 % interval: {ends[0]:.1%} to {ends[1]:.1%})"
    assert says in console.file.getvalue()


def test_scores_by_hand():
    statistics = Statistics()
    for chosen, rejected in ((3.0, 1.0), (1.0, 2.0), (2.0, 2.0)):
        statistics.add(
            {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_score": chosen, "rejected_score": rejected}
        )
    statistics.add({"prompt": "q", "chosen": "a", "rejected": "b"})
    summary = statistics.summary()
    assert summary["chosen_score"]["known"] == 3
    assert summary["score_difference"]["mean"] == pytest.approx(1 / 3)
    assert summary["score_difference"]["chosen_not_higher"] == pytest.approx(2 / 3)


def test_numbers_that_some_pairs_lack_are_said(tmp_path, capsys):
    """Empty, null, NaN or no key: no problem of the data, and nothing to be silent about."""
    lacking = [{}, {"margin": None}, {"margin": float("nan")}, {"margin": ""}]
    rows = [{**row, **(lacking[n % 4] if n % 2 else {"margin": 1.0}), "soft_label": 0.9} for n, row in enumerate(ROWS)]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    half = f"{len(rows) // 2} of {len(rows)} pairs have no margin (empty, null or NaN)"
    code, report = report_of(capsys, path)
    assert code == 0
    assert [one for one in report["said"] if "have no" in one] == [one for one in report["said"] if half in one] != []
    main([str(path)])
    said = " ".join(capsys.readouterr().out.split())
    assert half in said
    assert "No problems found" not in said


def test_every_problem_is_counted_with_its_place_and_nothing_stops(tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    lines = [json.dumps(row) for row in ROWS[:3]]
    lines += ['{"half": ', json.dumps({"prompt": "Q", "chosen": "A"}), json.dumps({**ROWS[0], "chosen": ""}), lines[0]]
    path.write_text("\n".join(lines))
    code, report = report_of(capsys, path)
    assert code == 2
    assert {kind: found["count"] for kind, found in report["problems"].items()} == {
        "broken_json": 1,
        "missing_field": 1,
        "empty": 1,
        "duplicate": 1,
    }
    assert report["problems"]["broken_json"]["examples"][0]["place"] == f"{path}, line 4"
    assert report["problems"]["duplicate"]["examples"][0]["place"] == f"{path}, line 7"
    assert report["pairs"] == 3


def test_examples_are_few_but_the_count_is_whole(tmp_path, capsys):
    _, report = report_of(capsys, write_jsonl(tmp_path / "x.jsonl", ROWS[:1] * 100))
    assert report["problems"]["duplicate"]["count"] == 99
    assert len(report["problems"]["duplicate"]["examples"]) == 5


def test_shared_prompts_and_token_limits(tmp_path, capsys, plain_model):
    train, test = write_jsonl(tmp_path / "a.jsonl", ROWS[:30]), write_jsonl(tmp_path / "b.jsonl", ROWS[28:])
    _, report = report_of(capsys, train, "--test", test)
    assert report["problems"]["leakage"]["count"] == 2
    assert report["pairs"] == 28
    _, report = report_of(capsys, train, "--tokenizer", plain_model, "--max-response-tokens", 11)
    # " Answer 1." has 10 bytes, " Answer 10." 11, " Nonsense 1." 12 and " Nonsense 10." 13.
    assert report["problems"]["truncated"]["count"] == 30
    with pytest.raises(UserError, match="need --model"):
        main([str(train), "--max-response-tokens", "5"])


def test_columns_and_rows(tmp_path, capsys):
    rows = [{"q": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in ROWS]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    code, report = report_of(capsys, path, "--columns", "prompt=q,chosen=good,rejected=bad", "--max-rows", 10)
    assert code == 0
    assert report["rows"] == report["pairs"] == 10
    with pytest.raises(UserError, match="--columns q"):
        main([str(path), "--columns", "q"])


def test_contradictions_are_found_in_both_orders():
    report = Report("x")
    checker = Checker(report, policies())
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    mirrored = {"prompt": "q", "chosen": "b", "rejected": "a"}
    for number, item in enumerate((pair, mirrored, mirrored, {**pair, "prompt": "other"})):
        checker.check(f"row {number}", item)
    assert report.problems["contradiction"].count == 1
    assert report.problems["duplicate"].count == 1


def test_the_command_prints_a_table_and_escapes_the_data(tmp_path, forked):
    rows = [*ROWS, {"prompt": "[red]bold[/red] [/nothing]", "chosen": "[x]", "rejected": "[x]"}]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows[::-1])
    command = [str(Path(sys.executable).parent / "ppo-vs-dpo"), "data", "inspect", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for said in ("61 rows, 60 usable pairs", "equal", "line 1", "[x]", "The first pair", "Question 59?"):
        assert said in done.stdout


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        main([str(tmp_path / "nothing.jsonl")])


@pytest.mark.real_data
def test_real_hh(capsys, real_data):
    code, report = report_of(capsys, real_data / "hh_rlhf" / "harmless_base.jsonl.gz")
    assert (code, report["format"], report["rows"]) == (0, "hh", 1812)
    assert (
        report["pairs"] + sum(found["count"] for found in report["problems"].values() if found["policy"] == "drop")
        == 1812
    )
    assert 0.4 < report["statistics"]["length_rule"]["longer_is_chosen"] < 0.6


def inspected(capsys, *argv):
    code = main([*map(str, argv)])
    return code, capsys.readouterr().out


def test_it_says_what_the_model_reads_token_by_token(tmp_path, capsys, byte_model):
    """The tokens are those that the stages train on; a person sees them as text, with the loss beside."""
    pair = {
        "chosen": [turn("user", "Hi"), turn("assistant", "Yes\né"), turn("user", "?"), turn("assistant", "No")],
        "rejected": [turn("user", "Hi"), turn("assistant", "Hm")],
    }
    path = write_jsonl(tmp_path / "pairs.jsonl", [pair])
    code, report = report_of(capsys, path, "--model", byte_model)
    assert code == 0
    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    trained = dpo_dataset(Dataset.from_list([next(iter(_pairs(path)))]), tokenizer)[0]
    chosen = report["sequence"]["chosen"]
    assert chosen["ids"] == [*trained["prompt_ids"], *trained["chosen_ids"]]
    assert chosen["loss"] == [0] * len(trained["prompt_ids"]) + trained["chosen_mask"]
    assert (
        "".join(chosen["tokens"]) == "<|user|>Hi<|end|><|assistant|>Yes\né<|end|><|user|>?<|end|><|assistant|>No</s>"
    )
    code, said = inspected(capsys, path, "--model", byte_model)
    lines = [line.strip() for line in said.splitlines()]
    start = next(number for number, line in enumerate(lines) if line.startswith("chosen: ") and "tokens" in line)
    assert lines[start + 1 : start + 5] == [
        "no loss │ <|user|>Hi<|end|><|assistant|>",
        "loss    │ Yes⏎é",
        "no loss │ <|end|><|user|>?<|end|><|assistant|>",
        "loss    │ No</s>",
    ]
    code, said = inspected(capsys, path, "--model", byte_model, "--tokens")
    assert len(re.findall(r" loss *$", said, re.MULTILINE)) >= sum(chosen["loss"])


def turn(role, text):
    return {"role": role, "content": text}


def _pairs(path):
    report = Report(str(path))
    for _, row in mapped(read_files(str(path)), report, Checker(report, policies()), MappingOptions()):
        yield row


def test_it_ends_with_the_command_to_type_next(tmp_path, capsys, byte_model, plain_model):
    path = write_jsonl(tmp_path / "own pairs.jsonl")
    _, said = inspected(capsys, path)
    assert f"ppo-vs-dpo data inspect '{path}' --model MODEL" in said
    start = f"ppo-vs-dpo try name=own_pairs model.path={{}} data.path='{path}'"
    assert said.rstrip().endswith(f"{start.format('MODEL')} data.conversational=true")
    code, said = inspected(capsys, path, "--model", byte_model)
    assert code == 2
    for part in ("'Question 0? Answer 0.'", "data.conversational=true", "data.conversational=false"):
        assert part in said
    assert said.rstrip().endswith("--conversational false")
    assert "No problems found" not in said
    # What was said so far is said again: the model, the columns.
    odd = write_jsonl(
        tmp_path / "odd.jsonl", [{"instruction": f"{n}?", "winner": "A", "loser": "B"} for n in range(3)]
    )
    names = "prompt=instruction,chosen=winner,rejected=loser"
    _, said = inspected(capsys, odd, "--model", byte_model)
    assert said.rstrip().endswith(f"--model {byte_model} --columns {names}")
    _, said = inspected(capsys, odd, "--model", byte_model, "--columns", names)
    assert said.rstrip().endswith(f"--model {byte_model} --columns {names} --conversational false")
    code, said = inspected(capsys, path, "--model", byte_model, "--conversational", "true")
    assert code == 0
    assert said.rstrip().endswith(f"{start.format(byte_model)} data.conversational=true")
    code, said = inspected(capsys, path, "--model", plain_model)
    assert code == 0
    assert said.rstrip().endswith(f"{start.format(plain_model)} data.conversational=false")


def test_each_command_leads_to_the_next_one(tmp_path, capsys, byte_model):
    """Typed one after the other as they are printed, to the run: columns with odd names, a chat model, limits."""
    path = tmp_path / "my pairs.csv"
    rows = [f"{n}?,It is {n}.,No {n}" for n in range(60)]
    path.write_text("\n".join(["the question,good answer,bad answer", *rows]) + "\n")
    line, model = f"ppo-vs-dpo data inspect '{path}' --max-rows 50", str(byte_model)
    typed = []
    while line.startswith("ppo-vs-dpo data inspect") and len(typed) < 6:
        typed.append(line)
        _, said = inspected(capsys, *shlex.split(line)[3:])
        shown = [one.strip() for one in said.splitlines() if one.startswith("  ppo-vs-dpo")]
        line = shown[0].replace("--model MODEL", f"--model {model}")
    assert len(typed) == 4  # as it is, with columns, with the model, with what its texts are
    assert all("--max-rows 50" in one for one in typed)
    words = shlex.split(line)
    assert words[:2] == ["ppo-vs-dpo", "try"]
    config = load(["experiment=try", *words[2:]])
    assert dict(config.data.columns) == {"prompt": "the question", "chosen": "good answer", "rejected": "bad answer"}
    assert (config.data.path, config.model.path, config.data.conversational) == (str(path), model, True)


@pytest.mark.parametrize(
    ("row", "proposal"),
    [
        (
            {"id": "a 1", "instruction": "Q?", "output_good": "A", "output_bad": "B"},
            "prompt=instruction,chosen=output_good,rejected=output_bad",
        ),
        (
            {"question": "Q?", "preferredAnswer": "A", "nonPreferredAnswer": "B"},
            "prompt=question,chosen=preferredAnswer,rejected=nonPreferredAnswer",
        ),
        ({"query": "Q?", "winner": "A", "loser": "B"}, "prompt=query,chosen=winner,rejected=loser"),
        (
            {"system": "Be kind.", "user": "Q?", "chosen": "A", "rejected": "B"},
            "prompt=user,system=system",
        ),
        ({"question": "Q?", "response_a": "A", "response_b": "B", "label": 1}, None),
    ],
)
def test_columns_of_other_names_are_proposed_and_work(tmp_path, capsys, plain_model, row, proposal):
    path = write_jsonl(tmp_path / "x.jsonl", [row] * 2)
    code, said = inspected(capsys, path)
    assert code == 2
    assert ", ".join(row) in said
    assert "=drop" not in said  # it would drop them all
    if proposal is None:
        assert "data.columns says which is what" in said
        return
    assert f"--columns {proposal}" in said
    code, report = report_of(capsys, path, "--columns", proposal)
    assert (code, report["pairs"]) == (0, 1)  # the second is the same
    columns = "{" + ", ".join(item.replace("=", ": ") for item in proposal.split(",")) + "}"
    with pytest.raises(UserError, match=re.escape(f"'data.columns={columns}'")):
        run_here(given(tmp_path, plain_model, path=str(path)), "data")


@pytest.mark.parametrize(
    ("asked", "row", "fits"),
    [
        ("hh", {"prompt": "{n}?", "chosen": "A", "rejected": "B"}, "pairs"),
        ("orca", {"prompt": "{n}?", "chosen": "A", "rejected": "B"}, "pairs"),
        ("hh", {"question": "{n}?", "good": "A", "bad": "B"}, ""),
    ],
)  # fmt: skip
def test_rows_that_were_read_as_something_else(tmp_path, capsys, plain_model, asked, row, fits):
    """``hh`` reads dialogues, and who gives it plain pairs is told so."""
    rows = [{name: text.format(n=n) for name, text in row.items()} for n in range(3)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    code, said = inspected(capsys, path, "--format", asked)
    assert code == 2
    assert (f"read as {asked} and look like {fits}: data.format=auto" in said) == bool(fits)


def test_a_name_that_no_pair_has_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl")
    with pytest.raises(UserError, match=r"data\.columns\.choosen.*Did you mean chosen"):
        main([str(path), "--columns", "choosen=chosen"])
    with pytest.raises(UserError, match=r"read for data\.format=pairs, and data\.format is hh"):
        main([str(path), "--columns", "chosen=chosen", "--format", "hh"])
