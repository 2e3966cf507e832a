"""vLLM for real, in an environment that has it: `PPO_VS_DPO_VLLM_PYTHON` names its Python (docs/performance.md)."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.ppo.vllm_run import STALE, SYNCED
from tests.ranks import beside_tests

ROOT = Path(__file__).parents[3]


@pytest.fixture
def vllm_run(tmp_path, word_tokenizer):
    """A function that trains a tiny model with vLLM in a process of its own: ``vllm_run("full" or "lora", model)``."""
    python = os.environ.get("PPO_VS_DPO_VLLM_PYTHON")
    if not python:
        pytest.skip("PPO_VS_DPO_VLLM_PYTHON does not name a Python with vLLM")

    def start(kind, model):
        with torch.no_grad():  # likelier to end: responses of different lengths
            model.lm_head.weight[word_tokenizer.eos_token_id] += 3 * model.lm_head.weight[10]
        model.save_pretrained(tmp_path / "model")
        word_tokenizer.save_pretrained(tmp_path / "model")
        done = subprocess.run(
            [python, "-m", "tests.ppo.vllm_run", str(tmp_path / "model"), str(tmp_path / "out"), kind],
            cwd=ROOT,
            env={"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, "PYTHONPATH": beside_tests(tmp_path)},
            capture_output=True,
            text=True,
            timeout=1800,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return start


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "architecture", "tied"), [("full", "llama", False), ("lora", "llama", True), ("full", "qwen2", True)]
)
def test_ppo_with_vllm(vllm_run, tiny_llama, kind, architecture, tied):
    """Engine and trainer agree after every update to 1e-3 (fp32), and do not once weights are no longer sent.

    A head of its own and one tied to the embedding, without and with biases, weights whole and merged.
    """
    # vLLM's CPU kernels need heads of 32.
    model = tiny_llama(0, initializer_range=0.2, hidden_size=64, tie_word_embeddings=tied)
    if architecture == "qwen2":
        config = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures")}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **config))
    report = vllm_run(kind, model)
    rows = report["log"]
    assert len(rows) == SYNCED + STALE
    assert max(row["engine/logprob_difference_max"] for row in rows[:SYNCED]) < 1e-3
    assert max(abs(row["engine/importance_ratio_mean"] - 1) for row in rows[:SYNCED]) < 1e-4
    # The policy moved in each update, so that the agreement is the synchronisation's.
    assert min(row["policy/approxkl_avg"] for row in rows) > 1e-4
    assert min(row["engine/logprob_difference_max"] for row in rows[SYNCED + 1 :]) > 1e-2
    assert max(row["val/first_ratio_deviation"] for row in rows) < 1e-5

    first, again, reordered, other = report["draws"]
    assert first == again == reordered
    assert first != other
    # A response ends at an end token, which it keeps, or with the budget.
    for tokens, finished in zip(first, report["finished"], strict=True):
        assert len(tokens) <= report["budget"]
        assert finished == (tokens[-1] in report["eos"])
        assert finished or len(tokens) == report["budget"]
        assert not set(tokens[:-1]) & set(report["eos"])
