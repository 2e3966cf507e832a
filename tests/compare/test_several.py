"""Runs of several seeds as one report."""

import shutil

import numpy as np
import pytest

from artifacts.files import read_json, write_json
from compare.several import main
from tests.compare.helpers import PROMPTS, done, make_run, write_prompts
from tests.compare.test_stage import compare


@pytest.fixture(scope="module")
def runs(tmp_path_factory, word_tokenizer):
    """Three compared runs: the same models under three seeds."""
    first = make_run(tmp_path_factory.mktemp("several") / "seed1", word_tokenizer)
    roots = [first]
    for seed in (2, 3):
        root = first.with_name(f"seed{seed}")
        shutil.copytree(first, root)
        (root / "config.yaml").write_text((root / "config.yaml").read_text().replace("seed: 3", f"seed: {10 + seed}"))
        roots.append(root)
    for root in roots:
        compare(root)
    return roots


def pooled(runs, tmp_path, capsys=None):
    assert main([*map(str, runs), "--output", str(tmp_path / "out")]) == 0
    return read_json(tmp_path / "out" / "report.json")


def test_figures_are_means_over_runs(runs, tmp_path, capsys):
    report = pooled(runs, tmp_path)
    single = [read_json(root / "compare" / "report.json") for root in runs]
    assert report["settings"]["seeds"] == [3, 12, 13]
    assert report["settings"]["prompts"] == "shared by all runs"
    for name, entry in report["policies"].items():
        for key in ("gold_reward", "proxy_reward", "length", "eos_rate"):
            assert entry[key] == pytest.approx(np.mean([one["policies"][name][key] for one in single]), abs=1e-9)
        assert entry["kl"]["mean"] == pytest.approx(np.mean([one["policies"][name]["kl"]["mean"] for one in single]))
    rates = {(e["judge"], e["policy"], e["versus"]): e for e in report["win_rates"]}
    for (judge, policy, versus), entry in rates.items():
        found = [
            e["win_rate"]
            for one in single
            for e in one["win_rates"]
            if (e["judge"], e["policy"], e["versus"]) == (judge, policy, versus)
        ]
        assert entry["win_rate"] == pytest.approx(np.mean(found), abs=1e-12)
        assert entry["per_seed"] == pytest.approx(found, abs=1e-12)
        assert entry["win_rate"] + rates[judge, versus, policy]["win_rate"] == 1.0
    assert "pooled over 3 seeds" in report["verdict"][2]
    assert report["verdict"][0] in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("seed 12 ·") == len(PROMPTS)


def test_prompts_of_their_own_are_nested(runs, tmp_path):
    other = tmp_path / "seed9"
    shutil.copytree(runs[0], other)
    (other / "config.yaml").write_text((other / "config.yaml").read_text().replace("seed: 3", "seed: 9"))
    write_prompts(other / "data" / "prompts_heldout.parquet", PROMPTS[:40])
    compare(other)
    report = pooled([runs[1], other], tmp_path)
    assert report["settings"]["prompts"] == "each run its own"
    assert any("Two seeds" in warning for warning in report["warnings"])
    assert report["settings"]["n_prompts"] == 88


def test_a_policy_that_one_run_lacks_is_left_out(runs, tmp_path):
    other = tmp_path / "less"
    shutil.copytree(runs[0], other)
    (other / "config.yaml").write_text((other / "config.yaml").read_text().replace("seed: 3", "seed: 9"))
    shutil.rmtree(other / "sweep" / "ppo,kl_coef=0.0")
    compare(other)
    report = pooled([runs[1], other], tmp_path)
    assert "ppo,kl_coef=0.0" not in report["policies"]
    assert any("not every run has it: ppo,kl_coef=0.0" in warning for warning in report["warnings"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: None, "both have seed 3 and the same pairs"),
        (lambda root: (root / "compare" / "done.json").unlink(), "has not been compared yet"),
        (lambda root: (root / "config.yaml").unlink(), "is not a run folder"),
        (
            lambda root: (root / "compare" / "completions.parquet").write_bytes(b"PAR1 torn"),
            "not a complete Parquet file",
        ),
        (
            lambda root: (root / "config.yaml").write_text(
                (root / "config.yaml").read_text().replace("path: null", "path: other")
            ),
            "differ in their section model",
        ),
    ],
)
def test_what_cannot_be_pooled(runs, tmp_path, capsys, damage, message):
    other = tmp_path / "other"
    shutil.copytree(runs[0], other)
    damage(other)
    if "section" in message:
        report = read_json(other / "compare" / "report.json")
        report["settings"]["seeds"] = [77]
        write_json(other / "compare" / "report.json", report)
    assert main([str(runs[0]), str(other), "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_one_seed_with_different_pairs(runs, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(runs[0], other)
    for name in ("pairs", "dpo", "dpo,beta=1.0", "reward_model"):
        done(other, name, pair_set={"hash": "cd" * 32, "n_train": 4, "n_test": 2})
    compare(other)
    assert main([str(runs[0]), str(other)]) == 2
    assert "both have seed 3 and different pair sets" in capsys.readouterr().err
