"""The written world: a probabilistic grammar of short reviews.

A review is an opening sentence (the prompt) and a continuation (the completion)::

    My sister tried the camera last week. The lens was really good, but the price was awful. I would avoid it.

The opening says who tried what and when, and holds no word of the sentiment lexicon. The continuation has one to three
judgements on aspects that such a thing has, sometimes a neutral remark, sometimes a closing. How well the writer liked
the thing is a hidden number of the review, so the judgements of one review agree more than chance.

Every opening ends with the only full stop in it. So no prompt is the beginning of another, and prompts can be split
disjointly (:func:`split_of`) such that no training text starts with a held-out prompt.
"""

import functools
import itertools
import random
from collections.abc import Iterator

from ppo_vs_dpo.preferences.schema import prompt_id

# --- the sentiment lexicon: weight of each word ------------------------------------------------------------------
ADJECTIVES = {
    +2.0: "wonderful brilliant superb excellent delightful perfect",
    +1.0: "good nice pleasant charming solid clever",
    -1.0: "dull weak clumsy bland messy odd",
    -2.0: "terrible awful dreadful horrible useless hideous",
}
VERBS = {+1.5: "loved adored enjoyed admired", -1.5: "hated despised disliked regretted"}
VERDICTS = {+1.0: "recommend", -1.0: "avoid"}
LEXICON: dict[str, float] = {
    word: weight
    for table in (ADJECTIVES, VERBS, VERDICTS)
    for weight, words in table.items()
    for word in words.split()
}
# What a word before a lexicon word does to its weight.
DEGREES = {"very": 1.4, "really": 1.4, "truly": 1.4, "fairly": 0.6, "rather": 0.6, "slightly": 0.6, "not": -0.6}

# --- things, and the aspects a thing of that kind has -------------------------------------------------------------
KINDS = {
    "story": ("film|novel|series|musical", "plot|ending|cast|dialogue|music"),
    "device": ("phone|camera|laptop|radio", "battery|screen|sound|lens|cable"),
    "place": ("hotel|cafe|museum|spa", "staff|garden|view|room|breakfast"),
    "garment": ("jacket|coat|scarf|backpack", "fabric|zip|colour|fit|lining"),
}
SHARED_ASPECTS = ("price", "quality", "design")
ASPECTS_OF: dict[str, frozenset[str]] = {
    thing: frozenset(aspects.split("|")) | frozenset(SHARED_ASPECTS)
    for things, aspects in KINDS.values()
    for thing in things.split("|")
}
ASPECTS = tuple(sorted(frozenset().union(*ASPECTS_OF.values())))

# --- slots: alternatives are separated by "|" and may have several words ------------------------------------------
SLOTS = {
    "person": "I|we|my sister|my brother|our neighbour|my uncle|a colleague|my parents|our teacher|my cousin",
    "tried": "tried|chose|found|discovered|picked",
    "heard": "heard|read|learned",
    "thing": "|".join(ASPECTS_OF),
    "when": "last week|last month|in March|in June|on Sunday|over the holidays|two years ago|this spring|yesterday"
    "|after work|on a rainy day|during the break",
    "source": "a friend|my dentist|the news|a magazine|a letter|a blog|my boss",
    "company": "with my family|with two friends|on my own|with the kids|for my birthday|for a trip|as a gift",
    "ordinal": "first|second|third|fourth|fifth",
    "judge": "I|we|the kids|my friends|everyone",
    "aspect": "|".join(ASPECTS),
    "degree": "very|really|truly|fairly|rather|slightly",
    "adjective": "|".join(" ".join(ADJECTIVES.values()).split()),
    "opposite": "|".join(" ".join(ADJECTIVES.values()).split()),  # an adjective of the other polarity, after "not"
    "verb": "|".join(" ".join(VERBS.values()).split()),
    "verdict": "|".join(VERDICTS.values()),
    "number": "two|three|four|five|six",
    "audience": "anyone|my friends|families|beginners",
}
OPENINGS = (
    "{person} {tried} the {thing} {when}",
    "{when} , {person} {tried} the {thing}",
    "{person} {heard} about the {thing} from {source} {when}",
    "{person} {tried} the {thing} {company} {when}",
    "this was the {ordinal} {thing} {person} {tried} {when}",
)
JUDGEMENTS = (
    "the {aspect} was {adjective}",
    "the {aspect} was {degree} {adjective}",
    "the {aspect} was not {opposite}",
    "{judge} {verb} the {aspect}",
    "the {aspect} felt {adjective}",
    "the {aspect} looked {degree} {adjective}",
    "it was {adjective} and {adjective}",
)
REMARKS = (
    "it rained that day",
    "it took {number} hours",
    "there were {number} of us",
    "we paid by card",
    "{judge} talked about it",
)
CLOSINGS = ("I would {verdict} it", "I {verdict} it to {audience}", "I would {verdict} it to {audience}")
# "and" joins judgements of one polarity, "but" those of two.
JOINS = {True: ", and", False: ", but"}

# How well the writer likes the thing: the chance that a judgement is a good one.
LIKING = (0.85, 0.5, 0.5, 0.15)
JUDGEMENT_COUNTS = (1, 2, 2, 3)
REMARK_RATE, CLOSING_RATE, JOIN_RATE = 0.35, 0.45, 0.5

# Shares of the prompt space (in percent of the hash range) that are kept from training.
HELDOUT_PERCENT, TEST_PERCENT = 15, 15


def spell(words: list[str]) -> str:
    """Words and punctuation as text: ``["it", "was", "fun", "."]`` -> ``"It was fun."`` (sentences capitalised)."""
    text, start = "", True
    for word in words:
        if word in ".,":
            text += word
        else:
            text += (" " if text else "") + (word[0].upper() + word[1:] if start else word)
        start = word == "."
    return text


def split_of(prompt: str) -> str:
    """``"heldout"``, ``"test"`` or ``"train"``: a function of the prompt's text alone, so splits never share one."""
    bucket = int(prompt_id(prompt), 16) % 100
    if bucket < HELDOUT_PERCENT:
        return "heldout"
    return "test" if bucket < HELDOUT_PERCENT + TEST_PERCENT else "train"


def thing_of(prompt: str) -> str | None:
    """What a prompt is about (``"camera"``), or ``None`` where it names none of the grammar's things."""
    return next((word for word in prompt.rstrip(".").replace(",", "").split() if word in ASPECTS_OF), None)


def _polar(rng: random.Random, table: dict[float, str], good: bool) -> str:
    return rng.choice(" ".join(words for weight, words in table.items() if (weight > 0) == good).split())


def _fill(rng: random.Random, template: str, thing: str, good: bool, used: set[str]) -> list[str]:
    """One sentence's words. ``used`` holds the aspects and adjectives that the review has had."""
    words: list[str] = []
    for item in template.split():
        slot = item.strip("{}")
        if slot == item:
            words.append(item)
            continue
        if slot == "thing":
            choice = thing
        elif slot == "aspect":
            choice = rng.choice(sorted(ASPECTS_OF[thing] - used))
        elif slot in ("adjective", "opposite"):
            side = good if slot == "adjective" else not good
            choice = _polar(rng, ADJECTIVES, side)
            while choice in used:
                choice = _polar(rng, ADJECTIVES, side)
        elif slot == "verb":
            choice = _polar(rng, VERBS, good)
        elif slot == "verdict":
            choice = _polar(rng, VERDICTS, good)
        else:
            choice = rng.choice(SLOTS[slot].split("|"))
        if slot in ("aspect", "adjective", "opposite"):
            used.add(choice)
        words += choice.split()
    return words


def sample_prompt(rng: random.Random, split: str | None = None) -> str:
    """An opening, from one split only where ``split`` is given (by rejection)."""
    while True:
        thing = rng.choice(sorted(ASPECTS_OF))
        prompt = spell([*_fill(rng, rng.choice(OPENINGS), thing, True, set()), "."])
        if split is None or split_of(prompt) == split:
            return prompt


def sample_completion(rng: random.Random, prompt: str) -> str:
    """A continuation of a prompt, starting with a space."""
    thing = thing_of(prompt) or rng.choice(sorted(ASPECTS_OF))
    liking, used = rng.choice(LIKING), set()
    words: list[str] = []
    previous = None
    for _ in range(rng.choice(JUDGEMENT_COUNTS)):
        good = rng.random() < liking
        sentence = _fill(rng, rng.choice(JUDGEMENTS), thing, good, used)
        if previous is not None and rng.random() < JOIN_RATE:
            words[-1:] = JOINS[good == previous].split()
        words += [*sentence, "."]
        previous = good
    if rng.random() < REMARK_RATE:
        words += [*_fill(rng, rng.choice(REMARKS), thing, True, used), "."]
    if rng.random() < CLOSING_RATE:
        words += [*_fill(rng, rng.choice(CLOSINGS), thing, rng.random() < liking, used), "."]
    return " " + spell(words)


def distinct_prompts(seed: int, split: str, count: int) -> list[str]:
    """``count`` different prompts of a split, the same for the same seed."""
    rng = random.Random(f"prompts-{split}-{seed}")
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompts[sample_prompt(rng, split)] = None
    return list(prompts)


def reviews(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """``count`` reviews as (prompt, completion), all prompts from the training split and all different."""
    rng = random.Random(f"reviews-{seed}")
    for prompt in distinct_prompts(seed, "train", count):
        yield prompt, sample_completion(rng, prompt)


def _alternatives(item: str) -> list[tuple[str, ...]]:
    slot = item.strip("{}")
    return [(item,)] if slot == item else [tuple(choice.split()) for choice in SLOTS[slot].split("|")]


@functools.cache
def legal_pairs() -> frozenset[tuple[str, str]]:
    """All neighbouring words (lower case but for names and "I") that the grammar can write; ``</s>`` is the end.

    Exact, from the templates: the ends of one slot's alternatives against the beginnings of the next one's.
    """
    pairs: set[tuple[str, str]] = {(".", "</s>")}
    continuations = JUDGEMENTS + REMARKS + CLOSINGS
    for template in OPENINGS + continuations:
        slots = [_alternatives(item) for item in template.split()] + [[(".",)]]
        for alternatives in slots:
            pairs.update(pair for choice in alternatives for pair in itertools.pairwise(choice))
        for left, right in itertools.pairwise(slots):
            pairs.update((a[-1], b[0]) for a in left for b in right)
    firsts = [choice[0] for template in continuations for choice in _alternatives(template.split()[0])]
    pairs.update((".", word) for word in firsts)
    for join in JOINS.values():
        comma, word = join.split()
        pairs.add((comma, word))
        for template in JUDGEMENTS:
            pairs.update((word, choice[0]) for choice in _alternatives(template.split()[0]))
            pairs.update((choice[-1], comma) for choice in _alternatives(template.split()[-1]))
    return frozenset(pairs)


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """Every token: ``" word"`` inside a text, ``"Word"`` at its beginning, ``" Word"`` after a full stop."""
    sentences = OPENINGS + JUDGEMENTS + REMARKS + CLOSINGS
    items = [item for template in sentences for item in template.split() if item not in ".,"]
    words = {word for item in items for choice in _alternatives(item) for word in choice} | {"and", "but"}
    first = {choice[0] for template in OPENINGS for choice in _alternatives(template.split()[0])}
    later = {choice[0] for template in sentences[len(OPENINGS) :] for choice in _alternatives(template.split()[0])}
    tokens = {f" {word}" for word in words}
    tokens |= {word[0].upper() + word[1:] for word in first}
    tokens |= {f" {word[0].upper()}{word[1:]}" for word in later}
    return tuple(sorted(tokens)) + (".", ",")
