"""What a reward does not see: diversity, repetition, perplexity under the reference, empty answers, ROUGE."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ppo_vs_dpo.compare.sampling.contenders import Contender

# Self-BLEU compares every completion with all others: quadratic, so on this many.
SELF_BLEU_TEXTS = 100
# ROUGE-L is quadratic in a text's words: of this many texts.
ROUGE_TEXTS = 256


def distinct_n(words: list[list[str]], n: int) -> float:
    """Share of different n-grams among all n-grams of a set of texts (Li et al. 2016); falls with the set's size."""
    grams = [gram for text in words for gram in zip(*(text[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(words: list[str], n: int = 3) -> float:
    """Share of a text's n-grams that stood in it before."""
    grams = list(zip(*(words[i:] for i in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(words: list[list[str]], order: int = 4) -> float:
    """Mean BLEU-4 of each text against all others as references (Zhu et al. 2018): 1 if all are the same.

    Clipped n-gram precisions, geometric mean with add-one smoothing above unigrams (Lin & Och 2004), brevity penalty
    against the nearest reference length. Texts without words are left out.
    """
    words = [text for text in words if text]
    if len(words) < 2:
        return 0.0
    counts = [
        [Counter(zip(*(text[i:] for i in range(n)), strict=False)) for text in words] for n in range(1, order + 1)
    ]
    # For every n-gram the largest and second-largest count over texts: clipping against "all others" in one look-up.
    tops: list[dict[tuple, tuple[int, int, int]]] = []
    for of_order in counts:
        top: dict[tuple, tuple[int, int, int]] = {}
        for number, counter in enumerate(of_order):
            for gram, count in counter.items():
                first, owner, second = top.get(gram, (0, -1, 0))
                top[gram] = (count, number, first) if count > first else (first, owner, max(second, count))
        tops.append(top)
    lengths = np.array([len(text) for text in words])
    scores = []
    for number, text in enumerate(words):
        log_precision = 0.0
        for n, (of_order, top) in enumerate(zip(counts, tops, strict=True), start=1):
            own = of_order[number]
            total = sum(own.values())
            matched = 0
            for gram, count in own.items():
                first, owner, second = top[gram]
                matched += min(count, second if owner == number else first)
            smooth = 0 if n == 1 else 1
            log_precision += math.log((matched + smooth) / (total + smooth)) if matched + smooth else -math.inf
        others = np.delete(lengths, number)
        nearest = others[np.abs(others - len(text)).argmin()]
        brevity = min(1.0, math.exp(1 - nearest / len(text)))
        scores.append(brevity * math.exp(log_precision / order))
    return float(np.mean(scores))


def rouge_l(texts: Sequence[str], answers: Sequence[str | None]) -> float | None:
    """Mean ROUGE-L F1 (Lin 2004) of texts against the answers to the same prompts; ``None`` where no answer is known.

    By `rouge_score`, as `evaluate`'s metric of that name has it: without stemming, over words of a-z and 0-9.
    """
    known = [(text, answer) for text, answer in zip(texts, answers, strict=True) if answer is not None][:ROUGE_TEXTS]
    if not known:
        return None
    from rouge_score.rouge_scorer import RougeScorer  # it imports nltk

    scorer = RougeScorer(["rougeL"])
    return float(np.mean([scorer.score(answer, text)["rougeL"].fmeasure for text, answer in known]))


def quality(contender: Contender, columns: np.ndarray, answers: Sequence[str | None]) -> dict[str, float | None]:
    """Figures of one completion a prompt.

    ``columns`` ``(P,)`` say which draw of each prompt is read, ``answers`` are ``P`` chosen answers of held-out
    pairs.
    """
    draws = contender.draws
    per = draws.shape[1]
    texts = [draws.texts[row * per + column] for row, column in enumerate(columns)]
    words = [text.split() for text in texts]
    rows = np.arange(len(texts))
    reference = draws.measures["reference_logprob"][rows, columns]
    tokens = draws.tokens[rows, columns]
    known = np.isfinite(reference)
    return {
        "distinct_1": distinct_n(words, 1),
        "distinct_2": distinct_n(words, 2),
        "self_bleu": self_bleu(words[:SELF_BLEU_TEXTS]),
        "repetition": float(np.mean([repetition(text) for text in words])),
        "perplexity_under_reference": float(np.exp(-reference[known].sum() / tokens[known].sum()))
        if known.all() and tokens.sum()
        else None,
        "empty_rate": float(np.mean([not text.strip() for text in texts])),
        "rouge_l": rouge_l(texts, answers),
    }
