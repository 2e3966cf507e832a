"""Prompts of one dialogue, equal ones and near duplicates are one unit; short templates are not."""

import numpy as np
import pytest

from ppo_vs_dpo.compare.statistics.clusters import clusters_of

LONG = "How do I bake a good loaf of bread at home without an oven?"


def chat(*contents):
    """A conversation, user first."""
    roles = ("user", "assistant")
    return [{"role": roles[turn % 2], "content": text} for turn, text in enumerate(contents)]


def same(prompts, near=0.8):
    """Which pairs are together."""
    labels = clusters_of(prompts, near)
    return {(a, b) for a in range(len(prompts)) for b in range(a) if labels[a] == labels[b]}


def test_dialogues():
    prompts = [chat(LONG), chat(LONG, "Use a pan.", "How long?"), chat("Hi"), chat("Hi", "Hello!", "Why?")]
    assert same(prompts) == {(1, 0)}
    # A common greeting is no dialogue; the same answer to it is.
    assert same([*prompts, chat("Hi", "Hello!", "Why?", "Because.", "Really?")]) == {(1, 0), (4, 3)}


def test_duplicates():
    near = LONG.replace("an oven?", "ovens")
    assert same([LONG, f"  {LONG.upper()} ", near, "Something else entirely, of no fewer than eight words."]) == {
        (1, 0),
        (2, 0),
        (2, 1),
    }
    assert same([LONG, near], near=1.0) == set()
    assert same(["the film was very", "the film was", "a film was very", "the film was  very"]) == {(3, 0)}


def test_many_prompts_are_quick_and_apart():
    rng = np.random.default_rng(0)
    words = [f"w{number}" for number in range(500)]
    prompts = [" ".join(rng.choice(words, 20)) for _ in range(400)]
    assert len(np.unique(clusters_of(prompts, 0.8))) == 400


@pytest.mark.parametrize("prompts", [[], ["one"], ["", ""]])
def test_nothing_to_compare(prompts):
    assert len(clusters_of(prompts, 0.8)) == len(prompts)
