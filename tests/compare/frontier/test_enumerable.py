"""The whole stage on the space of `benchmarks.enumerable`, with DPO trained for real: J* - J against its own count."""

import numpy as np
import pytest

from benchmarks.convergence import run_dpo
from benchmarks.enumerable import Space
from ppo_vs_dpo.artifacts.files import write_parquet, write_text
from ppo_vs_dpo.compare.frontier.exact import optimal_policy
from ppo_vs_dpo.preferences.schema import prompt_id
from tests.compare.helpers import HASH, done
from tests.compare.test_stage import compare

SPACE, BETA = Space(0), 0.5
PAIR_SET = {"hash": HASH, "n_train": 4000, "n_test": 0}


def reward(prompts, completions, **columns):
    """The space's reward; a prompt is the end token and one of its words."""
    return SPACE.reward([prompt.split()[-1] for prompt in prompts], completions)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with the reference, a briefly trained DPO policy, and the space's three prompts."""
    root = tmp_path_factory.mktemp("enumerable")
    policy = run_dpo(SPACE, BETA, pairs=4000, seed=0, batch=500, epochs=1, lr=2e-3)
    for name, model in (("sft", SPACE.reference), ("dpo", policy)):
        model.save_pretrained(root / name / "model")
        SPACE.tokenizer.save_pretrained(root / name / "model")
        done(root, name, pair_set=PAIR_SET, beta=BETA)
    done(root, "pairs", pair_set=PAIR_SET)
    prompts = [f"<end> {word}" for word in "abc"]
    write_parquet(
        root / "data" / "prompts_heldout.parquet", {"prompt": prompts, "prompt_id": list(map(prompt_id, prompts))}
    )
    write_text(
        root / "config.yaml",
        "seed: 1\ndata: {gold: tests.compare.frontier.test_enumerable:reward}\nmodel: {path: null}\n"
        "compare: {max_new_tokens: 3, resamples: 200, pool_size: 8, best_of_n: [2], samples: 16}\n",
    )
    return root, policy


def test_the_gap_to_the_optimum_is_the_spaces_own(run):
    root, policy = run
    report = compare(root)
    found = report["optimum"]
    assert (found["kind"], found["completions"]) == ("exact", 40)
    measured = SPACE.measure(policy, BETA)
    (gap,) = found["gaps"]
    assert gap["policy"] == "dpo"
    # papers.md 3.1.2: J* - J = beta KL(pi || pi*).
    assert gap["gap"] == pytest.approx(BETA * measured["kl"], abs=1e-5)
    assert gap["optimum"] == pytest.approx(SPACE.optimum(BETA)[1], abs=1e-5)
    # DPO was on its way: nearer to its optimum than the reference is.
    assert 0 < gap["gap"] < BETA * measured["kl_start"]
    log_pi = SPACE.log_probabilities(policy)
    kl = (np.exp(log_pi) * (log_pi - SPACE.log_reference)).sum(1).mean()
    assert found["policies"]["dpo"]["kl"] == pytest.approx(kl, abs=1e-5)
    assert found["policies"]["dpo"]["rewards"]["gold"] == pytest.approx(
        (np.exp(log_pi) * SPACE.rewards).sum(1).mean(), abs=1e-5
    )
    # The exact curve, point by point.
    start = np.exp(SPACE.log_reference)
    for point in found["curves"]["gold"][::7]:
        best = [optimal_policy(p, r, point["beta"]) for p, r in zip(start, SPACE.rewards, strict=True)]
        expected = np.mean([pi @ r for pi, r in zip(best, SPACE.rewards, strict=True)])
        assert point["reward"] == pytest.approx(expected, abs=1e-5)
    assert "It is exact: all 40 completions" in " ".join((root / "compare" / "report.html").read_text().split())
