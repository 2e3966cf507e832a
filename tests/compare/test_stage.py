"""The stage as a user runs it: a real process on a small run, its files, its determinism, what it refuses."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, read_parquet, write_jsonl, write_parquet
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.artifacts.stage import StageContext, stage_main
from ppo_vs_dpo.compare.stage import run_compare
from ppo_vs_dpo.preferences.schema import prompt_id
from tests import warm
from tests.compare.helpers import PROMPTS, check_schema, done, make_run, set_config, small_model, write_prompts

ROOT = Path(__file__).parents[2]


def compare(root):
    """Run the stage in this process and give its report."""
    context = StageContext(RunFolder(root), "compare")
    context.dir.mkdir(parents=True, exist_ok=True)
    run_compare(context)
    return check_schema(read_json(root / "compare" / "report.json"))


def figures(report):
    """All that must not differ between two equal runs."""
    return {key: value for key, value in report.items() if key != "cost"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, word_tokenizer):
    """A run that `python -m ppo_vs_dpo.compare` has compared, and the process's output."""
    root = make_run(tmp_path_factory.mktemp("run"), word_tokenizer)
    with warm.forks():
        process = subprocess.run(
            [sys.executable, "-m", "ppo_vs_dpo.compare", str(root)],
            cwd=ROOT,
            env={**os.environ},
            capture_output=True,
            text=True,
        )
    assert process.returncode == 0, process.stderr
    return root


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, to be damaged."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_report_has_what_the_issue_asks(finished):
    report = check_schema(read_json(finished / "compare" / "report.json"))
    names = ["sft", "ppo", "dpo", "ppo,kl_coef=0.0", "dpo,beta=1.0", "best_of_2", "best_of_4"]
    assert set(report["policies"]) == set(names)
    for name in names:
        policy = report["policies"][name]
        assert {"gold_reward", "proxy_reward", "kl", "length", "eos_rate"} <= set(policy)
        if policy["kl"]["ci"] is None:  # best-of-n where no draw was likely: its estimate is its bound
            assert name.startswith("best_of")
            assert policy["kl"]["mean"] == pytest.approx(policy["kl"]["bound"], rel=0.01)
        else:
            assert policy["kl"]["ci"][0] <= policy["kl"]["mean"] <= policy["kl"]["ci"][1]
        assert 0 < policy["length"] <= 12
    assert report["policies"]["sft"]["kl"]["mean"] == 0
    assert report["policies"]["ppo,kl_coef=0.0"]["kl"]["mean"] > report["policies"]["ppo"]["kl"]["mean"] > 0
    assert report["pair_set"]["same"]
    assert report["reward_model"] == {"accuracy": 0.7, "ceiling": 0.8, "of_ceiling": 0.6, "ece": 0.03}
    assert report["judges"]["reward_model"]["in_sample"]
    assert not report["judges"]["gold"]["in_sample"]
    pairs = {(e["policy"], e["versus"]) for e in report["win_rates"] if e["judge"] == "gold"}
    # Two best-of-n need 2 + 4 of the pool of 8: all pairs are there, and the control.
    assert pairs == {(a, b) for a in names for b in names if a != b} | {("sft", "sft")}
    assert len(report["verdict"]) == 3
    assert "one run (seed 3)" in report["verdict"][2]


def test_win_rates_of_a_pair_add_up_to_one_exactly(finished):
    report = read_json(finished / "compare" / "report.json")
    found = {(e["judge"], e["policy"], e["versus"]): e for e in report["win_rates"]}
    for (judge, policy, versus), entry in found.items():
        if policy != versus:
            other = found[judge, versus, policy]
            assert entry["win_rate"] + other["win_rate"] == 1.0
            assert entry["ci"][0] == pytest.approx(1 - other["ci"][1], abs=1e-15)
        assert entry["ci"][0] <= entry["win_rate"] <= entry["ci"][1]


def test_files(finished):
    folder = finished / "compare"
    table = read_parquet(folder / "completions.parquet")
    assert len(table) == 48 * (4 + 8 + 4)
    assert {"policy", "role", "prompt", "completion", "kl", "gold", "reward_model"} <= set(table.column_names)
    judgements = read_parquet(folder / "judgements.parquet").to_pandas()
    report = read_json(folder / "report.json")
    for entry in report["win_rates"][::7]:
        same = [judgements[key] == entry[key] for key in ("judge", "policy", "versus")]
        rows = judgements[same[0] & same[1] & same[2]]
        if len(rows):
            assert rows["preference"].mean() == pytest.approx(entry["win_rate"], abs=1e-12)
    page = (folder / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert report["verdict"][0] in (folder / "report.md").read_text()
    assert (folder / "figures" / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    assert read_json(folder / "done.json")["figures"]["verdict"] == report["verdict"]


def test_same_seed_same_figures(run):
    before = read_json(run / "compare" / "report.json")
    svg = (run / "compare" / "figures" / "frontier.svg").read_bytes()
    shutil.rmtree(run / "compare")
    shutil.rmtree(run / "cache")
    # Two processes and another batch size draw the same completions.
    set_config(run, "workers: 2")
    assert figures(compare(run)) == figures(before)
    assert (run / "compare" / "figures" / "frontier.svg").read_bytes() == svg


def test_completions_are_drawn_once(run):
    before = read_json(run / "compare" / "report.json")
    files = {path: path.stat().st_mtime_ns for path in (run / "cache" / "completions").glob("*.parquet")}
    assert len(files) == 5
    # One is lost, one is truncated (a full disk): these two are drawn again, nothing else.
    lost, torn, *kept = sorted(files)
    lost.unlink()
    torn.write_bytes(torn.read_bytes()[:200])
    assert figures(compare(run)) == figures(before)
    assert all(path.stat().st_mtime_ns == files[path] for path in kept)
    assert torn.stat().st_mtime_ns != files[torn]


def test_a_new_model_is_drawn_again(run):
    old = list((run / "cache" / "completions").glob("ppo-*.parquet"))
    weights = run / "ppo" / "model" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes((run / "dpo" / "model" / "model.safetensors").read_bytes())
    compare(run)
    new = set((run / "cache" / "completions").glob("ppo-*.parquet"))
    assert len(new) == 2
    assert new > set(old)
    # The earlier model's are used again when it is back.
    before = {path: path.stat().st_mtime_ns for path in new}
    weights.write_bytes(content)
    compare(run)
    assert {path: path.stat().st_mtime_ns for path in (run / "cache" / "completions").glob("ppo-*.parquet")} == before


def test_different_pairs_are_refused(run):
    done(run, "dpo", pair_set={"hash": "cd" * 32, "n_train": 4, "n_test": 2})
    with pytest.raises(UserError, match="trained on different pairs: dpo"):
        compare(run)


def test_prompts_that_were_trained_on(run):
    seen = PROMPTS[:20]
    write_parquet(run / "data" / "sft_train.parquet", {"prompt": seen, "completion": [" good"] * 20})
    report = compare(run)
    assert report["settings"]["n_prompts"] == 28
    assert any("20 held-out prompts had been trained on" in warning for warning in report["warnings"])
    assert any("Only 28 prompts" in warning for warning in report["warnings"])
    write_parquet(run / "pairs" / "train.parquet", [{"prompt": p, "prompt_id": prompt_id(p)} for p in PROMPTS])
    with pytest.raises(UserError, match=r"all 48 prompts .* were trained on"):
        compare(run)


def test_another_vocabulary_is_refused(run, word_tokenizer):
    small_model(word_tokenizer, vocab_size=25).save_pretrained(run / "ppo" / "model")
    shutil.rmtree(run / "compare")
    with pytest.raises(UserError, match="25 tokens and the reference 20"):
        compare(run)


def test_scores_that_are_no_numbers(run):
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("helpers:gold", "helpers:nan_gold"))
    with pytest.raises(UserError, match=r"judge gold gave nan for completion 3 \(prompt"):
        compare(run)


def test_a_judge_that_always_ties(run):
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("helpers:gold", "helpers:tie_gold"))
    report = compare(run)
    assert any("The judge gold calls everything a tie" in warning for warning in report["warnings"])
    assert {e["win_rate"] for e in report["win_rates"] if e["judge"] == "gold"} == {0.5}
    assert report["verdict"][0].startswith("Undecided between this PPO run and this DPO run")
    assert report["decision"]["primary"]["outcome"] == "undecided"


def test_a_branch_is_missing(run):
    shutil.rmtree(run / "ppo")
    shutil.rmtree(run / "sweep")
    report = compare(run)
    assert any("ppo has not finished" in warning for warning in report["warnings"])
    assert report["verdict"][0].startswith("There is no verdict between PPO and DPO")
    assert "refused" in report["matched_kl"]


def test_without_gold_the_in_sample_judge_says_so(run):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("gold: tests.compare.helpers:gold", "source: files"))
    report = compare(run)
    assert report["policies"]["ppo"]["gold_reward"] is None
    assert "in-sample" in report["verdict"][0]
    assert "in-sample" in (run / "compare" / "report.html").read_text()


def test_what_ppo_was_rewarded_by_is_asked_as_an_in_sample_judge(run):
    path = run / "config.yaml"
    path.write_text(path.read_text() + "ppo: {reward: [reward_model, 'tests.compare.helpers:tie_gold']}\n")
    report = compare(run)
    assert report["judges"]["tie_gold"]["in_sample"]
    assert {entry["judge"] for entry in report["win_rates"]} >= {"tie_gold", "gold", "reward_model"}


def test_completions_made_elsewhere(run, tmp_path):
    rows = [{"prompt": prompt, "completion": " good good good"} for prompt in PROMPTS]
    write_jsonl(tmp_path / "mine.jsonl", [*rows, rows[0]])
    set_config(run, f"policies: {{mine: {{completions: {tmp_path}/mine.jsonl}}}}")
    report = compare(run)
    assert report["policies"]["mine"]["gold_reward"] == pytest.approx(3.25)
    assert report["policies"]["mine"]["kl"]["mean"] is None
    write_jsonl(tmp_path / "mine.jsonl", rows[:30])
    with pytest.raises(UserError, match="no completion for 18 of 48"):
        compare(run)


def test_temperatures_and_another_model(run):
    set_config(run, f"other_temperatures: [0, 0.5], policies: {{again: {{path: {run}/dpo/model}}}}")
    report = compare(run)
    found = {(e["policy"], e["temperature"]): e for e in report["temperatures"]}
    assert len(found) == 2 * 6
    assert found["ppo", 0.0]["kl"]["mean"] is None
    assert found["ppo", 0.5]["kl"]["mean"] > 0
    assert report["policies"]["again"]["kl"]["mean"] > 0
    table = read_parquet(run / "compare" / "completions.parquet").to_pandas()
    greedy = table.query("policy == 'dpo' and temperature == 0")["completion"].tolist()
    assert greedy == table.query("policy == 'again' and temperature == 0")["completion"].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("best_of_n: [9]", "9 is not in 1..pool_size"),
        ("temperature: 0", "a greedy policy has no KL"),
        ("n_prompt: 5", "Did you mean n_prompts"),
        ("policies: {sft: {path: x}}", "the name is taken"),
        ("policies: {a: {completions: /nowhere.jsonl}}", "does not exist"),
        ("judges: [{kind: oracle}]", "must be one of function, reward_model, llm"),
        ("judges: [{kind: function}]", "function: required"),
        ("judges: [{kind: llm, modle: x}]", "Did you mean model"),
        ("max_new_tokens: 80", r"response of 80 \(compare.max_new_tokens\) it would be 8[0-9]"),
    ],
)
def test_settings_that_cannot_be_meant(run, change, message):
    config = (run / "config.yaml").read_text()
    start = config.index("compare: {")
    section = config[start:].replace("max_new_tokens: 12, ", "") if change.startswith("max_new") else config[start:]
    section = section.replace(", best_of_n: [2, 4]", "") if change.startswith("best_of") else section
    (run / "config.yaml").write_text(config[:start] + section.rstrip().rstrip("}") + f", {change}}}\n")
    shutil.rmtree(run / "cache" / "completions")
    with pytest.raises(UserError, match=message):
        compare(run)


def test_conversations(run):
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[:32]]
    write_prompts(run / "data" / "prompts_heldout.parquet", chats)
    report = compare(run)
    assert report["settings"]["n_prompts"] == 32
    assert "user: the film was very" in (run / "compare" / "report.html").read_text()
    table = read_parquet(run / "compare" / "completions.parquet")
    assert table["prompt"][0] == chats[0]


def test_top_p_is_flagged(run):
    set_config(run, "top_p: 0.9")
    assert any("top-k or top-p" in warning for warning in compare(run)["warnings"])


def test_an_error_is_a_message_without_traceback_and_the_old_report_stays(run, capsys):
    done(run, "dpo", pair_set={"hash": "cd" * 32, "n_train": 4, "n_test": 2})
    with pytest.raises(SystemExit) as stopped:
        stage_main("compare", run_compare, [str(run)])
    assert stopped.value.code == 2
    assert "error in stage compare: the branches were trained on different pairs" in capsys.readouterr().err
    assert read_json(run / "compare" / "report.json")["verdict"]
