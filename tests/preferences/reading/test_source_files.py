"""Every source as a small file in its real shape, all of its columns there: read, recognised, mapped, split."""

import gzip
import itertools
import json

import pytest
from datasets import Dataset

from ppo_vs_dpo.artifacts.files import read_json, read_parquet
from ppo_vs_dpo.preferences.reading.inspect import main
from tests.preferences.conftest import make_run, run_here
from tests.preferences.files import given, steps

N = 12


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def hh(i):
    head = f"\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: What about {i}?\n\nAssistant:"
    return {"chosen": f"{head} Good {i}.", "rejected": f"{head} Bad {i}."}


def n_plus(i):
    """`vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144`, with its token columns."""
    return {
        "info": {"id": f"t3_{i}", "post": f"Post {i}", "title": "T", "subreddit": "r", "site": None, "article": None},
        "summaries": [
            {"text": f" Good {i}.", "policy": "sup1", "note": None},
            {"text": f" Bad {i}.", "policy": "ref", "note": "x"},
        ],
        "choice": 0,
        "worker": "w",
        "batch": "batch3",
        "split": "train",
        "extra": {"confidence": None},
        "query_token": [1, 2, 3],
        "query": f"SUBREDDIT: r/r\n\nTITLE: T\n\nPOST: What about {i}?\n\nTL;DR:",
        "chosen": f" Good {i}.<|endoftext|>",
        "chosen_token": [4, 0],
        "chosen_token_len": 2,
        "rejected": f" Bad {i}.<|endoftext|>",
        "rejected_token": [5, 0],
        "rejected_token_len": 2,
        "chosen_policy": "sup1",
        "rejected_policy": "ref",
        "policies": "ref--sup1",
    }


def tldr_of_trl(i):
    return {
        "prompt": f"SUBREDDIT: r/r\n\nTITLE: T\n\nPOST: What about {i}?\n\nTL;DR:",
        "chosen": f" Good {i}.",
        "rejected": f" Bad {i}.",
    }


def ultrafeedback(i):
    asked = user(f"What about {i}?")
    return {
        "prompt": f"What about {i}?",
        "prompt_id": f"{i:064x}",
        "chosen": [asked, assistant(f"Good {i}.")],
        "rejected": [asked, assistant(f"Bad {i}.")],
        "messages": [asked, assistant(f"Good {i}.")],
        "score_chosen": 8.5,
        "score_rejected": 4.0,
    }


def shp(i):
    label = i % 2
    return {
        "post_id": f"qt{i}",
        "domain": "askculinary_train",
        "upvote_ratio": 0.98,
        "history": f"What about {i}?",
        "c_root_id_A": "hkh25sc",
        "c_root_id_B": "hkh25lp",
        "created_at_utc_A": 1636822112,
        "created_at_utc_B": 1636822110,
        "score_A": 340 if label else 166,
        "score_B": 166 if label else 340,
        "human_ref_A": f"Good {i}." if label else f"Bad {i}.",
        "human_ref_B": f"Bad {i}." if label else f"Good {i}.",
        "labels": label,
        "seconds_difference": 2.0,
        "score_ratio": 340 / 166,
    }


def safe_rlhf(i):
    better = i % 2
    return {
        "prompt": f"What about {i}?",
        "response_0": f"Bad {i}." if better else f"Good {i}.",
        "response_1": f"Good {i}." if better else f"Bad {i}.",
        "prompt_source": "Alpaca3-70B",
        "response_0_source": "Alpaca3-8B",
        "response_1_source": "Alpaca2-7B",
        "is_response_0_safe": True,
        "is_response_1_safe": True,
        "response_0_harm_category": {"Animal Abuse": False},
        "response_1_harm_category": {"Animal Abuse": False},
        "response_0_severity_level": 0,
        "response_1_severity_level": 0,
        "better_response_id": better,
        "safer_response_id": 1 - better,
        "response_0_sha256": "00",
        "response_1_sha256": "11",
    }


def alpaca_eval(i):
    model_wins = i % 2
    return {
        "instruction": f"What about {i}?",
        "output_1": f"Bad {i}." if model_wins else f"Good {i}.",
        "generator_1": "gpt4_1106_preview",
        "dataset": "helpful_base",
        "output_2": f"Good {i}." if model_wins else f"Bad {i}.",
        "generator_2": "m",
        "annotator": "weighted_alpaca_eval_gpt4_turbo",
        "preference": 1.9 if model_wins else 1.1,
        "price_per_example": 0.01,
        "time_per_example": 0.5,
        "raw_completion": {"logprobs": None},
    }


# source -> (row, ending of its files, format that is found, conversational, columns besides)
SOURCES = {
    "Anthropic HH": (hh, ".jsonl.gz", "hh", True, set()),
    "TL;DR of N+": (n_plus, ".parquet", "tldr", False, {"batch", "chosen_policy", "rejected_policy"}),
    "TL;DR of TRL": (tldr_of_trl, ".parquet", "pairs", False, set()),
    "UltraFeedback binarized": (ultrafeedback, ".parquet", "pairs", True, {"chosen_score", "rejected_score"}),
    "SHP": (shp, ".jsonl", "shp", False, {"chosen_score", "rejected_score"}),
    "PKU-SafeRLHF": (safe_rlhf, ".jsonl", "safe_rlhf", False, set()),
    "AlpacaEval": (alpaca_eval, ".json", "alpaca_eval", False, {"chosen_score", "rejected_score"}),
}


def write(folder, row, ending):
    rows = [row(i) for i in range(N)]
    path = folder / f"pairs{ending}"
    if ending == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif ending == ".json":
        path.write_text(json.dumps(rows))
    else:
        lines = "".join(json.dumps(item) + "\n" for item in rows).encode()
        path.write_bytes(gzip.compress(lines) if ending.endswith(".gz") else lines)
    return path


def text(value):
    return value if isinstance(value, str) else value[-1]["content"]


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_in_the_sources_real_shape(name, tmp_path, byte_model, plain_model, capsys):
    row, ending, format, conversational, more = SOURCES[name]
    path = write(tmp_path, row, ending)
    assert main([str(path), "--json"]) == 0
    inspected = json.loads(capsys.readouterr().out)
    assert (inspected["format"], inspected["rows"], inspected["pairs"]) == (format, N, N)
    assert inspected["problems"] == {}
    model = byte_model if conversational else plain_model
    folder = given(tmp_path, model, path=str(path), test_fraction=0.2, heldout_fraction=0.2)
    figures, _ = steps(folder)
    assert figures["train_pairs"] + figures["test_pairs"] + figures["heldout_prompts"] == N
    assert figures["problems"] == {}
    train = read_parquet(folder / "pairs" / "train.parquet")
    assert set(train.column_names) == {"prompt", "chosen", "rejected", "prompt_id", "pair_id", *more}
    for pair in train:
        assert isinstance(pair["prompt"], list) == conversational
        number = text(pair["prompt"]).split("What about ")[1].split("?")[0]
        assert text(pair["chosen"]).strip() == f"Good {number}."
        assert text(pair["rejected"]).strip() == f"Bad {number}."
        if "chosen_score" in more:
            assert pair["chosen_score"] > pair["rejected_score"]


def test_imdb_texts_become_prefixes(tmp_path):
    """`stanfordnlp/imdb`: columns text and label, line breaks as HTML."""
    rows = [{"text": f"Film {i} was long<br /><br />and good in all its parts.", "label": i % 2} for i in range(40)]
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    data = {
        "source": "rejection",
        "prompts_path": str(tmp_path / "train.parquet"),
        "prefix_words": [2, 8],
        **{"train_prompts": 20, "test_prompts": 5, "heldout_prompts": 5, "sft_examples": 30},
        "gold": "ppo_vs_dpo.preferences.testbed.gold:gold_reward",
    }
    folder = make_run(tmp_path / "run", data)
    run_here(folder, "data")
    assert read_json(folder / "data" / "done.json")["figures"]["train_prompts"] == 20
    for row in read_parquet(folder / "data" / "sft_train.parquet"):
        assert 2 <= len(row["prompt"].split()) <= 8
        whole = row["prompt"] + row["completion"]
        assert whole.startswith("Film ")
        assert whole.endswith(" was long and good in all its parts.")


@pytest.mark.real_data
def test_real_hh_dialogues(tmp_path, byte_model, real_data):
    path = real_data / "hh_rlhf" / "harmless_base.jsonl.gz"
    folder = given(tmp_path, byte_model, path=str(path), format="hh", conversational=True)
    figures, _ = steps(folder)
    report = read_json(folder / "data" / "report.json")
    assert report["rows"] == 1812
    assert figures["train_pairs"] + figures["test_pairs"] + figures["heldout_pairs"] > 1700
    assert all(found["policy"] == "drop" or kind == "contradiction" for kind, found in report["problems"].items())
    train = read_parquet(folder / "pairs" / "train.parquet")
    for row in train:
        roles = [message["role"] for message in row["prompt"]]
        assert roles[-1] == "user"
        assert all(a != b for a, b in itertools.pairwise(roles))
        assert [message["role"] for message in row["chosen"] + row["rejected"]] == ["assistant"] * 2
    # The original text comes back from the messages.
    with gzip.open(path, "rt") as lines:
        originals = {" ".join(json.loads(line)["chosen"].split()) for line in lines}
    whole = [
        "".join(
            f"\n\n{'Human' if m['role'] == 'user' else 'Assistant'}: {m['content']}"
            for m in row["prompt"] + row["chosen"]
        )
        for row in train
    ]
    assert sum(" ".join(text.split()) in originals for text in whole) > 0.99 * len(train)


@pytest.mark.real_data
def test_real_alpaca_eval_annotations(tmp_path, plain_model, real_data):
    path = real_data / "alpaca_eval" / "alpaca-7b.json.gz"
    folder = given(tmp_path, plain_model, path=str(path))
    figures, _ = steps(folder)
    report = read_json(folder / "data" / "report.json")
    assert report["format"] == "alpaca_eval"
    assert report["rows"] == 805
    kept = figures["train_pairs"] + figures["test_pairs"] + figures["heldout_pairs"]
    assert kept + sum(report["filtered"].values()) + sum(figures["problems"].values()) == 805
    # GPT-4 Turbo's answers are longer and win: length alone explains most of it.
    assert report["statistics"]["length_rule"]["longer_is_chosen"] > 0.8
