"""When work is shared between forked processes."""

import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch

from ppo_vs_dpo.compare.sampling.gather import may_fork


@pytest.mark.parametrize(
    ("workers", "alone", "threads", "forks"),
    [(2, True, 1, True), (1, True, 1, False), (2, False, 1, False), (2, True, 2, False)],
)
def test_who_forks(monkeypatch, workers, alone, threads, forks):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert may_fork(workers, SimpleNamespace(alone=alone)) is forks


def test_several_threads_end_too():
    """Seen: with OMP_NUM_THREADS=2 two forked workers waited for ever in the first product."""
    code = """
        from types import SimpleNamespace
        import torch
        from ppo_vs_dpo.compare.sampling.gather import in_processes, may_fork

        def product(n):
            return (torch.ones(n, n) @ torch.ones(n, n)).sum().item()

        torch.set_num_threads(2)
        product(800)
        if may_fork(2, SimpleNamespace(alone=True)):
            list(in_processes(product, [800, 801], 2))
        print("ended")
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert ended.stdout == "ended\n"
