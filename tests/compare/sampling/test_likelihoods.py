"""Held-out answers under a policy: likelihoods by plain transformers, the implicit reward's accuracy, ROUGE-L."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.stats import binomtest

from ppo_vs_dpo.artifacts.files import write_parquet
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.compare.sampling import kl
from ppo_vs_dpo.compare.sampling.kl import agreement_with_labels, on_heldout_pairs
from ppo_vs_dpo.compare.sampling.policies import heldout_prompts
from ppo_vs_dpo.compare.sampling.quality import rouge_l
from ppo_vs_dpo.models.text.encoding import encode_prompts
from ppo_vs_dpo.models.text.prompts import encode_completion

PROMPTS = ["the film was", "a story", "one more"]
ANSWERS = ["good", "bad and long", "fine , I think", "never again"]


@pytest.fixture(scope="module")
def known(word_tokenizer):
    from tests.compare.helpers import small_model

    policy, reference = (small_model(word_tokenizer, seed=s, initializer_range=0.3).double() for s in (1, 2))
    pairs = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for prompt in PROMPTS
        for chosen, rejected in itertools.combinations(ANSWERS, 2)
    ]
    return policy, SimpleNamespace(model=reference, tokenizer=word_tokenizer, pairs=pairs, likelihoods={})


def loglikelihood(model, tokenizer, prompt, answer):
    """Plain transformers: one row, no padding."""
    prompt_ids, ids = encode_prompts(tokenizer, [prompt])[0], encode_completion(tokenizer, answer)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
    return logits.log_softmax(-1)[range(len(ids)), ids].sum().item(), len(ids)


def test_likelihoods_are_those_of_plain_transformers(known):
    policy, reference = known
    found = on_heldout_pairs(policy, reference, seed=3)
    under = {
        (name, side): np.array(
            [loglikelihood(model, reference.tokenizer, pair["prompt"], pair[side]) for pair in reference.pairs]
        )
        for name, model in (("policy", policy), ("reference", reference.model))
        for side in ("chosen", "rejected")
    }
    moved = {side: under["policy", side][:, 0] - under["reference", side][:, 0] for side in ("chosen", "rejected")}
    total, tokens = under["policy", "chosen"].sum(axis=0)
    right = moved["chosen"] > moved["rejected"]
    assert found["n_pairs"] == len(reference.pairs) == 18
    assert found["chosen"] == pytest.approx(moved["chosen"].mean(), abs=1e-6)
    assert found["rejected"] == pytest.approx(moved["rejected"].mean(), abs=1e-6)
    assert found["rejected_reference"] == pytest.approx(under["reference", "rejected"][:, 0].mean(), abs=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(-total / tokens), rel=1e-6)
    assert found["implicit_reward"]["accuracy"] == right.mean() != 0.5


def test_the_reference_implies_no_reward(known):
    found = on_heldout_pairs(known[1].model, known[1], seed=3)
    assert found["implicit_reward"] is None
    assert found["chosen"] == 0
    assert found["perplexity"] > 1


def test_the_reference_reads_them_once(known, monkeypatch):
    policy, reference = known
    fresh = SimpleNamespace(**{**vars(reference), "likelihoods": {}})
    read = []
    passes = kl.sequence_logprobs
    monkeypatch.setattr(kl, "sequence_logprobs", lambda model, *rest: read.append(model) or passes(model, *rest))
    first, again = (on_heldout_pairs(policy, fresh, seed=3) for _ in range(2))
    assert first == again
    assert (read.count(reference.model), read.count(policy)) == (2, 4)
    # Another seed picks other pairs.
    on_heldout_pairs(fresh.model, fresh, seed=4)
    assert read.count(reference.model) == 4


def test_dialogues_and_no_pairs(known):
    policy, reference = known
    turns = [{"role": role, "content": "a"} for role in ("assistant", "user", "assistant")]
    several = [{"prompt": "a", "chosen": turns, "rejected": "b"}]
    empty = SimpleNamespace(model=reference.model, tokenizer=reference.tokenizer, pairs=several, likelihoods={})
    assert on_heldout_pairs(policy, empty, seed=1) is None


def test_agreement_with_labels():
    found = agreement_with_labels(7, 10)
    assert found["accuracy"] == 0.7
    assert found["ci"] == pytest.approx(list(binomtest(7, 10).proportion_ci(method="wilson")))
    assert agreement_with_labels(0, 0)["accuracy"] is None


def test_rouge_l_by_hand():
    """Longest common subsequence of 4 words: precision 4/5, recall 4/6, F1 8/11; a text without an answer is out."""
    text, answer = "the cat sat on mats", "the black cat sat on it"
    assert rouge_l([text, "x"], [answer, None]) == pytest.approx(8 / 11)
    assert rouge_l([text, text], [answer, text]) == pytest.approx((8 / 11 + 1) / 2)
    assert rouge_l([text], [None]) is None


def test_answers_come_with_their_prompts(tmp_path):
    """The split keeps the chosen answer beside a held-out prompt, as text or as messages."""
    (tmp_path / "config.yaml").write_text("{}")
    said = [{"role": "assistant", "content": "hello"}]
    for answers, texts in (([said, None, said], ["hello", None, "hello"]), (["a", "b", None], ["a", "b", None])):
        table = Dataset.from_dict({"prompt": ["p", "q", "r"], "reference": answers})
        write_parquet(tmp_path / "data" / "prompts_heldout.parquet", table)
        assert heldout_prompts(RunFolder(tmp_path), 3).answers == texts
    write_parquet(tmp_path / "data" / "prompts_heldout.parquet", table.remove_columns("reference"))
    assert heldout_prompts(RunFolder(tmp_path), 2).answers == [None, None]
