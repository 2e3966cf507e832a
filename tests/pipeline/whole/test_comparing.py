"""`ppo-vs-dpo compare --policy ...`: models and outputs that somebody else made, with nothing trained."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, read_parquet
from ppo_vs_dpo.compare.sampling.rows import fitting, match, names_of
from ppo_vs_dpo.pipeline.cli import dispatch
from ppo_vs_dpo.preferences.schema import prompt_id
from tests.compare.helpers import check_schema
from tests.pipeline.chat_model import save_chat_model

PROMPTS = [f"What is {number} plus {number}?" for number in range(20)]
SMALL = ["compare.max_new_tokens=8", "compare.resamples=100"]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with a chat model, one trained from it, plain prompts, two files of outputs and a judge."""
    folder = tmp_path_factory.mktemp("desk")
    save_chat_model(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn_like(weight)
    model.save_pretrained(folder / "tuned")
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / "tuned")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in PROMPTS))
    rows = {
        "right": [{"prompt": one, "completion": f"It is {2 * n}, I am sure of it."} for n, one in enumerate(PROMPTS)],
        "short": [{"instruction": one, "output": "No."} for one in PROMPTS],  # AlpacaEval's names
        "half": [{"prompt": one, "completion": "No."} for one in PROMPTS[:9]],
    }
    rows["none"] = []
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "judge.py").write_text(
        "def longer(prompts, completions, **columns):\n    return [len(one) for one in completions]\n"
    )
    return folder


@pytest.fixture(autouse=True)
def here(desk, monkeypatch):
    """On the desk, with a machine that is not timed: that takes a process of its own."""
    monkeypatch.chdir(desk)
    speed = {"train": 1e-2, "forward": 1e-2, "decode": 1e-2, "device": "cpu", "parameters": 10**6, "layers": 2}
    speed |= {"start": 5.0, "step": 0.01, "characters": {}}
    monkeypatch.setattr("ppo_vs_dpo.pipeline.planning.cost.beforehand.ask", lambda *_: speed)


def typed(line: str) -> int:
    return dispatch(shlex.split(line))


def compare(*words: str) -> int:
    return dispatch(["compare", *words, "--judge", "judge.py:longer", *SMALL])


def test_a_model_and_a_file_against_a_reference(capsys):
    words = ["--prompts", "prompts.jsonl", "--policy", "tuned=tuned", "--policy", "right=right.jsonl"]
    assert compare(*words, "--reference", "base", "--output", "one") == 0
    said = capsys.readouterr().out
    assert "20 prompts of plain text are asked as a user's turn" in said
    assert re.search(r"by the judge longer:? (right|tuned)'s answer is the better one on", said)
    assert "PPO" not in said.replace("ppo", "")
    report = check_schema(read_json(Path("one/compare/report.json")))
    assert report["head_to_head"] == ["tuned", "right"]
    assert (report["names"], report["pair_set"]) == ({"sft": "reference"}, None)
    # KL where model and reference are known; where not, the reason.
    assert report["policies"]["tuned"]["kl"]["mean"] > 0
    assert report["policies"]["right"]["kl"]["mean"] is None
    assert "right has no KL: its completions come from a file, and its model is not known." in report["warnings"]
    # The control asks the reference twice; the page names policies as they were named.
    assert [one["judge"] for one in report["control"]] == ["longer"]
    page = Path("one/compare/report.html").read_text()
    assert "<h1>tuned against right</h1>" in page
    drawn = Path("one/compare/completions.parquet").stat().st_mtime_ns
    rows = read_parquet("one/compare/completions.parquet").to_pandas()
    again = sorted(rows["completion"])
    assert compare(*words, "--reference", "base", "--output", "one") == 0  # drawn once, used again
    assert sorted(read_parquet("one/compare/completions.parquet").to_pandas()["completion"]) == again
    assert Path("one/compare/completions.parquet").stat().st_mtime_ns > drawn


def test_outputs_alone_need_no_model(capsys):
    assert compare("--policy", "right=right.jsonl", "--policy", "short=short.jsonl", "--output", "two") == 0
    said = capsys.readouterr().out
    assert "right beats short by the judge longer: right's answer is the better one on 100 of 100 prompts" in said
    report = check_schema(read_json(Path("two/compare/report.json")))
    assert report["policies"]["sft"]["length"] == pytest.approx(8)  # words: there is no tokenizer
    assert [w for w in report["warnings"] if "words" in w]


def test_the_first_model_is_what_others_are_held_against():
    words = ["--prompts", "prompts.jsonl", "--policy", "base=base", "--policy", "tuned=tuned", "--output", "three"]
    assert compare(*words) == 0
    report = check_schema(read_json(Path("three/compare/report.json")))
    assert (report["names"], report["head_to_head"]) == ({"sft": "base"}, ["tuned", "sft"])
    assert report["policies"]["sft"]["kl"]["mean"] == 0 < report["policies"]["tuned"]["kl"]["mean"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--policy", "a=right.jsonl"], "what is compared with what"),
        (["--policy", "right.jsonl", "--policy", "b=short.jsonl"], r"give a name and where it is, NAME=FOLDER"),
        (["--policy", "a=right.jsonl", "--policy", "a=short.jsonl"], "the name stands there twice"),
        (["--policy", "a=right.jsonl", "--policy", "b=gone.jsonl"], r"--policy b: gone\.jsonl does not exist"),
        (["--policy", "a=right.jsonl", "--policy", "b=./gone"], r"--policy b: \./gone does not exist"),
        (["--policy", "a=right.jsonl", "--policy", "b=."], r"--policy b: \. holds no model: it has no config\.json"),
        (["--policy", "a=right.jsonl", "--policy", "b=half.jsonl"], r"b=half\.jsonl has no completion for 11 of 20"),
        (["--policy", "a=tuned", "--policy", "b=base"], "on which prompts"),
        (["--prompts", "none.jsonl", "--policy", "a=tuned", "--policy", "b=base"], r"none\.jsonl: .* no prompt"),
        (
            ["--policy", "a=right.jsonl", "--policy", "b=short.jsonl", "--judge", "reward_model=tuned"],
            "tuned has no head to score with",
        ),
        (["--policy", "a=right.jsonl", "--policy", "b=short.jsonl", "--judge", "judge.py:shorter"], "shorter"),
        (
            ["--policy", "a=right.jsonl", "--policy", "b=short.jsonl", "--judge", "gone.py:f"],
            r"gone\.py does not exist",
        ),
        (["--policy", "a=right.jsonl", "--policy", "b=short.jsonl", "--judge", "rewrd=x"], "no such --judge"),
        (["--policy", "a=right.jsonl", "--policy", "best_of_2=short.jsonl"], "this name has a meaning in reports"),
        (["--policy", "a=right.jsonl", "--policy", "b=short.jsonl", "ppo.kl_coef=1"], "only compare"),
        (["--policy", "a=right.jsonl", "--policy", "b=short.jsonl", "compare.sampels=1"], "Did you mean samples"),
        (["--policy", "a=right.jsonl", "--policy", "b=short.jsonl", "compare.confidence=2"], "confidence"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(words, message, monkeypatch):
    monkeypatch.setattr("ppo_vs_dpo.compare.stage.run_compare", lambda context: pytest.fail("it began to work"))
    before = {*Path().rglob("*")}
    with pytest.raises(UserError, match=message):
        compare(*words)
    assert {*Path().rglob("*")} == before  # and nothing is written


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(UserError) as refused:
        typed(
            "compare --policy a=gone.jsonl --policy right.jsonl --policy sft=short.jsonl --policy b=half.jsonl "
            "--prompts prompts.jsonl --reference ./nowhere --judge gone.py:f --judge rewrd=x compare.sampels=1 "
            "compare.confidence=2"
        )
    said = str(refused.value).splitlines()
    assert said[0] == "the command has errors:"
    for words in (
        "--policy a: gone.jsonl does not exist",
        "--policy right.jsonl: give a name",
        "--policy sft: this name has a meaning",
        "--reference: ./nowhere does not exist",
        "gone.py does not exist",
        "no such --judge",
        "sampels: no such key",
    ):
        assert len([line for line in said if words in line]) == 1, (words, said)
    with pytest.raises(UserError) as refused:  # what needs the prompts, with what does not
        typed("compare --policy b=half.jsonl --policy c=right.jsonl --prompts prompts.jsonl")
    assert "has no completion for 11 of 20 prompts" in str(refused.value)
    assert "who judges" in str(refused.value)


def test_what_it_will_take_is_said_before_the_work(capsys, monkeypatch, tmp_path):
    """Answers, tokens, time here; requests to a judge that costs money; nothing where nothing is drawn or asked."""
    monkeypatch.setattr("ppo_vs_dpo.compare.stage.run_compare", lambda context: None)
    judge = "llm={model: m, base_url: 'http://localhost:1', template: alpaca_eval, repeats: 3}"
    words = ["--prompts", "prompts.jsonl", "--policy", "tuned=tuned", "--policy", "right=right.jsonl", "--reference"]
    assert compare(*words, "base", "--judge", judge, "--output", str(tmp_path / "a")) == 0
    said = capsys.readouterr().out
    (row,) = [line.split() for line in said.splitlines() if line.startswith("compare ")]
    # Two draws of the reference and one of the policy for 20 prompts; three pairs, both orders, three times.
    assert row[1] == str(20 * (2 + 1))
    assert row.count("<=") == 1
    assert f"requests to LLM judges, at most: compare {3 * 20 * 2 * 3:,}" in said
    assert "in all, measured on cpu" in said
    files = ["--policy", "right=right.jsonl", "--policy", "short=short.jsonl"]
    assert compare(*files, "--judge", judge, "--output", str(tmp_path / "b")) == 0
    assert f"at most: compare {20 * 2 * 3:,}" in capsys.readouterr().out
    assert compare(*files, "--output", str(tmp_path / "c")) == 0
    assert capsys.readouterr().out == "  loading libraries\n"


def test_somebody_must_judge():
    with pytest.raises(UserError, match="who judges"):
        dispatch(["compare", "--policy", "a=right.jsonl", "--policy", "b=short.jsonl"])


def test_a_run_is_not_overwritten(tmp_path):
    (tmp_path / "config.yaml").write_text("experiment: quickstart\n")
    with pytest.raises(UserError, match="holds a run"):
        compare("--policy", "a=right.jsonl", "--policy", "b=short.jsonl", "--output", str(tmp_path))


def test_given_comparisons_are_not_pooled():
    compare("--policy", "right=right.jsonl", "--policy", "short=short.jsonl", "--output", "two")
    with pytest.raises(UserError, match="two compares policies that were given"):
        dispatch(["compare", "two", "two"])
    with pytest.raises(UserError, match=r"one run is not pooled: its report is two/compare/report\.html"):
        dispatch(["compare", "two"])


def test_a_prompt_is_found_however_it_is_written(tmp_path):
    turn = [{"role": "user", "content": "Why?"}]
    asked = [[{"role": "system", "content": "Be brief."}, *turn], "Why not? ", turn + [turn[0]]]
    written = [json.dumps(asked[0]), "Why not?", asked[2]]
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": one, "completion": str(n)} for n, one in enumerate(written)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids = [prompt_id(one) for one in asked]
    assert [[text for text, _ in one] for one in match(path, asked, ids, 1, "x")] == [["0"], ["1"], ["2"]]
    assert set(names_of("Why?")) & set(names_of(turn))
    assert not set(names_of("Why?")) & set(names_of("Why not?"))


def test_prompts_are_made_to_fit_the_models(desk, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "tokenizer_config.json").write_text("{}")
    turns, note = fitting(["Why? "], [str(desk / "base")])
    assert turns == [[{"role": "user", "content": "Why?"}]]
    assert "user's turn" in note
    assert fitting(["Why? "], [str(plain)]) == (["Why? "], "")
    with pytest.raises(UserError, match="has no chat template"):
        fitting(turns, [str(plain)])
    with pytest.raises(UserError, match="no prompt means the same to both"):
        fitting(["Why?"], [str(plain), str(desk / "base")])
    with pytest.raises(UserError, match="1 of 2 prompts are plain text"):
        fitting(["Why?", *turns], [])


PAGE = (Path(__file__).parents[3] / "docs" / "your-own-models.md").read_text(encoding="utf-8")


def test_the_page_works_as_it_is_written(desk, tmp_path, monkeypatch, capsys):
    """The command, the judge and the script of docs/your-own-models.md, typed into a folder with small models."""
    monkeypatch.chdir(tmp_path)
    for name, source in (("my_model", "base"), ("my_dpo_model", "tuned"), ("theirs.jsonl", "short.jsonl")):
        Path(name).symlink_to(desk / source)
    Path("prompts.jsonl").symlink_to(desk / "prompts.jsonl")
    judge, script = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    Path("my_judge.py").write_text(judge)
    exec(compile(script.replace("max_new_tokens=64", "max_new_tokens=4"), "script", "exec"), {})
    assert len(Path("mine.jsonl").read_text().splitlines()) == len(PROMPTS)
    (command,) = re.findall(r"```sh\nppo-vs-dpo (.*?)\n```", PAGE, re.DOTALL)
    assert dispatch([*shlex.split(command), *SMALL]) == 0
    assert "the judge polite" in capsys.readouterr().out
    # What the script wrote is what the command reads.
    words = ["--policy", "mine=mine.jsonl", "--policy", "theirs=theirs.jsonl", "--judge", "my_judge.py:polite"]
    assert dispatch(["compare", *words, *SMALL]) == 0
