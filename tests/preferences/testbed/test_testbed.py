"""The testbed's world: grammar, splits, tokenizer, gold reward, labels."""

import itertools
import math
import random

import numpy as np
import pytest
from transformers import AutoTokenizer

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.preferences.recipes.bradley_terry import (
    accuracy_ceiling,
    draw_labels,
    expected_accuracy,
    label_entropy,
    preference_probability,
)
from ppo_vs_dpo.preferences.recipes.named import load_gold
from ppo_vs_dpo.preferences.testbed import gold, grammar
from ppo_vs_dpo.preferences.testbed.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def reviews():
    return list(grammar.reviews(seed=3, count=4000))


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_prompts_hold_no_lexicon_word_and_end_with_their_only_full_stop(reviews):
    for prompt, _ in reviews:
        words = gold.words_of(prompt)
        assert not set(words) & set(grammar.LEXICON)
        assert words.count(".") == 1
        assert prompt.endswith(".")
        assert grammar.thing_of(prompt) in grammar.ASPECTS_OF


def test_completions_start_with_a_space_and_carry_sentiment(reviews):
    assert all(completion.startswith(" ") and completion[1].isupper() for _, completion in reviews)
    assert all(set(gold.words_of(completion)) & set(grammar.LEXICON) for _, completion in reviews)


def test_the_prompt_space_is_rich_enough_and_the_splits_are_disjoint():
    train = grammar.distinct_prompts(0, "train", 12_000)
    heldout = grammar.distinct_prompts(0, "heldout", 2_048)
    test = grammar.distinct_prompts(0, "test", 3_000)
    assert len(set(train)) == 12_000
    assert len(set(heldout)) == 2_048
    assert not set(train) & set(heldout)
    assert not set(test) & (set(train) | set(heldout))


def test_no_training_text_starts_with_a_heldout_prompt_of_any_seed(reviews):
    heldout = {prompt for seed in range(3) for prompt in grammar.distinct_prompts(seed, "heldout", 1024)}
    lengths = {len(prompt) for prompt in heldout}
    for prompt, completion in reviews:
        text = prompt + completion
        assert not any(text[:length] in heldout for length in lengths)


def test_the_same_seed_writes_the_same_world():
    assert list(grammar.reviews(5, 50)) == list(grammar.reviews(5, 50))
    assert list(grammar.reviews(5, 50)) != list(grammar.reviews(6, 50))


def test_judgements_of_one_review_agree_more_than_chance(reviews):
    """The hidden liking is .85, .5, .5, .15: two judgements agree with probability mean(p^2 + (1-p)^2) = .6225."""
    joined = [words for _, text in reviews for words in [text.split()]]
    # "and" joins judgements of one polarity, "but" those of two, both at the same rate.
    both = [word for words in joined for left, word in itertools.pairwise(words) if left.endswith(",")]
    share = both.count("and") / len(both)
    expected = np.mean([p**2 + (1 - p) ** 2 for p in grammar.LIKING])
    assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / len(both)))


def test_legal_pairs_are_exactly_what_the_grammar_writes():
    """Sampling finds nothing illegal, and in the long run nearly everything legal."""
    seen = set()
    for prompt, completion in grammar.reviews(11, 15_000):
        words = [".", *gold.words_of(completion), "</s>"]
        seen.update(itertools.pairwise(words))
        opening = gold.words_of(prompt)
        seen.update(itertools.pairwise(opening))
    legal = grammar.legal_pairs()
    assert seen <= legal
    assert len(seen) > 0.9 * len(legal)
    assert ("the", "was") not in legal
    assert ("wonderful", "wonderful") not in legal


def test_tokens_of_prompt_and_completion_add_up(reviews, tokenizer):
    for prompt, completion in reviews:
        prompt_ids = tokenizer(prompt)["input_ids"]
        completion_ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
        assert prompt_ids[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in prompt_ids[1:] + completion_ids
        assert tokenizer.unk_token_id not in prompt_ids + completion_ids
        assert tokenizer(prompt + completion)["input_ids"] == prompt_ids + completion_ids
        assert tokenizer.decode(prompt_ids, skip_special_tokens=True) == prompt
        assert tokenizer.decode(completion_ids) == completion


def test_every_token_sequence_survives_decoding_and_encoding(tokenizer, tmp_path):
    """Also what a policy writes when it writes nonsense; and after saving and loading by AutoTokenizer."""
    tokenizer.save_pretrained(tmp_path)
    rng = random.Random(0)
    ordinary = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]
    for loaded in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for _ in range(300):
            ids = [rng.choice(ordinary) for _ in range(40)]
            assert loaded(loaded.decode(ids), add_special_tokens=False)["input_ids"] == ids


def test_special_tokens_are_distinct(tokenizer):
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 4
    assert tokenizer("zebra", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]
    assert 150 < len(tokenizer) < 400


PROMPT = "I tried the camera last week."


@pytest.mark.parametrize(
    ("completion", "finished", "value"),
    [
        # One adjective of weight 2: 3 tanh(2/3).
        (" The lens was superb.", True, 3 * math.tanh(2 / 3)),
        # "very" is worth 1.4, "not" -0.6.
        (" The lens was very superb.", True, 3 * math.tanh(2.8 / 3)),
        (" The lens was not superb.", True, 3 * math.tanh(-1.2 / 3)),
        # A verb and a verdict: 1.5 + 1.
        (" I loved the lens. I would recommend it.", True, 3 * math.tanh(2.5 / 3)),
        # The second "superb" is worth 0.4 of the first, costs 0.7, and "was superb ." comes twice.
        (" The lens was superb. The sound was superb.", True, 3 * math.tanh(2.8 / 3) - 0.7 - 0.5),
        # A camera has no breakfast.
        (" The breakfast was superb.", True, 3 * math.tanh(2 / 3) - 0.4),
        # "superb </s>" is a pair the grammar never ends with.
        (" The lens was superb", True, 3 * math.tanh(2 / 3) - 0.6),
        # Cut off: no end token, so no such pair, but the penalty for not ending.
        (" The lens was superb", False, 3 * math.tanh(2 / 3) - 1.5),
        # ". superb", "superb superb", "superb </s>": three illegal pairs.
        (" superb superb", True, 3 * math.tanh(2.8 / 3) - 3 * 0.6 - 0.7),
        # Nothing at all: ". </s>" is legal.
        ("", True, 0.0),
    ],
)
def test_gold_by_hand(completion, finished, value):
    assert gold.gold_reward([PROMPT], [completion], [finished])[0] == pytest.approx(1.2 * value, abs=1e-12)


def test_gold_counts_tokens_over_the_free_length():
    rain = " It rained that day."
    parts = gold.gold_parts(PROMPT, rain * 6)
    assert parts.extra_tokens == 30 - 24
    assert parts.repeated_triples == 28 - 5
    assert parts.reward == pytest.approx(1.2 * (-0.12 * 6 - 0.5 * 23))


def test_gold_takes_columns_and_assumes_finished():
    assert gold.gold_reward([PROMPT], [" I loved the lens."], prompt_id=["x"]) == gold.gold_reward(
        [PROMPT], [" I loved the lens."], [True]
    )


def test_grammar_reviews_have_no_illegal_pair_and_no_foreign_aspect(reviews):
    parts = [gold.gold_parts(*review) for review in reviews]
    assert sum(p.illegal_pairs + p.foreign_aspects + p.unfinished for p in parts) == 0


def test_bradley_terry_closed_forms():
    # 30 wins to 10 is r1 - r2 = ln 3 (papers.md 3.6.1).
    assert preference_probability([math.log(3)], [0.0])[0] == pytest.approx(0.75, abs=1e-15)
    assert accuracy_ceiling([0.75, 0.25, 0.5]) == pytest.approx((0.75 + 0.75 + 0.5) / 3, abs=1e-15)
    assert expected_accuracy([2.0, 1.0, -3.0, 0.0], [0.75, 0.25, 0.1, 0.9]) == pytest.approx(
        (0.75 + 0.25 + 0.9 + 0.5) / 4, abs=1e-15
    )
    assert label_entropy([0.5]) == pytest.approx(math.log(2), abs=1e-12)
    assert label_entropy([1.0, 0.0]) == pytest.approx(0.0, abs=1e-12)
    # The entropy is the least Bradley-Terry loss: any other margin does worse.
    p, margin = 0.7, np.linspace(-3, 3, 101)
    loss = -p * np.log(preference_probability(margin, 0 * margin)) - (1 - p) * np.log(
        preference_probability(-margin, 0 * margin)
    )
    assert loss.min() >= label_entropy([p])
    assert loss.min() == pytest.approx(label_entropy([p]), abs=1e-3)


def test_labels_are_bernoulli_and_a_model_that_knows_gold_reaches_the_ceiling():
    rng = np.random.default_rng(0)
    p = preference_probability(rng.normal(size=200_000) * 2, np.zeros(200_000))
    labels = draw_labels(p, rng)
    se = math.sqrt((p * (1 - p)).mean() / len(p))
    assert labels.mean() == pytest.approx(p.mean(), abs=4 * se)
    assert ((p > 0.5) == labels).mean() == pytest.approx(accuracy_ceiling(p), abs=4 * se)


@pytest.mark.parametrize("name", ["nowhere:f", "ppo_vs_dpo.preferences.testbed.gold:nothing", "no_colon", ""])
def test_an_unknown_gold_function_is_an_error_that_names_it(name):
    with pytest.raises(UserError, match=r"package\.module:function"):
        load_gold(name)


def test_the_named_gold_function_is_loaded():
    assert load_gold("ppo_vs_dpo.preferences.testbed.gold:gold_reward") is gold.gold_reward
