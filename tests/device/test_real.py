"""What only a GPU can show: ``make test-gpu`` on a machine with one, about three minutes.

The other tests compute on a CPU wherever they run (tests/conftest.py); these skip where there is no GPU.
"""

import collections
import contextlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from ppo_vs_dpo.models.loading.config import LoraSettings
from ppo_vs_dpo.models.passes import packed
from ppo_vs_dpo.models.passes.logprobs import full_kl, pad_batch, response_logprobs
from ppo_vs_dpo.models.sampling import fixed
from ppo_vs_dpo.models.sampling.generation import SamplingConfig, generate
from ppo_vs_dpo.ppo.rollouts.clock import Clock
from tests.device.jobs import TOKENIZER, llama, ppo, trained

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU (make test-gpu)")
ROOT = Path(__file__).parents[2]
PROMPTS = [[5, 6, 7, 8][: 1 + n % 4] for n in range(24)]


@pytest.fixture(autouse=True)
def full_precision():
    """fp32 is fp32 where a test says nothing; what a trainer sets does not reach the next test."""
    before = torch.backends.fp32_precision
    torch.backends.fp32_precision = "ieee"
    yield
    torch.backends.fp32_precision = before


@pytest.fixture
def batch():
    """Prompts and responses of many lengths."""
    return [[5 + n % 9] * (1 + n % 7) for n in range(24)], [[6 + n % 9] * (1 + 3 * (n % 11)) for n in range(24)]


@contextlib.contextmanager
def waits():
    """The lines at which the host waits for the device, by torch's own detector."""
    found: list[str] = []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
        found += [f"{one.filename}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def loss_and_gradients(model, lists, device, half):
    """Log-probabilities of responses, and gradients of their squares, in fp32 on the host."""
    model = model.to(device)
    model.zero_grad()
    with torch.autocast(device, torch.bfloat16, enabled=half):
        logprobs = response_logprobs(model, pad_batch(*lists, 0, device))[0]
    logprobs.pow(2).mean().backward()
    return logprobs.detach().float().cpu(), torch.cat([p.grad.flatten().float().cpu() for p in model.parameters()])


@pytest.mark.parametrize("heads", [4, 2])
def test_attention_of_packed_rows(batch, monkeypatch, heads):
    """torch's kernel for sequences of all lengths: bfloat16's rounding away from fp32, forward and backward."""
    assert packed.varlen_kernel() is not None
    calls, kernel = [], packed.varlen_kernel()
    monkeypatch.setattr(packed, "varlen_kernel", lambda: lambda *a, **k: calls.append(1) or kernel(*a, **k))
    model = llama(hidden_size=128, num_attention_heads=4, num_key_value_heads=heads, initializer_range=0.05)
    expected, slopes = loss_and_gradients(model, batch, "cpu", False)
    found, moved = loss_and_gradients(model, batch, "cuda", True)
    assert len(calls) == 4
    assert (found - expected).abs().mean() < 5e-3
    assert (moved - slopes).norm() < 0.03 * slopes.norm()
    exact, same = loss_and_gradients(model, batch, "cuda", False)
    assert len(calls) == 4
    assert (exact - expected).abs().max() < 2e-5
    assert (same - slopes).norm() < 1e-4 * slopes.norm()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_decoding_as_a_cuda_graph(monkeypatch, lora, temperature):
    """The tokens of the ordinary loop and those of a CPU; after an update of the weights, those of the new weights."""
    captured = []
    graph = fixed.CudaGraph

    class Counted(graph):
        def __init__(self, step):
            super().__init__(step)
            captured.append(1)

    monkeypatch.setitem(fixed.GRAPHS, "cuda", Counted)
    model = llama(vocabulary=64, seed=3)
    if lora:
        from peft import get_peft_model

        model = get_peft_model(model, LoraSettings(r=2, target_modules=["q_proj"]).peft_config("CAUSAL_LM"))

    def draw(device, graphs):
        sampling = SamplingConfig(40, temperature=temperature, cuda_graphs=graphs)
        options = {"eos_token_ids": [2], "seeds": range(len(PROMPTS)), "with_logprobs": temperature > 0}
        drawn = generate(model.to(device), PROMPTS, sampling, **options)
        return [one.token_ids for one in drawn], torch.cat([torch.tensor(one.logprobs or [0.0]) for one in drawn])

    for _ in range(2):
        tokens, logprobs = draw("cpu", None)
        plain, plain_logprobs = draw("cuda", False)
        before = len(captured)
        repeated, repeated_logprobs = draw("cuda", True)
        assert len(captured) > before
        assert repeated == plain == tokens
        assert (repeated_logprobs - plain_logprobs).abs().max() < 2e-5
        assert (plain_logprobs - logprobs).abs().max() < 1e-4
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).to("cuda")


def test_the_exact_kl(batch):
    one, other = llama(seed=0), llama(seed=1)
    expected = full_kl(one, other, pad_batch(*batch, 0))
    found = full_kl(one.to("cuda"), other.to("cuda"), pad_batch(*batch, 0, "cuda"))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["full", "lora", "one base", "engine"])
@pytest.mark.parametrize("half", [False, True])
def test_ppo(tmp_path, kind, half):
    """Two updates, evaluated, saved, gone on from: the first KL and the first ratio are those of rounding, weights
    move, and the second update of both attempts is one."""
    more = {"score_bias": "auto"} if kind == "engine" else {}
    settings = {"kind": kind, "bf16": half, "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "tf32": False,
                "gradient_checkpointing": kind == "lora", "diagnose": True, "num_ppo_epochs": 2, **more}  # fmt: skip
    trainer = ppo(tmp_path, **settings)
    trainer.prepare()
    trainer.train()
    trainer.evaluate()
    first, second = [row for row in trainer.state.log_history if "objective/kl" in row]
    assert abs(first["objective/kl"]) < (1e-6 if kind != "engine" or not half else 1e-2)
    assert first["objective/kl_k3"] < 1e-5
    again = ppo(tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    found = [row for row in again.state.log_history if "objective/kl" in row][-1]
    for key in ("objective/scores", "objective/kl", "policy/approxkl_avg", "loss/value_avg"):
        if key in second:
            assert found[key] == pytest.approx(second[key], rel=0.02, abs=1e-4), key
    left = {p.device.type for p in again.model.parameters()}
    assert left == {"cuda"}


def test_ppo_in_fp32_is_that_of_a_cpu(tmp_path):
    """The same tokens, the same rewards, the same losses to 1e-4."""
    runs = []
    for name, host in (("cpu", True), ("gpu", False)):
        (tmp_path / name).mkdir()
        trainer = ppo(tmp_path / name, use_cpu=host, tf32=None if host else False, max_steps=3, num_ppo_epochs=2)
        trainer.train()
        runs.append([row for row in trainer.state.log_history if "objective/kl" in row])
    for ours, theirs in zip(*runs, strict=True):
        for key in ("objective/scores", "objective/kl", "objective/entropy", "loss/value_avg", "policy/approxkl_avg"):
            if key in ours:
                assert theirs[key] == pytest.approx(ours[key], rel=2e-3, abs=1e-4), key


@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo"])
def test_the_other_stages(tmp_path, stage):
    """In fp32 the losses of a CPU; in bfloat16 they are near; TRL's trainer on the same rows gives the same."""
    losses = {}
    for name, settings in (
        ("cpu", {"use_cpu": True, "bf16": False}), ("fp32", {"bf16": False, "tf32": False}), ("bf16", {}),
        ("trl", {"plain": True}),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        trainer = trained(tmp_path / name, stage, **settings)
        trainer.train()
        losses[name] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses["fp32"] == pytest.approx(losses["cpu"], rel=1e-4)
    assert losses["bf16"] == pytest.approx(losses["cpu"], rel=2e-2)
    assert losses["trl"] == pytest.approx(losses["bf16"], rel=2e-2)


def test_an_update_hardly_waits(tmp_path, monkeypatch):
    """By torch's own detector: the waits that were counted on the pretended device, or fewer."""
    found: dict[str, list[str]] = {}
    timed = Clock.__call__

    @contextlib.contextmanager
    def phase(self, name):
        with timed(self, name), waits() as lines:
            yield
        found.setdefault(name.rpartition("/")[2], []).extend(lines)

    trainer = ppo(tmp_path, bf16=True, max_steps=3)
    trainer.prepare()
    monkeypatch.setattr(Clock, "__call__", phase)
    trainer.train()
    # That one counts a copy to the device as a wait, too.
    counted = json.loads((Path(__file__).parent / "counts.json").read_text(encoding="utf-8"))["ppo bf16"]
    for name in ("train", "forward"):
        allowed = counted[name]["waits"] + counted[name]["uploads"]
        assert len(found[name]) <= allowed, collections.Counter(found[name])


@pytest.mark.parametrize("sharding", ["zero2", "zero3"])
def test_one_rank_under_deepspeed(sharding):
    """NCCL, bfloat16, an update of PPO."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1",
         "-m", "benchmarks.gpu", "--size", "tiny", "--deepspeed", sharding, "--prompt", "16", "--response", "16",
         "--updates", "1"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"tiny full, {sharding}" in done.stdout


def test_the_whole_road(tmp_path):
    """Pairs to verdict by the command, as it comes on a GPU: bfloat16, checkpointing, a model of one's own."""
    model = llama(hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    words = ["good", "bad", "dull", "bright"]
    pairs = [
        f'{{"prompt": "the {a} film was {b}", "chosen": " very good {c}", "rejected": " bad {c} and dull"}}'
        for a in words for b in words for c in (*words, "plot", "cast", "story")
    ]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("\n".join(pairs), encoding="utf-8")
    small = ["reward_model.max_steps=2", "dpo.max_steps=2", "ppo.max_steps=2", "ppo.rollout_batch_size=8",
             "compare.n_prompts=4", "ppo.response_length=8", "compare.max_new_tokens=8", "reward_model.samples=8",
             "ppo.validation_prompts=2", "data.conversational=false", "compare.pool_size=2",
             "compare.best_of_n=[2]", "data.heldout_prompts=6"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "ppo_vs_dpo.pipeline.cli", "experiment=try", "model.path=model",
         "data.path=pairs.jsonl", *small],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert (tmp_path / "runs" / "try" / "compare" / "report.html").is_file()
