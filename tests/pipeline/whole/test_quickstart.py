"""The whole command on a small quickstart: to a verdict, again in seconds, stale where something changed."""

import json
import shutil
import time

import pytest

from ppo_vs_dpo.artifacts.run import RunFolder
from tests import warm
from tests.pipeline import mini

# The stages' processes are forks: tests/test_wheel.py starts each as a user's command does.
pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished small run: its output folder and what the command said."""
    folder = tmp_path_factory.mktemp("runs")
    with warm.forks():
        return folder, mini.run(folder, "--profile").stdout


def test_it_runs_where_there_is_no_compiler():
    """The environment of all runs here: none of the names under which torch looks for a compiler is found."""
    path = mini.environment()["PATH"]
    assert not any(shutil.which(name, path=path) for name in ("cc", "gcc", "g++", "c++", "clang", "clang++"))
    assert shutil.which(mini.environment()["CC"], path=path) is None


def test_it_ends_in_a_report(finished):
    folder, said = finished
    run = folder / "quickstart"
    assert "Report:" in said
    assert "Against SFT" in said
    report = json.loads((run / "compare" / "report.json").read_text())
    assert said.count(report["verdict"][0]) == 1
    for name in ("sft", "ppo", "dpo", "best_of_4", "ppo,kl_coef=0.0", "dpo,beta=1.0"):
        policy = report["policies"][name]
        assert {"gold_reward", "proxy_reward", "kl", "length", "eos_rate"} <= policy.keys()
        assert {"mean", "ci"} <= policy["kl"].keys()
    hashes = {report["pair_set"]["hash"], *report["pair_set"]["branches"].values()}
    assert len(hashes) == 1
    pairs = {(row["policy"], row["versus"], row["judge"]) for row in report["win_rates"]}
    for judge in ("gold", "reward_model"):
        assert {("ppo", "dpo", judge), ("ppo", "sft", judge), ("sft", "sft", judge)} <= pairs
    assert {"accuracy", "ceiling", "ece"} <= report["reward_model"].keys()


def test_the_run_folder_is_what_the_docs_say(finished):
    run = finished[0] / "quickstart"
    for stage in ("data", "sft", "pairs", "reward_model", "dpo", "ppo", "compare", "sweep/ppo,kl_coef=0.0"):
        done = json.loads((run / stage / "done.json").read_text())
        assert done["fingerprint"]
        assert (run / stage / "log.txt").is_file()
    for stage in ("sft", "reward_model", "dpo", "ppo"):
        assert (run / stage / "model" / "model.safetensors").is_file()
        rows = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["seed"] == 1
    assert manifest["versions"]["torch"]
    assert (
        manifest["pair_set"]["hash"]
        == json.loads((run / "pairs" / "done.json").read_text())["figures"]["pair_set"]["hash"]
    )
    assert not list(run.rglob("*.tmp"))


def test_every_stage_says_what_it_cost_and_the_report_adds_it_up(finished):
    run = finished[0] / "quickstart"
    done = {
        stage: json.loads((run / stage / "done.json").read_text()) for stage in ("sft", "reward_model", "dpo", "ppo")
    }
    for stage, last_word in done.items():
        assert last_word["cost"]["flops"] > 1e8, stage
        assert 100 < last_word["cost"]["peak_memory_mb"] < 10_000, stage
    ppo = done["ppo"]["figures"]
    tokens = done["ppo"]["cost"]["tokens_generated"]
    assert 2 * ppo["episodes"] < tokens <= 24 * ppo["episodes"]
    report = json.loads((run / "compare" / "report.json").read_text())
    methods = report["cost"]["methods"]
    assert methods["ppo"]["seconds"] == pytest.approx(
        done["reward_model"]["seconds"] + done["ppo"]["seconds"], abs=0.01
    )
    both = done["reward_model"]["cost"]["flops"] + done["ppo"]["cost"]["flops"]
    assert methods["ppo"]["flops"] == pytest.approx(both)
    assert methods["dpo"]["flops"] == pytest.approx(done["dpo"]["cost"]["flops"])
    assert methods["ppo"]["tokens_generated"] == tokens
    # What the quickstart asks for beyond a run's own policies.
    assert "best_of_4,policy=ppo" in report["policies"]
    assert report["optimum"]["kind"] == "importance weights"
    for stage, spent in report["cost"]["stages"].items():
        assert spent["seconds"] == done[stage]["seconds"]
        assert spent["cpu_seconds"] == done[stage]["cost"]["cpu_seconds"] > 0
    page = (run / "compare" / "report.html").read_text()
    assert "What it took" in page
    assert "until this page was written" in page
    compare = json.loads((run / "compare" / "done.json").read_text())
    assert 0.5 * compare["seconds"] < report["cost"]["compare_seconds"] <= compare["seconds"]


def test_a_table_says_where_the_time_went(finished):
    folder, said = finished
    text = (folder / "quickstart" / "profile.md").read_text()
    assert text in said
    head, _, *lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    rows = {cells[0]: dict(zip(head[1:], map(float, cells[1:]), strict=True)) for cells in lines}
    assert {"data", "sft", "pairs", "reward_model", "dpo", "ppo", "compare", "ppo,kl_coef=0.0"} < rows.keys()
    for name, row in rows.items():
        parts = {part: seconds for part, seconds in row.items() if part not in ("seconds", "CPU")}
        assert sum(parts.values()) == pytest.approx(row["seconds"], abs=0.05 * (len(parts) + 1)), name
        assert row["CPU"] > 0
        if name != "together":
            # One figure everywhere: table, last word, report, and what the command said.
            took = json.loads((RunFolder(folder / "quickstart").stage_dir(name) / "done.json").read_text())["seconds"]
            assert row["seconds"] == pytest.approx(took, abs=0.2), name
            assert f"{name} done in {took:.0f} s" in said
        # What no part has is little: the parts are where the work is.
        assert row["other"] < 0.5 * row["seconds"] + 1, name
    for stage, parts in {
        "sft": ["training", "saving"],
        "pairs": ["sampling"],
        "reward_model": ["training", "sampling", "scoring"],
        "dpo": ["training", "scoring"],
        "ppo": ["training", "sampling", "scoring"],
        "compare": ["sampling", "statistics", "report"],
    }.items():
        times = json.loads((folder / "quickstart" / stage / "done.json").read_text())["cost"]["times"]
        assert all(times[part] > 0 for part in parts), stage


def test_held_out_prompts_are_in_no_training_split(finished):
    from ppo_vs_dpo.artifacts.files import read_parquet

    run = finished[0] / "quickstart"
    held_out = set(read_parquet(run / "data" / "prompts_heldout.parquet")["prompt"][:])
    for path in ("data/sft_train", "data/prompts_train", "pairs/train", "pairs/test"):
        assert not held_out & set(read_parquet(run / f"{path}.parquet")["prompt"][:]), path


def test_again_takes_seconds_and_says_so(finished):
    start = time.monotonic()
    said = mini.run(finished[0]).stdout
    assert "everything is done; nothing changed" in said
    assert "starts" not in said
    assert "Report:" in said
    assert time.monotonic() - start < 60  # under 20 s on an idle machine; this one is shared


def test_a_changed_setting_redoes_what_stands_behind_it(finished):
    report = finished[0] / "quickstart" / "compare" / "report.json"
    before = mini.without_costs(json.loads(report.read_text()))
    said = mini.run(finished[0], "compare.resamples=100").stdout
    assert "compare again (the settings of compare changed)" in said
    assert "ppo" not in said.split("Report:")[0].split("done in")[0]
    mini.run(finished[0])
    after = mini.without_costs(json.loads(report.read_text()))
    assert after == before  # the same inputs again: the same figures, bit for bit


def test_a_folder_of_another_run_is_refused(finished):
    refused = mini.run(finished[0], "seed=2", "name=quickstart", check=False)
    assert refused.returncode == 2
    assert "holds another run" in refused.stderr
    assert "seed: 1 there, 2 here" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_stages_need_what_is_before_them(tmp_path):
    refused = mini.run(tmp_path, "stages=[ppo]", check=False)
    assert refused.returncode == 2
    assert "stage ppo needs data, which is not among stages=['ppo'], and it has not finished" in refused.stderr
