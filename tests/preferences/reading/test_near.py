"""Near duplicates between what is trained on and what is held out: exact Jaccard, counted, told."""

import json

import numpy as np
import pytest

from ppo_vs_dpo.preferences.reading.inspect import main
from ppo_vs_dpo.preferences.reading.near import LeakCount, NearTexts, plain, shingles
from tests.preferences.files import ROWS, write_jsonl

WORDS = [f"{letter}{number}" for letter in ("apple", "pie", "oven", "bake") for number in range(6)]


def test_every_near_pair_is_found_and_no_other():
    """Against the definition, on sets of character 5-grams."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(4, 20))) for _ in range(60)]
    corpus = [" ".join(w if rng.random() > 0.05 else "zest" for w in text.split()) for text in texts] + ["", "abc"]
    sets = [{plain(t)[i : i + 5] for i in range(len(plain(t)) - 4)} for t in (*texts, *corpus)]
    own, others = sets[: len(texts)], sets[len(texts) :]
    for least in (0.5, 0.8, 1.0):
        finder = NearTexts(texts, least)
        for text, theirs in zip(corpus, others, strict=True):
            long = len(text.split()) >= 8
            similar = [len(one & theirs) / len(one | theirs) if one | theirs else 0.0 for one in own]
            wanted = {
                row: share
                for row, share in enumerate(similar)
                if long and len(texts[row].split()) >= 8 and share >= least
            }
            assert finder.of(text) == pytest.approx(wanted)
    assert len(shingles("abcabcabc")) == 3
    assert NearTexts([], 0.8).of("one two three four five six seven eight nine") == {}


def test_what_leaks_is_counted_once_and_told():
    text = "Please tell me how to bake a good apple pie at home"
    leaks = LeakCount([text, "short", "What is the capital of France, and since when is it that?"])
    leaks.passes("a.jsonl:1", text)  # the same prompt is another matter
    assert leaks.sentence() is None
    for place in ("a.jsonl:2", "a.jsonl:3"):
        leaks.passes(place, [{"role": "user", "content": f"{text}  today"}])
    assert leaks.sentence().startswith("1 of 3 held-out prompts are near duplicates of training prompts")
    assert "a.jsonl:2" in leaks.sentence()


def test_inspect_looks_for_near_duplicates_in_the_test_file(tmp_path, capsys):
    question = "Please tell me how to bake a good apple pie at home, number {}"
    train = [{**row, "prompt": question.format(number)} for number, row in enumerate(ROWS)]
    test = [{**ROWS[0], "prompt": "please tell me  how to bake a good apple pie at home, number 77"}]
    path, other = write_jsonl(tmp_path / "train.jsonl", train), write_jsonl(tmp_path / "test.jsonl", test)
    main([str(path), "--test", str(other), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert len([said for said in report["said"] if "1 of 1 held-out prompts are near duplicates" in said]) == 1
    main([str(path), "--json"])
    assert not json.loads(capsys.readouterr().out)["said"]
