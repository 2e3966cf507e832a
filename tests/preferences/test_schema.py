"""Fingerprints: stable over platforms and orders, different for different content."""

from ppo_vs_dpo.artifacts.files import sha256_of
from ppo_vs_dpo.preferences.schema import make_pair, pair_id, pair_set_hash, prompt_id, text_of


def test_ids_are_the_hash_of_canonical_json():
    chat = [{"role": "user", "content": "Grüße, 🦙"}]
    assert prompt_id(chat) == sha256_of(chat)[:16]
    assert prompt_id([{"content": "Grüße, 🦙", "role": "user"}]) == prompt_id(chat)
    assert prompt_id("a") != prompt_id([{"role": "user", "content": "a"}])
    assert pair_id("p", "a", "b") == sha256_of(["p", "a", "b"])[:16] != pair_id("p", "b", "a")
    # Known values: a change of the rule would make every earlier run's pair set another one.
    assert prompt_id("What is a llama?") == "a9647624a9f48f40"
    assert pair_id("p", "a", "b") == "2ec91f196666a2b4"


def test_the_pair_set_hash_is_a_set_hash():
    one = pair_set_hash({"train": ["a", "b"], "test": ["c"]})
    assert one == pair_set_hash({"test": ["c"], "train": ["b", "a"]})
    others = [
        {"train": ["a"], "test": ["c"]},
        {"train": ["a", "c"], "test": ["b"]},
        {"train": ["a", "b", "b"], "test": ["c"]},
    ]
    assert len({one, *map(pair_set_hash, others)}) == 4


def test_make_pair_keeps_what_it_is_given():
    pair = make_pair("p", "a", "b", chosen_score=1.0)
    assert (pair["prompt_id"], pair["pair_id"], pair["chosen_score"]) == (prompt_id("p"), pair_id("p", "a", "b"), 1.0)
    assert text_of([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]) == "x\n\ny"
