"""From a source's row to a pair of the schema: one function for each data set that people use.

A mapping takes a row and `MappingOptions` and returns ``prompt``, ``chosen``, ``rejected`` and, where the source has
them, ``chosen_score``, ``rejected_score`` and ``margin``. It raises `UnmappableError` for a row that is not what it
should be and `FilteredError` for one that is fine and not wanted (a tie, a weak vote).
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import Any

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.settings import nearest
from ppo_vs_dpo.preferences.schema import OPTIONAL_NUMBERS, Text


class UnmappableError(Exception):
    """A row that cannot become a pair: a kind of problem (`reading.validation.PROBLEMS`) and the detail."""

    def __init__(self, kind: str, detail: str):
        super().__init__(detail)
        self.kind, self.detail = kind, detail


class FilteredError(Exception):
    """A row that a filter leaves out; the message is the reason."""


@dataclass
class MappingOptions:
    """What a mapping may be told.

    Attributes:
        columns: schema name -> the source's name, e.g. ``{"chosen": "better_answer"}``.
        conversational: make messages of plain texts (true) or plain texts of messages (false); ``None``: as they are.
        min_score_ratio: SHP: least ratio of the two comments' votes.
        dimension: PKU-SafeRLHF: ``helpful`` or ``safe``.
        drop_both_unsafe: PKU-SafeRLHF: leave out pairs without a safe response (Xu et al. 2024, Table 2).
        drop_both_safe: PKU-SafeRLHF: leave out pairs without an unsafe response.
    """

    columns: dict[str, str] = field(default_factory=dict)
    conversational: bool | None = None
    min_score_ratio: float = 0.0
    dimension: str = "helpful"
    drop_both_unsafe: bool = False
    drop_both_safe: bool = False


Mapping = Callable[[dict[str, Any], MappingOptions], dict[str, Any]]


def value_of(row: dict[str, Any], name: str, kind: type | tuple[type, ...] = str) -> Any:
    """A field of a row.

    Raises:
        UnmappableError: it is missing or of another type.
    """
    if name not in row:
        raise UnmappableError("missing_field", f"no {name}; the row has {', '.join(map(str, row)) or 'nothing'}")
    value = row[name]
    if value is None:
        raise UnmappableError("missing_field", f"{name} is empty (null)")
    if not isinstance(value, kind) or (isinstance(value, bool) and bool not in _as_tuple(kind)):
        wanted = " or ".join(item.__name__ for item in _as_tuple(kind))
        raise UnmappableError("wrong_type", f"{name} is a {type(value).__name__}, it must be {wanted}")
    return value


def _as_tuple(kind: type | tuple[type, ...]) -> tuple[type, ...]:
    return kind if isinstance(kind, tuple) else (kind,)


def _messages(value: list, name: str) -> list[dict[str, str]]:
    for message in value:
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            raise UnmappableError("wrong_type", f'{name} must hold messages {{"role": text, "content": text}}')
    return [{"role": message["role"], "content": message["content"]} for message in value]


# --- plain texts and conversations ---------------------------------------------------------------------------------
_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_NAMES = {"user": "Human", "assistant": "Assistant", "system": "System"}


def parse_dialogue(text: str) -> list[dict[str, str]]:
    """Messages of a ``\\n\\nHuman: ... \\n\\nAssistant: ...`` dialogue; neighbours of one role are joined.

    Raises:
        UnmappableError: text before the first turn, or no turn at all.
    """
    parts = _TURN.split(text)
    if parts[0].strip() or len(parts) < 3:
        raise UnmappableError("wrong_type", r"not a dialogue: it must start with \n\nHuman: or \n\nAssistant:")
    messages: list[dict[str, str]] = []
    for speaker, content in zip(parts[1::2], parts[2::2], strict=True):
        role, content = _ROLES[speaker], content.strip()
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{content}"
        else:
            messages.append({"role": role, "content": content})
    return messages


def dialogue_text(messages: Iterable[dict[str, str]]) -> str:
    """The inverse of `parse_dialogue`, ending with the header of the answer to come."""
    turns = "".join(f"\n\n{_NAMES.get(m['role'], m['role'].title())}: {m['content']}" for m in messages)
    return f"{turns}\n\nAssistant:"


def convert(pair: dict[str, Any], conversational: bool | None) -> dict[str, Any]:
    """A pair as messages (``True``), as plain text (``False``) or as it is (``None``)."""
    is_conversation = isinstance(pair["prompt"], list)
    if conversational is None or conversational == is_conversation:
        return pair
    prompt, sides = pair["prompt"], {side: pair[side] for side in ("chosen", "rejected")}
    if conversational:
        prompt = [{"role": "user", "content": prompt.strip()}]
        sides = {side: [{"role": "assistant", "content": text.strip()}] for side, text in sides.items()}
    else:
        prompt = dialogue_text(prompt)
        sides = {side: " " + "\n\n".join(m["content"] for m in messages) for side, messages in sides.items()}
    return {**pair, "prompt": prompt, **sides}


# --- the mappings --------------------------------------------------------------------------------------------------
def hh(row: dict[str, Any], options: MappingOptions) -> dict[str, Any]:
    """Anthropic HH-RLHF: two dialogues, split at the last assistant turn."""
    sides = {}
    for side in ("chosen", "rejected"):
        text = value_of(row, side)
        head, turn, answer = text.rpartition("\n\nAssistant:")
        if not turn or "\n\nHuman:" in answer:
            raise UnmappableError("wrong_type", f"{side} does not end with an assistant turn")
        sides[side] = (head, answer.strip())
    if sides["chosen"][0] != sides["rejected"][0]:
        raise UnmappableError("prompt_mismatch", "the two dialogues differ before the last assistant turn")
    pair: dict[str, Any]
    if options.conversational is False:
        pair = {"prompt": sides["chosen"][0] + "\n\nAssistant:"}
        return {**pair, **{side: f" {answer}" if answer else "" for side, (_, answer) in sides.items()}}
    pair = {"prompt": parse_dialogue(sides["chosen"][0])}
    return {**pair, **{side: [{"role": "assistant", "content": answer}] for side, (_, answer) in sides.items()}}


def pairs(row: dict[str, Any], options: MappingOptions) -> dict[str, Any]:
    """TRL's preference formats, standard or conversational, with or without a prompt (UltraFeedback, own files).

    Where ``chosen`` and ``rejected`` are conversations that repeat the prompt, the prompt is what they share.
    """
    row = {**row, **{name: row[source] for name, source in options.columns.items() if source in row}}
    for name, source in options.columns.items():
        if source not in row:
            raise UnmappableError("missing_field", f"no {source} (data.columns.{name}); the row has {', '.join(row)}")
    chosen, rejected = (_side(row, side) for side in ("chosen", "rejected"))
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise UnmappableError("wrong_type", "one side is a text and the other a list of messages")
    if isinstance(chosen, list):
        pair = _conversation_pair(row, chosen, rejected)
    elif row.get("prompt") is not None:
        prompt = _parsed(row["prompt"])
        if isinstance(prompt, list):  # a conversation with plain answers
            pair = {"prompt": _messages(prompt, "prompt")}
            pair |= {
                side: [{"role": "assistant", "content": text}]
                for side, text in (("chosen", chosen), ("rejected", rejected))
            }
        else:
            pair = {"prompt": value_of(row, "prompt"), "chosen": chosen, "rejected": rejected}
    else:
        pair = _implicit_prompt(chosen, rejected)
    return {**pair, **_numbers(row)}


def _side(row: dict[str, Any], side: str) -> Text:
    value = _parsed(value_of(row, side, (str, list)))
    return _messages(value, side) if isinstance(value, list) else value


def _parsed(value: Any) -> Any:
    """Messages that a CSV field holds as JSON."""
    if isinstance(value, str) and value.lstrip().startswith('[{"'):
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(value)
    return value


def _conversation_pair(row: dict[str, Any], chosen: list, rejected: list) -> dict[str, Any]:
    if not chosen or not rejected:
        raise UnmappableError("empty", "a response without messages")
    prompt = _parsed(row.get("prompt"))
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0 and isinstance(prompt, list):
        return {"prompt": _messages(prompt, "prompt"), "chosen": chosen, "rejected": rejected}
    if shared == 0 and isinstance(prompt, str) and all(side[0]["role"] == "assistant" for side in (chosen, rejected)):
        return {"prompt": [{"role": "user", "content": prompt}], "chosen": chosen, "rejected": rejected}
    if shared == 0:
        raise UnmappableError("prompt_mismatch", "the two conversations share no beginning, and there is no prompt")
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _implicit_prompt(chosen: str, rejected: str) -> dict[str, Any]:
    shared = commonprefix([chosen, rejected])  # noqa: RUF071 - characters are meant
    if shared not in (chosen, rejected):
        shared = shared[: shared.rfind(" ")] if " " in shared else ""  # responses start with the space
    if not shared.strip():
        raise UnmappableError("missing_field", "no prompt, and the two sides share no beginning")
    return {"prompt": shared, "chosen": chosen[len(shared) :], "rejected": rejected[len(shared) :]}


_SCORES = {"chosen_score": "score_chosen", "rejected_score": "score_rejected"}


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    found = {}
    for name in OPTIONAL_NUMBERS:
        value = row.get(name, row.get(_SCORES.get(name, name)))
        if value is None or value == "":
            continue
        try:
            found[name] = float(value)
        except (TypeError, ValueError):
            raise UnmappableError("wrong_type", f"{name} is {value!r}, it must be a number") from None
    return found


def tldr(row: dict[str, Any], options: MappingOptions) -> dict[str, Any]:
    """N+'s preprocessed TL;DR comparisons (``query``, ``chosen``, ``rejected``): the end-of-text mark is taken off."""
    prompt = value_of(row, "query").strip()
    chosen, rejected = (value_of(row, side).replace("<|endoftext|>", "") for side in ("chosen", "rejected"))
    return {"prompt": prompt, **{"chosen": " " + chosen.strip(), "rejected": " " + rejected.strip()}}


def shp(row: dict[str, Any], options: MappingOptions) -> dict[str, Any]:
    """Stanford Human Preferences: two comments on a post; ``labels`` is 1 where A is preferred."""
    ratio = value_of(row, "score_ratio", (int, float)) if options.min_score_ratio else None
    if ratio is not None and ratio < options.min_score_ratio:
        raise FilteredError(f"score ratio below {options.min_score_ratio:g}")
    label = value_of(row, "labels", int)
    if label not in (0, 1):
        raise UnmappableError("wrong_type", f"labels is {label}, it must be 0 or 1")
    sides = ("A", "B") if label == 1 else ("B", "A")
    texts = [value_of(row, f"human_ref_{side}") for side in sides]
    pair = {"prompt": value_of(row, "history"), "chosen": texts[0], "rejected": texts[1]}
    if "score_A" in row and "score_B" in row:
        scores = [float(value_of(row, f"score_{side}", (int, float))) for side in sides]
        pair |= {"chosen_score": scores[0], "rejected_score": scores[1]}
    return pair


def safe_rlhf(row: dict[str, Any], options: MappingOptions) -> dict[str, Any]:
    """PKU-SafeRLHF: two responses, one better (more helpful), one safer."""
    names = {"helpful": "better_response_id", "safe": "safer_response_id"}
    if options.dimension not in names:
        raise UserError(f"data.dimension is {options.dimension!r}; it must be helpful or safe.")
    winner = value_of(row, names[options.dimension], int)
    if winner not in (0, 1):
        raise UnmappableError("wrong_type", f"{names[options.dimension]} is {winner}, it must be 0 or 1")
    if options.drop_both_unsafe or options.drop_both_safe:
        safe = [value_of(row, f"is_response_{side}_safe", bool) for side in (0, 1)]
        if options.drop_both_unsafe and not any(safe):
            raise FilteredError("both responses unsafe")
        if options.drop_both_safe and all(safe):
            raise FilteredError("both responses safe")
    texts = [value_of(row, f"response_{side}") for side in (winner, 1 - winner)]
    return {"prompt": value_of(row, "prompt"), "chosen": texts[0], "rejected": texts[1]}


def alpaca_eval(row: dict[str, Any], options: MappingOptions) -> dict[str, Any]:
    """AlpacaEval annotations: ``preference`` in [1, 2] is the weight of output 2; 0 and 1.5 are ties.

    The scores are the judge's probabilities of the two answers.
    """
    preference = value_of(row, "preference", (int, float))
    if preference in (0, 1.5):
        raise FilteredError("tie")
    if not 1 <= preference <= 2:
        raise UnmappableError("wrong_type", f"preference is {preference}, it must be between 1 and 2 (or 0 for a tie)")
    share = preference - 1
    order = (2, 1) if share > 0.5 else (1, 2)
    texts = [value_of(row, f"output_{number}") for number in order]
    scores = {"chosen_score": max(share, 1 - share), "rejected_score": min(share, 1 - share)}
    return {"prompt": value_of(row, "instruction"), "chosen": texts[0], "rejected": texts[1], **scores}


MAPPINGS: dict[str, Mapping] = {
    "pairs": pairs,
    "hh": hh,
    "tldr": tldr,
    "ultrafeedback": pairs,
    "shp": shp,
    "safe_rlhf": safe_rlhf,
    "alpaca_eval": alpaca_eval,
}
# Columns by which a source is known, the most telling first.
_SIGNS: tuple[tuple[set[str], str], ...] = (
    ({"instruction", "output_1", "output_2", "preference"}, "alpaca_eval"),
    ({"history", "human_ref_A", "human_ref_B", "labels"}, "shp"),
    ({"response_0", "response_1", "better_response_id"}, "safe_rlhf"),
    ({"query", "chosen", "rejected"}, "tldr"),
)


def detect(row: dict[str, Any]) -> str:
    """The mapping that fits a source, by its first row."""
    for columns, name in _SIGNS:
        if columns <= set(row):
            return name
    chosen = row.get("chosen")
    is_dialogue = isinstance(chosen, str) and chosen.startswith(("\n\nHuman:", "\n\nAssistant:"))
    return "hh" if is_dialogue and row.get("prompt") is None else "pairs"


def mapping_named(name: str) -> Mapping:
    """The mapping of a name.

    Raises:
        UserError: there is none.
    """
    if name not in MAPPINGS:
        raise UserError(
            f"data.format is {name!r}; it must be auto or one of {', '.join(MAPPINGS)}.{nearest(name, list(MAPPINGS))}"
        )
    return MAPPINGS[name]


def map_row(row: dict[str, Any], mapping: Mapping, options: MappingOptions) -> dict[str, Any]:
    """A pair of the schema, without ids, in the asked-for form."""
    return convert(mapping(row, options), options.conversational)
