"""Bai et al. 2022b: constitutional AI, with a critic and a judge that are programs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats
from scipy.special import expit

from ppo_vs_dpo.papers.claims import Report, Statement, figure
from ppo_vs_dpo.papers.paper import Paper
from ppo_vs_dpo.preferences.constitution.asking import draw_principle, preference_log_odds, question, soft_label
from ppo_vs_dpo.preferences.constitution.endpoints import Request
from ppo_vs_dpo.preferences.constitution.principles import load_constitution
from ppo_vs_dpo.preferences.schema import prompt_id
from ppo_vs_dpo.preferences.testbed.gold import gold_reward
from ppo_vs_dpo.preferences.testbed.grammar import reviews
from ppo_vs_dpo.preferences.testbed.reviewer import Judge, mend, violations

PLACE = "Bai et al. 2022b (2212.08073)"


def simulate(seed: int, settings: dict[str, Any]) -> Report:
    """Rounds of critique and revision, and labels of a biased judge, on reviews of the testbed."""
    principles = load_constitution("testbed")
    written = list(reviews(seed, settings["reviews"]))
    texts = [text for _, text in written]
    broken, gold, drawn = [], [], []
    for number in range(settings["rounds"] + 1):
        counts = np.array([sum(violations(text).values()) for text in texts], dtype=float)
        broken.append(counts)
        gold.append(float(np.mean(gold_reward([prompt for prompt, _ in written], texts))))
        chosen = [draw_principle(principles, seed, prompt_id(p), "revision", number).id for p, _ in written]
        drawn += chosen
        texts = [mend(text, principle) for text, principle in zip(texts, chosen, strict=True)]
    names = [one.id for one in principles]
    steps = np.diff(np.array(broken), axis=0)
    means = [float(counts.mean()) for counts in broken]
    figures = {
        "most added": float(steps.max()),
        "share left": means[-1] / means[0],
        "gold gain": gold[-1] - gold[0],
        "draws p": float(stats.chisquare([drawn.count(name) for name in names]).pvalue),
        **_labels(written, principles[0], seed, settings),
    }
    return {"seed": seed, "figures": figures, "curves": {"violations": means, "gold": gold}}


def _labels(written: list[tuple[str, str]], principle: Any, seed: int, settings: dict[str, Any]) -> dict[str, float]:
    """What a judge that likes (A) says in both orders, put together as this project does and by the naive mean."""
    rng = np.random.default_rng(seed)
    judge = Judge(bias=settings["bias"])
    asked, truth = [], []
    for prompt, text in written[: settings["pairs"]]:
        other = written[int(rng.integers(len(written)))][1]
        values = gold_reward([prompt, prompt], [text, other])
        truth.append(values[0] - values[1])
        for first, second in ((text, other), (other, text)):
            asked.append(Request(question(prompt, principle, first, second), seed))
    answers = [log_odds for _, log_odds in judge.choose(asked)]
    pairs = list(zip(answers[::2], answers[1::2], strict=True))
    mended = np.array([preference_log_odds(*pair) for pair in pairs])
    naive = np.array([(expit(a) + 1 - expit(b)) / 2 for a, b in pairs])
    labels = np.array([soft_label(value, settings["clamp"]) for value in mended])
    return {
        "bias left": float(np.abs(mended - np.array(truth)).max()),
        "naive error": float(np.abs(naive - expit(np.array(truth))).max()),
        "largest label": float(labels.max()),
        "smallest label": float(labels.min()),
    }


def draw(axes: Any, reports: Sequence[Report]) -> None:
    """Violations a review over the rounds."""
    for report in reports:
        axes.plot(report["curves"]["violations"], "o-", color="#0072B2", alpha=0.6, label="violations")
    axes.set(xlabel="rounds of critique and revision", ylabel="violations of principles in a review, mean")


PAPER = Paper(
    name="cai2022",
    title="Bai et al. 2022b: Constitutional AI: harmlessness from AI feedback (2212.08073)",
    question="Do critiques, revisions and an AI's choices by written principles take the place of people's labels?",
    takes="the paper's 52B model was never released; the open recipe is Mistral-7B, planned on 8 GPUs of 80 GB",
    world="reviews of the testbed, principles that a program checks, a critic that mends one thing, a judge that goes "
    "by the known reward and likes what stands first",
    simulate=simulate,
    draw=draw,
    published=(
        ("principles for critiques; for AI feedback", "16; 16", f"{PLACE} [C]"),
        ("rounds of revision", "4", f"{PLACE} [C]"),
        ("red-team prompts; revisions", "182,831; about 731,000", f"{PLACE} [S]"),
        ("labels after a chain of thought, clamped to", "40-60 %", f"{PLACE} [S]"),
    ),
    unknown=("the helpful-only model", "the preference model's and PPO's learning rates"),
    explanations={
        "After four rounds nearly nothing is left": (
            "each round draws one of three principles and mends one violation of it, if there is one; reviews with "
            "several violations need more rounds than four"
        ),
    },
    statements=(
        Statement(
            "A revision never adds a violation",
            f"{PLACE}: harmlessness rises with every revision [S]",
            "rises",
            "most violations that one revision of one review added",
            figure("most added"),
            most=0.0,
            always=True,
        ),
        Statement(
            "After four rounds nearly nothing is left",
            f"{PLACE}: four rounds [C]",
            "small gains after the first rounds",
            "violations after four rounds as a share of those before",
            figure("share left"),
            most=0.1,
        ),
        Statement(
            "Revisions are better by the true reward",
            f"{PLACE} [S]",
            "more harmless",
            "gold after four rounds less before",
            figure("gold gain"),
            least=0.0,
        ),
        Statement(
            "Each principle is drawn equally often",
            f"{PLACE}: one at random at each step [C]",
            "uniform",
            "p of the chi-square test, the least seed",
            figure("draws p"),
            least=0.001,
            always=True,
        ),
        Statement(
            "Judging both orders removes a liking for what stands first, exactly",
            "averaged in log-odds; this project's form of the paper's normalised choice",
            "exact",
            "largest distance of the label's log-odds from the judge's without bias",
            figure("bias left"),
            most=1e-9,
            always=True,
        ),
        Statement(
            "... which averaging probabilities does not",
            "arithmetic",
            "a rest",
            "largest distance of the averaged probability from the judge's without bias",
            figure("naive error"),
            least=0.01,
            always=True,
        ),
        Statement(
            "Clamped labels lie within 40-60 %",
            f"{PLACE}, section 4.1",
            ".4 to .6",
            "largest soft label",
            figure("largest label"),
            least=0.5,
            most=0.6,
            always=True,
        ),
    ),
)
