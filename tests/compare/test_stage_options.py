"""What a comparison can be asked for beyond the default: best-of-n over any policy, checkpoints, exact optimum."""

import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, read_parquet, write_jsonl
from ppo_vs_dpo.compare.sampling.best_of_n import kl_bound, pool_weights
from ppo_vs_dpo.models.loading.pretrained import load_policy, load_tokenizer
from ppo_vs_dpo.models.passes.logprobs import pad_batch, response_logprobs
from ppo_vs_dpo.models.text.encoding import encode_prompts
from tests.compare.helpers import HASH, PROMPTS, done, gold, make_run, set_config, small_model
from tests.compare.test_stage import compare

PAIR_SET = {"hash": HASH, "n_train": 4, "n_test": 2}


@pytest.fixture
def run(tmp_path, word_tokenizer):
    """A run that has not been compared, with few prompts."""
    root = make_run(tmp_path / "run", word_tokenizer)
    done(root, "ppo", pair_set=PAIR_SET, kl_coef=0.5, updates=24)
    done(root, "ppo,kl_coef=0.0", pair_set=PAIR_SET, kl_coef=0.0)
    done(root, "dpo", pair_set=PAIR_SET, beta=2.0, steps=94)
    set_config(root, "n_prompts: 12")
    return root


def checkpoint(root, stage, step, tokenizer, move=0.02):
    """A checkpoint folder as the trainers leave them."""
    model = small_model(tokenizer)
    torch.manual_seed(step)
    with torch.no_grad():
        for weight in model.parameters():
            weight += move * torch.randn_like(weight)
    folder = root / stage / "checkpoints" / f"checkpoint-{step}"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_checkpoints_are_points_of_the_frontier(run, word_tokenizer):
    for step in (8, 16, 24):
        checkpoint(run, "ppo", step, word_tokenizer, 0.003 * step)
    checkpoint(run, "dpo", 50, word_tokenizer)
    set_config(run, "checkpoints: {ppo: all, dpo: [50, 70]}")
    report = compare(run)
    along = {p["policy"]: p for p in report["frontier"] if p["along"] == "training"}
    # Step 24 is the main policy itself; step 70 is not there, and that costs one point, not the report.
    assert set(along) == {"ppo,step=8", "ppo,step=16", "dpo,step=50"}
    assert 0 < along["ppo,step=8"]["kl"]["mean"] < along["ppo,step=16"]["kl"]["mean"]
    for point in along.values():
        assert point["gold_reward_ci"][0] <= point["gold_reward"] <= point["gold_reward_ci"][1]
        assert point["kl"]["ci"][0] <= point["kl"]["mean"] <= point["kl"]["ci"][1]
    assert any("dpo has no checkpoint of step 70 (there: 50)" in warning for warning in report["warnings"])
    # Neither the matrix nor the other policies know of them.
    assert not any("step=" in name for name in report["policies"])
    assert not any("step=" in entry["policy"] for entry in report["win_rates"])
    assert {p["policy"] for p in report["frontier"] if p["along"] == "sweep"} >= {"ppo", "dpo", "ppo,kl_coef=0.0"}
    rows = read_parquet(run / "compare" / "completions.parquet").to_pandas()
    assert (rows["policy"] == "ppo,step=8").sum() == 12
    page = (run / "compare" / "report.html").read_text()
    assert "PPO step 8" in page


def test_checkpoints_change_no_other_figure(run, word_tokenizer):
    before = compare(run)
    checkpoint(run, "ppo", 8, word_tokenizer)
    set_config(run, "checkpoints: {ppo: [8]}")
    after = compare(run)
    for key in ("policies", "win_rates", "matched_kl", "ranking", "optimum"):
        assert_near(after[key], before[key])
    assert_near([p for p in after["frontier"] if p["along"] != "training"], before["frontier"])


def assert_near(found, wanted):
    """Equal but for what fp32 says about one text in batches of other widths."""
    if isinstance(wanted, dict):
        assert set(found) == set(wanted)
        for key in wanted:
            assert_near(found[key], wanted[key])
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_near(one, other)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, abs=1e-6)
    else:
        assert found == wanted


def test_best_of_n_over_a_trained_policy(run):
    set_config(run, "best_of: {ppo: [2, 4]}")
    report = compare(run)
    ours = report["policies"]["best_of_4,policy=ppo"]
    assert ours["point"] == {"n": 4, "policy": "ppo"}
    # By hand, from the file: the pool estimator on ppo's own pool, no draw for each n.
    rows = read_parquet(run / "compare" / "completions.parquet").to_pandas()
    pool = rows[(rows["policy"] == "ppo") & (rows["role"] == "pool")]
    assert len(pool) == 12 * 8
    proxy, golds, k1 = (pool[key].to_numpy().reshape(12, 8) for key in ("reward_model", "gold", "k1"))
    weights = pool_weights(proxy, 4)
    assert ours["gold_reward"] == pytest.approx((weights * golds).sum(1).mean(), abs=1e-12)
    assert ours["kl"]["bound"] == pytest.approx(kl_bound(4) + (weights * k1).sum(1).mean(), abs=1e-12)
    assert ours["kl"]["mean"] <= ours["kl"]["bound"] + 1e-12
    assert ours["kl"]["kind"] == "beirami + k1"
    assert ours["proxy_reward"] == pytest.approx((weights * proxy).sum(1).mean(), abs=1e-12)
    assert ours["proxy_reward"] > proxy.mean()
    assert report["policies"]["best_of_4"]["point"] == {"n": 4}
    pairs = {(e["policy"], e["versus"]) for e in report["win_rates"] if e["judge"] == "gold"}
    assert ("best_of_4,policy=ppo", "ppo") in pairs
    assert ("best_of_4,policy=ppo", "best_of_4") in pairs
    assert "best-of-4 of PPO" in (run / "compare" / "report.html").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("best_of: {pppo: [2]}", "Did you mean ppo"),
        ("best_of: {sft: [2]}", "compare.best_of_n"),
        ("best_of: {ppo: [0]}", "list of values of n"),
        ("checkpoints: {sft: [2]}", "only ppo and dpo"),
        ("checkpoints: {ppo: [x]}", "list of steps"),
    ],
)
def test_options_that_cannot_be_meant(run, settings, message):
    set_config(run, settings)
    with pytest.raises(UserError, match=message):
        compare(run)


def test_without_a_reward_model_best_of_n_is_left_out_and_says_so(run):
    shutil.rmtree(run / "reward_model")
    report = compare(run)
    assert not any(name.startswith("best_of") for name in report["policies"])
    assert any("best-of-n is left out" in warning for warning in report["warnings"])


def brute_force(root, beta, policy, n_prompts, length):
    """E r, KL and J* - J of a policy for the gold reward, one full sequence after the other (papers.md 3.1)."""
    tokenizer = load_tokenizer(root / "sft" / "model")
    reference, model = (load_policy(root / name / "model", None) for name in ("sft", policy))
    end = tokenizer.eos_token_id
    others = [token for token in range(len(tokenizer)) if token != end]
    heads = [[]]
    sequences = []
    for _ in range(length):
        sequences += [[*head, end] for head in heads]
        heads = [[*head, token] for head in heads for token in others]
    sequences += heads
    finished = [one[-1] == end for one in sequences]
    texts = [tokenizer.decode(one, skip_special_tokens=True) for one in sequences]
    rows = []
    for prompt in encode_prompts(tokenizer, PROMPTS[:n_prompts]):
        batch = pad_batch([prompt] * len(sequences), sequences, 0)
        with torch.no_grad():
            logs = [response_logprobs(m, batch)[0].double().sum(-1).numpy() for m in (reference, model)]
        p, pi = np.exp(logs[0]), np.exp(logs[1])
        r = np.array(gold([""] * len(texts), texts, finished))
        best = p * np.exp(r / beta)
        best /= best.sum()
        divergence = [float((pi * (np.log(pi) - np.log(q))).sum()) for q in (p, best)]
        rows.append((pi @ r, divergence[0], beta * divergence[1]))
    return np.mean(rows, axis=0)


def test_the_optimum_is_exact_where_all_completions_can_be_enumerated(run):
    text = (run / "config.yaml").read_text()
    text = text.replace("max_new_tokens: 12", "max_new_tokens: 2").replace("n_prompts: 12", "n_prompts: 4")
    (run / "config.yaml").write_text(text)
    report = compare(run)
    found = report["optimum"]
    assert found["kind"] == "exact"
    assert found["completions"] == 1 + 19 + 19**2
    gaps = {(g["policy"], g["judge"]): g for g in found["gaps"]}
    # PPO without a penalty has no optimum to be held against.
    assert set(gaps) == {(p, j) for p in ("ppo", "dpo") for j in ("gold", "reward_model")}
    for policy, beta in (("ppo", 0.5), ("dpo", 2.0)):
        reward, kl, gap = brute_force(run, beta, policy, 4, 2)
        entry = gaps[policy, "gold"]
        assert entry["beta"] == beta
        assert entry["gap"] == pytest.approx(gap, abs=1e-5)
        assert entry["gap"] > 0
        assert entry["objective"] == pytest.approx(reward - beta * kl, abs=1e-5)
        assert entry["optimum"] - entry["objective"] == pytest.approx(entry["gap"], abs=1e-12)
        assert found["policies"][policy]["kl"] == pytest.approx(kl, abs=1e-5)
    assert found["policies"]["sft"]["kl"] == pytest.approx(0, abs=1e-12)
    # No policy above the curve; the reference's draws are near the sum over everything.
    estimate = report["policies"]["sft"]["gold_reward"]
    assert estimate == pytest.approx(found["policies"]["sft"]["rewards"]["gold"], abs=0.6)
    curve = np.array([[point["kl"], point["reward"]] for point in found["curves"]["gold"]])
    for exact in found["policies"].values():
        assert exact["rewards"]["gold"] <= np.interp(exact["kl"], *curve.T) + 2e-3
    page = (run / "compare" / "report.html").read_text()
    assert "exact" in page
    set_config(run, "enumerate_up_to: 0")
    assert compare(run)["optimum"]["kind"] == "importance weights"


def test_the_estimate_says_where_it_stops(run):
    found = compare(run)["optimum"]
    assert found["kind"] == "importance weights"
    assert found["draws"] == 4 + 8
    for curve in found["curves"].values():
        assert all(point["ess"] >= 4 for point in curve)
        assert [point["kl"] for point in curve] == sorted(point["kl"] for point in curve)
    for gap in found["gaps"]:
        assert ("refused" in gap) != ("gap" in gap)


def test_difficulty_in_the_length_controlled_model(run):
    plain = compare(run)
    set_config(run, "length_difficulty: true")
    report = compare(run)
    slopes = [
        e["length_controlled"].get("difficulty_slope") for e in report["win_rates"] if e.get("length_controlled")
    ]
    assert slopes
    assert all(slope is not None and slope >= 0 for slope in slopes)
    assert any(slope > 0 for slope in slopes)
    rates = {(e["judge"], e["policy"], e["versus"]): e for e in report["win_rates"] if e["policy"] != e["versus"]}
    for (judge, policy, versus), entry in rates.items():
        if entry["length_controlled"]:
            back = rates[judge, versus, policy]["length_controlled"]
            assert entry["length_controlled"]["win_rate"] + back["win_rate"] == 1.0
    # The raw figures are what they were.
    assert [e["win_rate"] for e in report["win_rates"]] == [e["win_rate"] for e in plain["win_rates"]]
    assert read_json(run / "compare" / "report.json")["settings"]["length_difficulty"] is True


def test_an_added_policy_with_another_tokenizer_is_judged_without_kl(run, tmp_path):
    """Its completions are texts like any other's; a KL between different vocabularies does not exist."""
    folder = tmp_path / "other"
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "film": 3, "good": 4}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    small_model(fast).save_pretrained(folder)
    set_config(run, f"policies: {{other: {{path: {folder}}}}}, best_of: {{other: [2]}}")
    report = compare(run)
    unknown = {"mean": None, "ci": None, "kind": "not measured"}
    assert report["policies"]["other"]["kl"] == report["policies"]["best_of_2,policy=other"]["kl"] == unknown
    assert report["policies"]["other"]["gold_reward"] is not None
    assert any((e["policy"], e["versus"]) == ("other", "sft") for e in report["win_rates"])
    assert not any(point["policy"] == "other" for point in report["frontier"])


def test_empty_completions_are_counted_and_told(run, tmp_path):
    rows = [{"prompt": prompt, "completion": " good" if i % 2 else ""} for i, prompt in enumerate(PROMPTS)]
    write_jsonl(tmp_path / "mine.jsonl", rows)
    set_config(run, f"policies: {{mine: {{completions: {tmp_path}/mine.jsonl}}}}")
    report = compare(run)
    assert report["policies"]["mine"]["quality"]["empty_rate"] == 0.5
    assert any("mine gives an empty completion in 50.0 %" in warning for warning in report["warnings"])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("data/prompts_heldout.parquet", "is not a complete Parquet file"),
        ("pairs/test.parquet", "is not a complete Parquet file"),
        ("pairs/done.json", "stage pairs of .* has not finished"),
    ],
)
def test_truncated_files_are_named(run, path, message):
    content = (run / path).read_bytes()
    (run / path).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=message) as error:
        compare(run)
    assert path.split("/")[0] in str(error.value)
