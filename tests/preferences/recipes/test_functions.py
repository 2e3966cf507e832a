"""What users' functions return: taken as scores, or one sentence with the function and the sample."""

import asyncio
import os
import threading

import numpy as np
import pytest
import torch

from ppo_vs_dpo.artifacts.awaiting import wait_for
from ppo_vs_dpo.preferences.recipes.functions import ScoreError, as_scores, called, score_with

PROMPTS, ANSWERS = ["p0", "p1", "p2"], ["a0", "a1", "a2"]


@pytest.mark.parametrize(
    "found",
    [
        [1.0, 2.0, 3.0],
        (1, 2, 3),
        [np.float32(1), np.int64(2), 3.0],
        [torch.tensor(1.0), torch.tensor(2, dtype=torch.int64), np.array(3.0)],
        np.array([1, 2, 3], dtype=np.float16),
        torch.tensor([1.0, 2.0, 3.0], requires_grad=True),
        torch.tensor([1, 2, 3], dtype=torch.bfloat16),
        [True, 2, 3],
    ],
)
def test_numbers_of_any_library(found):
    scores = as_scores("f", found, PROMPTS, ANSWERS)
    assert scores == [1.0, 2.0, 3.0]
    assert all(type(score) is float for score in scores)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "f returned None for 3 completions: is there a return at its end?"),
        (1.0, "f returned float 1.0 for 3 completions; a list with one number each"),
        ([1, 10**400, 2], r"for sample 1 .*; it must be a finite number"),
        (torch.tensor(1.0), r"array of shape \(\) for 3 completions \(samples 0 to 2\)"),
        (torch.ones(3, 1), r"array of shape \(3, 1\) .* Take its one column"),
        (np.ones((3, 2)), r"array of shape \(3, 2\)"),
        ([1.0, 2.0], r"f returned 2 scores for 3 completions \(samples 0 to 2\)"),
        ([1.0, None, 2.0], r"f returned None for sample 1 \(prompt 'p1', completion 'a1'\).* Return 0.0"),
        ([1.0, [2.0], 3.0], r"f returned \[2.0\] for sample 1"),
        ([1.0, 2.0, float("nan")], "f returned nan for sample 2"),
        ([np.float32("inf"), 2.0, 3.0], "for sample 0"),
        (["1", "2", "3"], "f returned '1' for sample 0"),
        ({"a0": 1.0}, "f returned dict"),
        ("123", "f returned str '123'"),
        ((score for score in [1.0, 2.0, 3.0]), "f returned generator"),
        ([torch.ones(2), 1.0, 2.0], "for sample 0"),
    ],
)
def test_everything_else_is_one_sentence(found, words):
    with pytest.raises(ScoreError, match=words):
        as_scores("f", found, PROMPTS, ANSWERS)


def test_coroutines_are_awaited_in_one_loop():
    """What a function keeps open between calls belongs to a loop: it must be the same one, from any thread."""
    loops = []

    async def score(prompts, completions):
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return [float(len(c)) for c in completions]

    assert called(score, prompts=PROMPTS, completions=ANSWERS) == [2.0, 2.0, 2.0]
    thread = threading.Thread(target=lambda: called(score, prompts=PROMPTS, completions=ANSWERS))
    thread.start()
    thread.join()

    async def inside():  # as in a notebook, where a loop runs already
        return called(score, prompts=PROMPTS, completions=ANSWERS)

    assert asyncio.run(inside()) == [2.0, 2.0, 2.0]
    assert len(loops) == 3
    assert len(set(loops)) == 1
    pending = [asyncio.sleep(0, 1.0)]
    with pytest.raises(ScoreError, match=r"coroutine .* for sample 0 .* Await it in the function"):
        as_scores("f", pending, ["p"], ["a"])
    pending[0].close()


def test_errors_come_out_of_the_loop_and_time_ends():
    async def fails(prompts, completions):
        raise ValueError("no such user")

    with pytest.raises(ScoreError, match="f raised ValueError: no such user"):
        score_with(fails, "f", PROMPTS, ANSWERS)
    with pytest.raises(TimeoutError):
        wait_for(asyncio.sleep(30), seconds=0.05)


def test_a_forked_child_has_a_loop_of_its_own():
    """`compare.workers` forks: the parent's thread is not there."""

    async def one():
        return 7

    assert wait_for(one()) == 7
    pid = os.fork()
    if pid == 0:
        os._exit(wait_for(one(), seconds=5))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
