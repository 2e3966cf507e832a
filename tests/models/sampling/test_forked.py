"""When work is shared between forked processes."""

import subprocess
import sys
import textwrap

import pytest
import torch

from ppo_vs_dpo.models.sampling import generation
from ppo_vs_dpo.models.sampling.forked import may_fork
from ppo_vs_dpo.models.sampling.generation import SamplingConfig, generate


@pytest.mark.parametrize(
    ("workers", "alone", "threads", "forks"),
    [(2, True, 1, True), (1, True, 1, False), (2, False, 1, False), (2, True, 2, False)],
)
def test_who_forks(monkeypatch, workers, alone, threads, forks):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert may_fork(workers, alone) is forks


def test_several_threads_end_too():
    """Seen: with OMP_NUM_THREADS=2 two forked workers waited for ever in the first product."""
    code = """
        import torch
        from ppo_vs_dpo.models.sampling.forked import in_processes, may_fork

        def product(n):
            return (torch.ones(n, n) @ torch.ones(n, n)).sum().item()

        torch.set_num_threads(2)
        product(800)
        if may_fork(2):
            list(in_processes(product, [800, 801], 2))
        print("ended")
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert ended.stdout == "ended\n"


def test_what_is_drawn_does_not_depend_on_the_number_of_processes(tiny_llama, monkeypatch):
    model, here, told = tiny_llama(), [], []
    batch = generation._generate_batch
    monkeypatch.setattr(generation, "_generate_batch", lambda *args: here.append(1) or batch(*args))
    prompts = [[3 + row % 7] * (1 + row % 5) for row in range(22)]
    sampling, common = SamplingConfig(max_new_tokens=12, batch_size=4), {"eos_token_ids": [2], "seeds": range(22)}
    alone = generate(model, prompts, sampling, **common)
    assert len(here) == 6
    shared = generate(model, prompts, sampling, **common, workers=2, progress=lambda *done: told.append(done))
    assert shared == alone
    # Nothing was drawn in this process, and every batch was told of.
    assert len(here) == 6
    assert len(told) == 6
    assert told[-1] == (22, 22)
