"""Runs of several seeds as one report."""

import re
import shutil

import numpy as np
import pytest

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, read_parquet, write_json
from ppo_vs_dpo.artifacts.guards.outputs import list_outputs
from ppo_vs_dpo.compare.estimates.win_rates import Settings
from ppo_vs_dpo.compare.pooled.figures import over_runs
from ppo_vs_dpo.compare.pooled.reading import load, load_all
from ppo_vs_dpo.compare.pooled.runs import main
from tests.compare.helpers import PROMPTS, check_schema, done, make_run, set_config, write_prompts
from tests.compare.server import Server, prefers_longer
from tests.compare.test_stage import compare


def reader(question, number):
    """An LLM that prefers the longer one, and says nothing useful about some prompts."""
    return "Hard to say." if "cast" in question.split("=== Reply A")[0] else prefers_longer(question)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, word_tokenizer):
    """Three compared runs: the same models under three seeds, with an LLM judge and a second temperature."""
    first = make_run(tmp_path_factory.mktemp("several") / "seed1", word_tokenizer)
    server = Server(reader)
    judge = f"kind: llm, name: reader, model: m, base_url: '{server.url}', retries: 0, reasks: 0, n_prompts: 16"
    set_config(first, f"judges: [{{{judge}}}], other_temperatures: [0.5]")
    roots = [first]
    for seed in (2, 3):
        root = first.with_name(f"seed{seed}")
        shutil.copytree(first, root)
        (root / "config.yaml").write_text((root / "config.yaml").read_text().replace("seed: 3", f"seed: {10 + seed}"))
        roots.append(root)
    for root in roots:
        compare(root)
    server.close()
    return roots


def set_seed(root, seed):
    """Another seed, and no judge that reads: the server is gone, and other completions are other questions."""
    text = (root / "config.yaml").read_text().replace("seed: 3", f"seed: {seed}")
    (root / "config.yaml").write_text(re.sub(r"judges: \[\{.*?\}\]", "judges: []", text))


def pooled(runs, tmp_path, capsys=None):
    assert main([*map(str, runs), "--output", str(tmp_path / "out")]) == 0
    return check_schema(read_json(tmp_path / "out" / "report.json"))


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
            (e.get("raw") or e)["win_rate"]
            for one in single
            for e in one["win_rates"]
            if (e["judge"], e["policy"], e["versus"]) == (judge, policy, versus)
        ]
        # Where a run's figure was cut to what KL allows, the sample stands beside it.
        assert (entry.get("raw") or entry)["win_rate"] == pytest.approx(np.mean(found), abs=1e-12)
        assert entry["per_seed"] == pytest.approx(found, abs=1e-12)
        assert entry["ci"][0] <= entry["win_rate"] <= entry["ci"][1]
        if policy != versus:  # the control stands there once
            assert entry["win_rate"] + rates[judge, versus, policy]["win_rate"] == pytest.approx(1.0, abs=1e-12)
    assert "pooled over 3 seeds" in report["verdict"][2]
    assert report["verdict"][0] in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("seed 12 ·") == len(PROMPTS)


def test_a_judge_that_reads_is_pooled(runs, tmp_path):
    report = pooled(runs, tmp_path)
    single = [read_json(root / "compare" / "report.json") for root in runs]
    mine = [e for e in report["win_rates"] if e["judge"] == "reader"]
    assert len(mine) == 12  # sft, ppo, dpo and the largest best-of-n, both directions
    for entry in mine:
        own = [e for one in single for e in one["win_rates"] if _key(e) == _key(entry)]
        assert entry["per_seed"] == pytest.approx([e["win_rate"] for e in own], abs=1e-12)
        # The runs share their prompts: as many as any of them judged, not all judgements.
        assert max(e["n"] for e in own) <= entry["n"] <= 16
        assert entry["ci"][0] <= entry["win_rate"] <= entry["ci"][1]
    judge = report["judges"]["reader"]
    assert judge["judged"] == sum(one["judges"]["reader"]["judged"] for one in single)
    assert judge["excluded"] == sum(one["judges"]["reader"]["excluded"] for one in single) > 0
    biases = [one["judges"]["reader"]["position_bias"] for one in single]
    assert judge["position_bias"]["n"] == sum(bias["n"] for bias in biases)
    for key in ("bias", "consistent"):
        mean = np.average([bias[key] for bias in biases], weights=[bias["n"] for bias in biases])
        assert judge["position_bias"][key] == pytest.approx(mean)
    together = {tuple(a["judges"]): a for a in report["agreement"]}
    assert set(together) == {("gold", "reward_model"), ("gold", "reader"), ("reward_model", "reader")}
    own = [a for one in single for a in one["agreement"] if a["judges"] == ["gold", "reader"]]
    assert together["gold", "reader"]["n"] == sum(a["n"] for a in own)
    mean = np.average([a["agreement"] for a in own], weights=[a["n"] for a in own])
    assert together["gold", "reader"]["agreement"] == pytest.approx(mean, abs=1e-12)


def _key(entry):
    return entry["judge"], entry["policy"], entry["versus"]


def test_everything_of_a_single_report_is_pooled(runs, tmp_path):
    """Control, power, ranking, length control, temperatures, frontier, optimum and cost, each over the runs."""
    report = pooled(runs, tmp_path)
    single = [read_json(root / "compare" / "report.json") for root in runs]
    assert set(report) == set(single[0])
    for control in (c for c in report["control"] if c["policy"] == "sft"):
        key = (control["policy"], control["judge"])
        own = [c["win_rate"] for one in single for c in one["control"] if (c["policy"], c["judge"]) == key]
        assert control["per_seed"] == pytest.approx(own, abs=1e-12)
        assert control["contains_half"] == (control["ci"][0] <= 0.5 <= control["ci"][1])
        assert control["passed"] == (control["p"] > control["level"])
    assert {c["judge"] for c in report["control"]} == {"gold", "reward_model"}
    for entry in (e for e in report["win_rates"] if e["policy"] != e["versus"]):
        fits = [e["length_controlled"] for one in single for e in one["win_rates"] if _key(e) == _key(entry)]
        if all(fits):
            assert entry["length_controlled"]["win_rate"] == pytest.approx(np.mean([f["win_rate"] for f in fits]))
    assert report["ranking"]["reader"]["entries"] or report["ranking"]["reader"]["note"]
    for judge in ("gold", "reward_model"):
        entries = report["ranking"][judge]["entries"]
        assert [e["rank"] for e in entries] == list(range(1, len(entries) + 1))
        assert [e["strength"] for e in entries] == sorted((e["strength"] for e in entries), reverse=True)
        own = {e["policy"]: e["strength"] for e in single[1]["ranking"][judge]["entries"]}
        for entry in entries:
            assert entry["per_seed"][1] == pytest.approx(own[entry["policy"]], abs=1e-9)
            assert entry["rank_ci"][0] <= entry["rank_ci"][1]
        assert next(e for e in entries if e["policy"] == "sft")["strength"] == 0
    assert report["power"]["runs"] == 3
    assert report["power"]["detectable_gap"] > 0
    assert {(t["policy"], t["temperature"]) for t in report["temperatures"]} == {
        (name, 0.5) for name in ("sft", "ppo", "dpo", "ppo,kl_coef=0.0", "dpo,beta=1.0")
    }
    first = report["temperatures"][1]
    own = [t["length"] for one in single for t in one["temperatures"] if t["policy"] == first["policy"]]
    assert first["length"] == pytest.approx(np.mean(own))
    assert [p["policy"] for p in report["frontier"]] == [p["policy"] for p in single[0]["frontier"]]
    assert report["optimum"]["kind"] == "importance weights"
    assert report["cost"]["runs"] == 3
    seconds = [one["cost"]["methods"]["ppo"]["seconds"] for one in single]
    assert report["cost"]["methods"]["ppo"]["seconds"] == pytest.approx(np.mean(seconds))
    assert report["cost"]["judges"]["reader"]["requests"] == sum(
        one["cost"]["judges"]["reader"]["requests"] for one in single
    )
    page = (tmp_path / "out" / "report.html").read_text()
    for title in ("One ranking of all policies", "At other temperatures", "What it took", "Reward against KL"):
        assert title in page


def test_truncated_judgements_are_named(runs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(runs[1], other)
    path = other / "compare" / "judgements.parquet"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=r"is damaged \(judgements.parquet has 500 bytes"):
        main([str(runs[0]), str(other), "--output", str(tmp_path / "out")])
    assert len(read_parquet(runs[1] / "compare" / "judgements.parquet")) > 0


@pytest.mark.parametrize("shared", [True, False])
def test_intervals_over_runs_cover(shared):
    """A figure that differs by seed and by prompts that runs share or not, of which only each run's
    interval is kept.
    """
    rng, covered = np.random.default_rng(0), 0
    for _ in range(600):
        of_prompts = rng.normal(0, 0.02, 1 if shared else 5)
        seen = 0.6 + rng.normal(0, 0.02, 5) + of_prompts
        half = 1.96 * 0.02
        _, (low, high) = over_runs(list(seen), [[v - half, v + half] for v in seen], Settings(), shared, (0.0, 1.0))
        covered += low <= 0.6 <= high
    assert 0.93 <= covered / 600 <= 0.985
    # Runs that agree by luck are no narrower than half of what their prompts leave open.
    middle, (low, high) = over_runs([0.6] * 4, [[0.5, 0.7]] * 4, Settings(), False)
    assert (middle, high - low) == (pytest.approx(0.6), pytest.approx(0.05))
    _, (low, high) = over_runs([0.6] * 4, [[0.5, 0.7]] * 4, Settings(), True)
    assert high - low == pytest.approx(0.2)


def test_prompts_of_their_own_are_nested(runs, tmp_path):
    other = tmp_path / "seed9"
    shutil.copytree(runs[0], other)
    set_seed(other, 9)
    write_prompts(other / "data" / "prompts_heldout.parquet", [f"{prompt} and" for prompt in PROMPTS[:40]])
    compare(other)
    report = pooled([runs[1], other], tmp_path)
    assert report["settings"]["prompts"] == "each run its own"
    assert any("Two seeds" in warning for warning in report["warnings"])
    assert any("not every run has verdicts of it: reader" in warning for warning in report["warnings"])
    assert report["settings"]["n_prompts"] == 88


def test_prompts_that_runs_share_in_part(runs, tmp_path):
    """Neither crossed nor nested: those that all runs have are kept, or each prompt counts once."""
    other = tmp_path / "seed9"
    shutil.copytree(runs[0], other)
    set_seed(other, 9)
    write_prompts(other / "data" / "prompts_heldout.parquet", PROMPTS[40:7:-1])
    compare(other)
    report = pooled([runs[1], other], tmp_path)
    assert report["settings"]["prompts"] == "shared by all runs"
    assert report["settings"]["n_prompts"] == 33
    assert any("33 prompts are in every run" in warning for warning in report["warnings"])
    # Row by row the same prompts, whatever their order in each run.
    (one, two), _ = load_all([str(runs[1]), str(other)])
    assert one.prompts.prompts == two.prompts.prompts
    whole = load(other)
    rows = [whole.prompts.ids.index(identity) for identity in two.prompts.ids]
    for name in ("ppo", "sft"):
        assert np.array_equal(
            two.contenders[name].draws.scores["gold"], whole.contenders[name].draws.scores["gold"][rows]
        )
        per = whole.contenders[name].draws.shape[1]
        assert two.contenders[name].draws.texts[:per] == whole.contenders[name].draws.texts[rows[0] * per :][:per]
    entry = next(e for e in report["win_rates"] if _key(e) == ("gold", "ppo", "dpo"))
    seen = np.mean([run.tables["gold"].of("ppo", "dpo").mean() for run in (one, two)])
    assert (entry.get("raw") or entry)["win_rate"] == pytest.approx(seen)
    few = tmp_path / "seed10"
    shutil.copytree(other, few)
    set_seed(few, 9)
    (few / "config.yaml").write_text((few / "config.yaml").read_text().replace("seed: 9", "seed: 10"))
    write_prompts(few / "data" / "prompts_heldout.parquet", [*PROMPTS[:6], *(f"{p} and" for p in PROMPTS[:20])])
    compare(few)
    (one, two), notes = load_all([str(runs[1]), str(few)])
    assert (len(one.prompts), len(two.prompts)) == (48, 20)
    assert "each counts in the first one that has it" in notes[0]


def test_a_policy_that_one_run_lacks_is_left_out(runs, tmp_path):
    other = tmp_path / "less"
    shutil.copytree(runs[0], other)
    set_seed(other, 9)
    shutil.rmtree(other / "sweep" / "ppo,kl_coef=0.0")
    compare(other)
    report = pooled([runs[1], other], tmp_path)
    assert "ppo,kl_coef=0.0" not in report["policies"]
    assert any("not every run has it: ppo,kl_coef=0.0" in warning for warning in report["warnings"])


def test_updates_of_other_rows_are_said(runs, tmp_path):
    """The same settings on other ranks: what is finished stays so, and a reader is told."""
    one, other = tmp_path / "one", tmp_path / "other"
    for root, source in ((one, runs[1]), (other, runs[0])):
        shutil.copytree(source, root)
    for root, name, rows in ((one, "dpo", 8), (other, "dpo", 32), (other, "sweep/dpo,beta=1.0", 8)):
        marker = root / name / "done.json"
        write_json(marker, {**read_json(marker), "update": {"settings": {}, "ranks": rows // 8, "rows": rows}})
    set_seed(other, 9)
    compare(other)
    said = "Updates of dpo were of 32 rows, those of dpo,beta=1.0 of 8 (other ranks, the same batch on each)"
    assert any(said in warning for warning in read_json(other / "compare" / "report.json")["warnings"])
    warnings = pooled([one, other], tmp_path)["warnings"]
    assert "Updates of dpo were of 8 rows in one and of 32 in other." in warnings


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: None, "both have seed 3 and the same pairs"),
        (lambda root: (root / "compare" / "done.json").unlink(), "has not finished. Give"),
        (lambda root: (root / "config.yaml").unlink(), "is not a run folder"),
        (
            lambda root: (root / "compare" / "completions.parquet").write_bytes(b"PAR1 torn"),
            "is damaged (completions.parquet",
        ),
        (
            lambda root: (root / "config.yaml").write_text(
                (root / "config.yaml").read_text().replace("path: null", "path: other")
            ),
            "differ in their section model",
        ),
    ],
)
def test_what_cannot_be_pooled(runs, tmp_path, damage, message):
    other = tmp_path / "other"
    shutil.copytree(runs[0], other)
    damage(other)
    if "section" in message:
        report = read_json(other / "compare" / "report.json")
        report["settings"]["seeds"] = [77]
        write_json(other / "compare" / "report.json", report)
        vouched = read_json(other / "compare" / "done.json")
        vouched["outputs"] = list_outputs(other / "compare")
        write_json(other / "compare" / "done.json", vouched)
    with pytest.raises(UserError, match=re.escape(message)):
        main([str(runs[0]), str(other), "--output", str(tmp_path / "out")])


def test_one_seed_with_different_pairs(runs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(runs[0], other)
    for name in ("pairs", "dpo", "dpo,beta=1.0", "reward_model"):
        done(other, name, pair_set={"hash": "cd" * 32, "n_train": 4, "n_test": 2})
    compare(other)
    with pytest.raises(UserError, match="both have seed 3 and different pair sets"):
        main([str(runs[0]), str(other)])
