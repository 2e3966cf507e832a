"""TRL's preference formats and what people make of them: texts or conversations, with or without a prompt column."""

import ast
import contextlib
import functools
import json
import math
import re
from os.path import commonprefix
from typing import Any

from ppo_vs_dpo.preferences.reading.mappings.base import MappingOptions, UnmappableError, value_of
from ppo_vs_dpo.preferences.reading.mappings.conversations import conversation_pair
from ppo_vs_dpo.preferences.reading.mappings.messages import (
    DIALOGUE,
    RENDER,
    Message,
    as_object,
    dialogue_text,
    is_messages,
    message,
    messages_of,
    parse_dialogue,
    parsed,
    user_turn,
    without_nulls,
)
from ppo_vs_dpo.preferences.schema import OPTIONAL_NUMBERS, OPTIONAL_TEXTS, Text, text_of

SIDES = ("chosen", "rejected")
# Columns that hold the conversation so far, where there is no prompt.
CONVERSATIONS = ("messages", "conversations", "conversation", "trajectory", "context")
# Columns by which the question goes elsewhere.
QUESTIONS = ("question", "instruction", "query", "input", "problem", "request", "user", "text", "history", "context")
TOOLS = ("tools", "functions", "available_tools", "tool_schemas")
NOT_TEXT = (*TOOLS, "images", "image", "videos", "video", "audio", "audios")
# Columns beside a prompt that are part of what the model should read, where they say what the prompt lacks.
_SYSTEM = re.compile(
    r"(system|sys)(_?(prompt|message|msg|instructions?|content|text))?|developer(_(message|prompt))?|preamble|persona"
)
_INPUTS = ("input", "context", "passage", "document", "article", "background", "initial_reason_steps")
_INPUTS += ("instruction", "instructions", "question", "query", "problem")
_HISTORIES = ("history", "chat_history", "conversation_history", "dialogue_history", "previous_messages")


def pairs(row: dict[str, Any], options: MappingOptions) -> dict[str, Any]:
    """A pair of texts or conversations.

    The prompt is the column ``prompt``, or what ``columns`` names, or a column of messages. Without one it is what two
    whole conversations share, or what two texts share up to the last mark of a turn. It is never guessed from answers.
    """
    renamed, used = _renamed(row, options)
    tools: list[Any] = []
    for name in NOT_TEXT:
        value = parsed(renamed.get(name), name)
        if name in used or value in (None, "", "[]", "null", [], {}):
            continue
        if name not in TOOLS:
            raise UnmappableError("not_text", f"the column {name} is not empty, and it is not carried")
        if options.render is None:
            raise UnmappableError("not_text", f"the column {name} is not empty, and texts do not hold it{RENDER}")
        tools = _tools(value, name)
    chosen, rejected = (_side(renamed, side, options.render is not None) for side in SIDES)
    if _is_list_as_text(chosen) and _is_list_as_text(rejected):
        raise UnmappableError("wrong_type", f"chosen is the text of a list, {chosen[:60]!r}; it must be the answer")
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise UnmappableError("wrong_type", "one side is a text and the other a list of messages")
    prompt = _prompt(renamed, options, isinstance(chosen, list), chosen)
    if isinstance(prompt, str) and not prompt.strip() and isinstance(chosen, str) and _asked_elsewhere(row, options):
        raise UnmappableError("missing_field", _no_prompt(row))
    if isinstance(chosen, list):
        pair = conversation_pair(prompt, chosen, rejected)
    elif isinstance(prompt, list):
        pair = conversation_pair(prompt, *([message("assistant", text)] for text in (chosen, rejected)))
    elif prompt is not None:
        pair = _text_pair(prompt, chosen, rejected, options)
    elif "prompt" in row or _asked_elsewhere(row, options):
        raise UnmappableError("missing_field", _no_prompt(row))
    else:
        pair = _marked_pair(chosen, rejected)
    _check_all_read(renamed, used, pair, {name for name, source in options.columns.items() if not source})
    texts = {name: renamed[name] for name in OPTIONAL_TEXTS if isinstance(renamed.get(name), str)}
    return {**pair, **_numbers(renamed), **texts, **({"tools": tools} if tools else {})}


def _tools(value: Any, name: str) -> list[Any]:
    """Tools as objects, also from JSON text."""
    with contextlib.suppress(ValueError):
        value = json.loads(value) if isinstance(value, str) else value
    if not isinstance(value, list):
        raise UnmappableError("wrong_type", f"{name} must hold a list of tools")
    return [as_object(tool, name) if isinstance(tool, str) else without_nulls(tool) for tool in value]


def implicit(row: dict[str, Any], options: MappingOptions) -> dict[str, Any]:
    """TRL's implicit prompt: what two texts begin with, up to the last space, is the prompt. Only when asked for."""
    chosen, rejected = (value_of(row, side) for side in SIDES)
    shared = commonprefix([chosen, rejected])  # noqa: RUF071 - characters are meant
    if shared not in (chosen, rejected):
        shared = shared[: shared.rfind(" ")] if " " in shared else ""  # responses start with the space
    if not shared.strip():
        raise UnmappableError("missing_field", "no prompt, and the two sides share no beginning")
    return {**{"prompt": shared}, **{s: t[len(shared) :] for s, t in zip(SIDES, (chosen, rejected), strict=True)}}


def _renamed(row: dict[str, Any], options: MappingOptions) -> tuple[dict[str, Any], set[str]]:
    """The row under the schema's names, and the source's columns that were read or waved through."""
    for name, source in options.columns.items():
        if source and source not in row:
            raise UnmappableError("missing_field", f"no {source} (data.columns.{name}); the row has {', '.join(row)}")
    named = {name: row[source] for name, source in options.columns.items() if source}
    used = {*options.columns, *options.columns.values(), "prompt", *SIDES}
    return {**row, **named}, used


def _asked_elsewhere(row: dict[str, Any], options: MappingOptions) -> bool:
    named = set(options.columns.values())
    return any(name not in named and isinstance(row.get(name), str) and row[name].strip() for name in QUESTIONS)


def _is_list_as_text(value: Text) -> bool:
    """``"['An animal.']"``: a list of one text, printed."""
    if not isinstance(value, str) or not re.fullmatch(r"""\s*\[\s*(['"]).*\1\s*\]\s*""", value, re.DOTALL):
        return False
    with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
        found = ast.literal_eval(value.strip())
        return isinstance(found, list) and len(found) == 1 and isinstance(found[0], str)
    return False


def _side(row: dict[str, Any], side: str, beside: bool = False) -> Text:
    value = parsed(value_of(row, side, (str, list, dict)), side)
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise UnmappableError("wrong_type", f"{side} is an object and no message")
    return messages_of(value, side, beside)


def _prompt(row: dict[str, Any], options: MappingOptions, chat: bool, chosen: Text) -> str | list[Message] | None:
    """What is named as the prompt; ``None`` where nothing is."""
    prompt: Any = parsed(row.get("prompt"), "prompt")
    if prompt is None and "prompt" not in row:
        name = next((name for name in CONVERSATIONS if is_messages(parsed(row.get(name), name))), None)
        if name is not None:
            prompt = messages_of(parsed(row[name], name), name, options.render is not None)
            # The whole conversation of the chosen side beside it.
            return None if chat and prompt[-len(chosen) :] == chosen else prompt
    if isinstance(prompt, list):
        prompt = messages_of(prompt, "prompt", options.render is not None)
    elif prompt is not None and not isinstance(prompt, str):
        raise UnmappableError("wrong_type", f"prompt is a {type(prompt).__name__}, it must be text or messages")
    return _with_parts(row, options, prompt)


def _with_parts(row: dict[str, Any], options: MappingOptions, prompt: str | list[Message] | None):
    """The prompt with the columns that ``columns`` names for its parts: input, history, system."""
    asked = {name for name, source in options.columns.items() if source}
    if isinstance(prompt, str) and "input" in asked and (more := _optional(row, "input")):
        prompt = f"{prompt}\n{more}" if prompt else more
    if not asked & {"system", "history"} or prompt is None:
        return prompt
    head: list[Message] = []
    if "system" in asked and (system := _optional(row, "system")):
        head.append(message("system", system))
    if "history" in asked:
        head += _history(row["history"])
    return [*head, *(user_turn(prompt) if isinstance(prompt, str) else prompt)]


def _optional(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise UnmappableError("wrong_type", f"{name} is a {type(value).__name__}, it must be text")
    return value if value and value.strip() else ""


def _history(value: Any) -> list[Message]:
    """Turns so far: messages, or LLaMA-Factory's ``[[question, answer], ...]``."""
    if value is None or value in ("", []):
        return []
    if is_messages(value):
        return messages_of(value, "history")
    if not isinstance(value, list) or not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in value
    ):
        raise UnmappableError("wrong_type", "history must hold messages, or pairs of a question and its answer")
    return [message(role, text) for turn in value for role, text in zip(("user", "assistant"), turn, strict=True)]


def _other_texts(row: dict[str, Any]) -> list[str]:
    """Columns that could hold the question: texts that are not one of a pair's own."""
    known = {*SIDES, "prompt", "prompt_id", "pair_id"}
    return [
        name
        for name, value in row.items()
        if name not in known and isinstance(value, str) and (" " in value.strip() or (value and name in QUESTIONS))
    ]


def _no_prompt(row: dict[str, Any]) -> str:
    # The likeliest name first: beside a question, a context is what it is about.
    others = sorted(_other_texts(row), key=lambda name: QUESTIONS.index(name) if name in QUESTIONS else len(QUESTIONS))
    hint = f"name it with columns: prompt={others[0]}" if others else "name the column with columns: prompt=NAME"
    what = "no prompt" if "prompt" not in row else f"prompt is empty{'' if row['prompt'] == '' else ' (null)'}"
    return f"{what}; the row has {', '.join(map(str, row))}. If the question stands in another column, {hint}"


# What ends a prompt in texts that hold prompt and answer.
_MARKS = (
    "\n\nAssistant:",
    "[/INST]",
    "<|im_start|>assistant\n",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<start_of_turn>model\n",
    "<|assistant|>",
    "<｜Assistant｜>",
    "### Response:",
    "### Assistant:",
    "ASSISTANT:",
    "TL;DR:",
)


def _text_pair(prompt: str, chosen: str, rejected: str, options: MappingOptions) -> dict[str, Any]:
    """Texts beside a text prompt; where both repeat it, it is taken off them once.

    Raises:
        UnmappableError: one side repeats the prompt; or both begin with a prompt so short that answers may begin so.
    """
    texts, bare = (chosen, rejected), prompt.rstrip()
    repeats = [bool(bare) and text.startswith(bare) for text in texts]
    certain = len(bare.split()) > 3 or bare.endswith(_MARKS)
    if all(repeats) and certain:
        length = len(prompt) if all(text.startswith(prompt) for text in texts) else len(bare)
        chosen, rejected = (text[length:] for text in texts)
    elif all(text.startswith(DIALOGUE) for text in texts):
        pair = hh({"chosen": chosen, "rejected": rejected}, options)
        asked = bare.removesuffix("Assistant:").strip()
        if _flat(asked) not in _flat(text_of(pair["prompt"])):
            raise UnmappableError("prompt_mismatch", f"the prompt is {prompt[:60]!r}, and the dialogues ask otherwise")
        return pair
    elif any(repeats) and certain:
        raise UnmappableError("prompt_mismatch", "one side repeats the prompt and the other does not")
    elif all(repeats) and " " in bare and not any(text[len(bare) : len(bare) + 1].isalnum() for text in texts):
        raise UnmappableError(
            "repeated", f"both answers begin with the prompt {bare!r}: they may repeat it, or begin alike by chance"
        )
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _flat(text: str) -> str:
    return " ".join(text.split())


def hh(row: dict[str, Any], options: MappingOptions) -> dict[str, Any]:
    """Anthropic HH-RLHF: two dialogues, split at the last assistant turn."""
    sides = {}
    for side in SIDES:
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
    return {**pair, **{side: [message("assistant", answer)] for side, (_, answer) in sides.items()}}


def _marked_pair(chosen: str, rejected: str) -> dict[str, Any]:
    """Texts that hold the prompt: it ends with the last mark of a turn that both have in common."""
    shared = commonprefix([chosen, rejected])  # noqa: RUF071 - characters are meant
    end = max((at + len(mark) for mark in _MARKS if (at := shared.rfind(mark)) >= 0), default=None)
    if end is None:
        raise UnmappableError(
            "missing_field",
            "no prompt. Where both texts begin with the prompt and no mark shows its end, data.format=implicit takes "
            "what they share",
        )
    answers = [text[end:] for text in (chosen, rejected)]
    if any(mark in answer for mark in _MARKS[:-1] for answer in answers):
        raise UnmappableError("prompt_mismatch", "the two texts part before their last answer")
    return {"prompt": shared[:end], "chosen": answers[0], "rejected": answers[1]}


def _check_all_read(row: dict[str, Any], used: set[str], pair: dict[str, Any], waved: set[str]) -> None:
    """What belongs in front of the question must be in the prompt, or be named.

    ``waved`` are parts that are not to be read, whatever their column is called.
    """
    asked = [name for name in row if (part := part_of(name)) and part not in waved and name not in used]
    if not asked:
        return
    prompt = _flat(text_of(pair["prompt"]))
    whole = _flat(" ".join([prompt, *(text_of(pair[side]) for side in SIDES)]))
    for name in asked:
        value, part = row[name], part_of(name)
        if isinstance(value, str):
            lost = value.strip() and _flat(value) not in prompt
        elif is_messages(value):
            lost = not _all_in(value, name, whole)
        else:
            lost = name in _HISTORIES and isinstance(value, list) and value
        if lost:
            role = "prompt" if part == "history" and name in CONVERSATIONS else part
            raise UnmappableError(
                "unread",
                f"{name} has text that the prompt lacks. Say columns: {role}={name}, or leave it out: {part}=",
            )


def _all_in(value: list[Any], name: str, whole: str) -> bool:
    """Whether a pair says all that a column of messages says; its last answer may be a third one."""
    try:
        said = messages_of(value, name, beside=True)
    except UnmappableError:  # of roles or parts that nobody knows
        return False
    said = said[:-1] if name in CONVERSATIONS and said[-1]["role"] == "assistant" else said
    return all(_flat(one["content"]) in whole for one in said)


@functools.cache
def part_of(name: str) -> str | None:
    """The part of a prompt that a column beside it is by its name: system, input, history; ``None``: none."""
    if _SYSTEM.fullmatch(name.lower()):
        return "system"
    if name in (*_HISTORIES, *(one for one in CONVERSATIONS if one != "context")):
        return "history"
    return "input" if name in _INPUTS else None


SCORES = {
    "chosen_score": ("score_chosen", "rating_chosen", "chosen_rating", "chosen-rating", "chosen_avg_rating"),
    "rejected_score": (
        "score_rejected",
        "rating_rejected",
        "rejected_rating",
        "rejected-rating",
        "rejected_avg_rating",
    ),
}


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """Margin, scores and soft label; unknown is null, empty or NaN.

    The last is how pandas writes it. A column of one of our names must hold numbers; one of another name that does not
    is another thing.
    """
    found = {}
    for name in OPTIONAL_NUMBERS:
        others = SCORES.get(name, ())
        source = next((item for item in (name, *others) if item in row), None)
        value = row.get(source)
        if value is None or value == "":
            continue
        try:
            number = math.nan if isinstance(value, bool) else float(value)
            if isinstance(value, bool) or math.isinf(number):
                raise ValueError
        except (TypeError, ValueError):
            if source != name:
                continue
            raise UnmappableError("wrong_type", f"{name} is {value!r}, it must be a number") from None
        if name == "soft_label" and not math.isnan(number) and not 0 <= number <= 1:
            raise UnmappableError("wrong_type", f"soft_label is {value!r}, it is a probability between 0 and 1")
        if name == "margin" and number < 0:
            raise UnmappableError("wrong_type", f"margin is {value!r}; below 0 it says that rejected is better")
        if not math.isnan(number):
            found[name] = number
    return found


def convert(pair: dict[str, Any], conversational: bool | None) -> dict[str, Any]:
    """A pair as messages (``True``), as plain text (``False``) or as it is (``None``).

    Raises:
        UnmappableError: answers of several turns as plain text; nothing would say whose words are whose.
    """
    is_conversation = isinstance(pair["prompt"], list)
    if conversational is None or conversational == is_conversation:
        return pair
    if conversational:
        prompt: Text = user_turn(pair["prompt"])
        sides: dict[str, Text] = {side: [message("assistant", pair[side].strip())] for side in SIDES}
    else:
        if any(len(pair[side]) > 1 for side in SIDES):
            raise UnmappableError("wrong_type", "answers of several turns cannot be plain text")
        prompt = dialogue_text(pair["prompt"])
        sides = {side: " " + pair[side][0]["content"] for side in SIDES}
    return {**pair, "prompt": prompt, **sides}
