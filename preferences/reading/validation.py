"""What can be wrong with preference data: found in one pass, counted, shown with examples, treated as configured."""

import unicodedata
from array import array
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np

from ppo_vs_dpo.artifacts.errors import Complaint, UserError
from ppo_vs_dpo.artifacts.settings import nearest
from ppo_vs_dpo.preferences.reading.mappings.columns import as_setting
from ppo_vs_dpo.preferences.schema import OPTIONAL, OPTIONAL_NUMBERS, Text, make_pair, pair_id, text_of


@dataclass(frozen=True)
class Problem:
    """A kind of problem: what it is in words, what is done about it unless told, and whether rows can be kept."""

    words: str
    default: str
    may_keep: bool = False


PROBLEMS: dict[str, Problem] = {
    "broken_file": Problem("a file that ends in the middle or is damaged", "error"),
    "broken_json": Problem("a line that is not JSON", "error"),
    "broken_utf8": Problem("bytes that are not UTF-8", "error"),
    "missing_field": Problem("a field that is missing or null", "error"),
    "wrong_type": Problem("a field of the wrong type or form", "error"),
    "twice": Problem("two fields of one name, of which one would be lost", "error"),
    "unread": Problem("text that belongs to the prompt, in a column that is not read", "error"),
    "not_text": Problem("tool calls, tools, reasoning beside the answer, images: not carried as they are", "error"),
    "not_assistant": Problem("an answer that does not begin and end with the assistant's words", "error"),
    "marks": Problem("the model's own marks (BOS, EOS, turns) inside a text", "error", may_keep=True),
    "template": Problem("a conversation that the chat template refuses or leaves words of out", "error"),
    "repeated": Problem("a short prompt with which both answers begin: repeated, or not?", "drop"),
    "scores": Problem("the rejected answer has the higher score", "keep", may_keep=True),
    "prompt_mismatch": Problem("the two sides answer different prompts", "drop"),
    "several_turns": Problem(
        "answers of several turns: trained on the assistant's words alone", "keep", may_keep=True
    ),
    "empty": Problem("an empty prompt or response", "drop"),
    "equal": Problem("chosen and rejected are the same", "drop", may_keep=True),
    "duplicate": Problem("the same pair again", "drop", may_keep=True),
    "contradiction": Problem("A over B and B over A", "keep", may_keep=True),
    "leakage": Problem("a training prompt that the test split has too", "drop", may_keep=True),
    "truncated": Problem("longer than the token limits, so cut when trained on", "keep", may_keep=True),
}
# Half a data set must never pass for a whole one.
ALWAYS_FATAL = frozenset({"broken_file"})
EXAMPLES = 5
POLICIES = ("error", "drop", "keep")
# Of a 95 % interval.
QUANTILE = NormalDist().inv_cdf(0.975)


def policies(configured: dict[str, str] | None = None) -> dict[str, str]:
    """What is done about each kind of problem: the defaults with ``configured`` over them.

    Raises:
        UserError: an unknown kind or policy, or one that is not possible (a broken line cannot be kept).
    """
    result = {kind: problem.default for kind, problem in PROBLEMS.items()}
    wrong = []
    for kind, policy in (configured or {}).items():
        if kind not in PROBLEMS:
            wrong.append(f"data.on_problem.{kind}: no such problem.{nearest(kind, list(PROBLEMS))}")
        elif policy not in POLICIES:
            wrong.append(f"data.on_problem.{kind} is {policy!r}; it must be one of {', '.join(POLICIES)}.")
        elif policy == "keep" and not PROBLEMS[kind].may_keep:
            wrong.append(f"data.on_problem.{kind}: such rows cannot be kept; drop or error.")
        elif kind in ALWAYS_FATAL and policy != "error":
            wrong.append(f"data.on_problem.{kind}: always an error; half a file must not pass for a whole one.")
        else:
            result[kind] = policy
    if wrong:
        raise Complaint(wrong)
    return result


@dataclass
class Found:
    """How often a problem came up, what was done, and where it was first seen."""

    policy: str
    count: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)


@dataclass
class Report:
    """What was read and what was wrong with it.

    Attributes:
        source: file, folder or Hub name.
        format: the mapping used.
        fits: the mapping that the first row looks like, where another one was asked for.
        rows: rows read.
        pairs: pairs kept.
        prompts: different prompts among them.
        problems: kind -> what was found.
        filtered: reason -> rows left out by a filter of the mapping.
        statistics: lengths, scores and the length rule; see `Statistics.summary`.
        columns: names in the first row.
        proposal: names of columns that would make pairs of the rows, where they are not found as they are.
        sequence: of the first pair, what the model reads (``data inspect`` with a model).
        said: sentences about how the model reads them.
        refused: why they cannot be used as they are, where that is no matter of single rows.
    """

    source: str
    format: str = ""
    fits: str = ""
    rows: int = 0
    pairs: int = 0
    prompts: int = 0
    problems: dict[str, Found] = field(default_factory=dict)
    filtered: dict[str, int] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)
    proposal: dict[str, str] = field(default_factory=dict)
    sequence: dict[str, Any] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def note(self, kind: str, policy: str, place: str, detail: str) -> None:
        """Count a problem; the first few are kept as examples."""
        found = self.problems.setdefault(kind, Found(policy))
        found.count += 1
        if len(found.examples) < EXAMPLES:
            found.examples.append({"place": place, "detail": detail[:200]})

    def raise_errors(self) -> None:
        """Stop where a problem's policy is ``error``, or where something is refused as a whole.

        Raises:
            UserError: names every such kind, its count and its first places.
        """
        fatal = {kind: found for kind, found in self.problems.items() if found.policy == "error" and found.count}
        if not fatal and not self.refused:
            return
        lines = [f"{self.source} cannot be used as it is:"]
        for kind, found in fatal.items():
            lines.append(f"  {kind} ({PROBLEMS[kind].words}): {found.count}")
            lines += [f"    {example['place']}: {example['detail']}" for example in found.examples]
        lines += [f"  {sentence}" for sentence in self.refused]
        if not fatal:
            raise UserError("\n".join(lines))
        raise UserError("\n".join([*lines, f"  {self.remedy(fatal)}"]))

    def remedy(self, fatal: dict[str, Found]) -> str:
        """What to do about problems that stop: names for the columns, or to leave out rows, but never all of them."""
        if self.proposal:
            return f"The columns are {', '.join(self.columns)}. Name them: {as_setting(self.proposal)}."
        kinds = [kind for kind in fatal if kind not in ALWAYS_FATAL]
        if not kinds:
            return "Mend the file."
        if fatal[kinds[0]].count >= self.rows and self.fits:
            return f"No row is left so. They were read as {self.format} and look like {self.fits}: data.format=auto."
        if fatal[kinds[0]].count >= self.rows:
            return (
                f"No row is left so. The columns are {', '.join(self.columns)}; data.columns says which is what. (A "
                f"pair is a prompt and two answers; of prompts alone `ppo-vs-dpo rejection` makes some.)"
            )
        drop = " ".join(f"data.on_problem.{kind}=drop" for kind in kinds)
        return f"Mend the file or leave such rows out with {drop}."


class Statistics:
    """Lengths and scores of the pairs that were kept; a few bytes a pair."""

    def __init__(self) -> None:
        self.lengths = {side: array("l") for side in ("prompt", "chosen", "rejected")}
        self.numbers = {name: array("d") for name in OPTIONAL_NUMBERS}

    def add(self, pair: dict[str, Any]) -> None:
        """Take a pair in."""
        for side, lengths in self.lengths.items():
            lengths.append(len(text_of(pair[side]).split()))
        for name, values in self.numbers.items():
            values.append(pair[name] if pair.get(name) is not None else float("nan"))

    def summary(self) -> dict[str, Any]:
        """Quantiles of lengths (in words) and scores, and what a length rule alone would get right.

        ``length_rule.longer_is_chosen`` is the accuracy of "the longer response is preferred", ties counted half, and
        ``length_rule.interval`` its 95 % interval;
        ``length_rule.explained`` is 2 |accuracy - 1/2|: 0 where length says nothing, 1 where it says everything.
        """
        lengths = {side: np.asarray(values) for side, values in self.lengths.items()}
        if not len(lengths["chosen"]):
            return {}
        difference = lengths["chosen"] - lengths["rejected"]
        accuracy = float((difference > 0).mean() + 0.5 * (difference == 0).mean())
        result: dict[str, Any] = {
            "words": {side: _quantiles(values) for side, values in lengths.items()},
            "length_rule": {
                "chosen_longer": float((difference > 0).mean()),
                "same_length": float((difference == 0).mean()),
                "chosen_shorter": float((difference < 0).mean()),
                "longer_is_chosen": accuracy,
                "interval": np.clip(score_interval(accuracy, len(difference), QUANTILE), 0.0, 1.0).tolist(),
                "explained": 2 * abs(accuracy - 0.5),
            },
        }
        for name, values in self.numbers.items():
            known = np.asarray(values)[~np.isnan(values)]
            if len(known):
                result[name] = {"known": len(known), **_quantiles(known)}
        scores = [np.asarray(self.numbers[name]) for name in ("chosen_score", "rejected_score")]
        both = ~np.isnan(scores[0]) & ~np.isnan(scores[1])
        if both.any():
            gap = (scores[0] - scores[1])[both]
            result["score_difference"] = {**_quantiles(gap), "chosen_not_higher": float((gap <= 0).mean())}
        return result


def score_interval(share: Any, n: Any, z: Any) -> tuple[Any, Any]:
    """The score interval of shares among ``n`` (Wilson 1927, eq. 6) at a normal quantile; numbers or arrays.

    It holds for a handful, and near 0 and 1. Halves (ties) are allowed, which ``scipy.stats.binomtest`` takes none of.
    """
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(np.maximum(share * (1 - share), 0) / n + z**2 / (4 * n**2))
    return centre - half, centre + half


def _quantiles(values: np.ndarray) -> dict[str, float]:
    points = np.quantile(values, (0, 0.05, 0.5, 0.95, 1))
    named = dict(zip(("min", "p5", "median", "p95", "max"), map(float, points), strict=True))
    return {"mean": float(values.mean()), **named}


class Checker:
    """Checks pairs one after the other.

    It remembers 8 bytes of each pair and prompt, not the texts, so its memory is bounded, at a chance of a false
    duplicate of about n^2 / 2^65 (1e-9 at 160,000 pairs).
    """

    def __init__(self, report: Report, policy: dict[str, str]):
        self.report, self.policy = report, policy
        self.seen: set[int] = set()
        self.prompts: set[int] = set()
        self.contradictory: set[str] = set()
        self.statistics = Statistics()
        self.conversational: bool | None = None

    def drops(self, kind: str, place: str, detail: str) -> bool:
        """Count a problem and say whether its row is left out."""
        self.report.note(kind, self.policy[kind], place, detail)
        return self.policy[kind] != "keep"

    def check(self, place: str, pair: dict[str, Any]) -> dict[str, Any] | None:
        """The pair with its ids, or ``None`` where it is left out."""
        problem = self._form(pair)
        if problem is not None:
            self.drops(*problem[:1], place, problem[1])
            return None
        row = make_pair(
            pair["prompt"],
            pair["chosen"],
            pair["rejected"],
            **{name: pair[name] for name in OPTIONAL if pair.get(name) is not None},
        )
        turns = max(len(pair[side]) if isinstance(pair[side], list) else 1 for side in ("chosen", "rejected"))
        if turns > 1 and self.drops("several_turns", place, f"{turns} messages from where the two part"):
            return None
        scores = (pair.get("chosen_score"), pair.get("rejected_score"))
        if None not in scores and scores[0] < scores[1]:
            detail = f"chosen_score {scores[0]:g}, rejected_score {scores[1]:g}"
            if self.drops("scores", place, detail):
                return None
        if _said(pair["chosen"]) == _said(pair["rejected"]) and self.drops("equal", place, _short(pair["chosen"])):
            return None
        key = int(row["pair_id"], 16)
        mirrored = pair_id(pair["prompt"], pair["rejected"], pair["chosen"])
        if key in self.seen and self.drops("duplicate", place, _short(pair["chosen"])):
            return None
        mirrored_before = row["pair_id"] != mirrored and int(mirrored, 16) in self.seen
        if (
            mirrored_before
            and key not in self.seen
            and self.drops("contradiction", place, f"{_short(pair['chosen'])} over {_short(pair['rejected'])}")
        ):
            # Neither of the two is better evidence: both go, the earlier one when the splits are written.
            self.contradictory |= {row["pair_id"], mirrored}
        self.seen.add(key)
        self.prompts.add(int(row["prompt_id"], 16))
        return row

    def _form(self, pair: dict[str, Any]) -> tuple[str, str] | None:
        empty = [name for name in ("prompt", "chosen", "rejected") if not text_of(pair[name]).strip()]
        empty += [f"a turn of {side}" for side in ("chosen", "rejected") if side not in empty and _silent(pair[side])]
        if empty:
            return "empty", f"{' and '.join(empty)} empty"
        for name in ("prompt", "chosen", "rejected"):
            try:
                text_of(pair[name]).encode()
            except UnicodeEncodeError as error:  # JSON can spell half of an emoji: "\\ud83e"
                return "broken_utf8", f"character {error.start + 1} of {name} is half of a pair ({error.reason})"
        conversational = isinstance(pair["prompt"], list)
        if self.conversational is None:
            self.conversational = conversational
        if conversational != self.conversational:
            kinds = ("plain text", "a conversation")
            return "wrong_type", f"{kinds[conversational]}; the rows before are {kinds[self.conversational]}"
        return None


def _said(answer: Text) -> Any:
    """What a reader sees of an answer: space around it and spellings of one character do not tell two apart."""
    if isinstance(answer, list):
        return [(turn["role"], _said(turn["content"])) for turn in answer]
    return unicodedata.normalize("NFC", answer).strip()


def _silent(answer: Text) -> bool:
    """Whether one of the assistant's turns says nothing."""
    return isinstance(answer, list) and any(
        turn["role"] == "assistant" and not turn["content"].strip() for turn in answer
    )


def _short(text: Text, limit: int = 60) -> str:
    flat = " ".join(text_of(text).split())
    return repr(flat if len(flat) <= limit else flat[: limit - 1] + "…")
