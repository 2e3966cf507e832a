"""TRL's preference formats and what people make of them: texts or conversations, with or without a prompt column."""

import math
from os.path import commonprefix
from typing import Any

from ppo_vs_dpo.preferences.reading.mappings.base import MappingOptions, UnmappableError, value_of
from ppo_vs_dpo.preferences.reading.mappings.conversations import conversation_pair
from ppo_vs_dpo.preferences.reading.mappings.messages import (
    DIALOGUE,
    Message,
    dialogue_text,
    is_messages,
    message,
    messages_of,
    parse_dialogue,
    parsed,
    user_turn,
)
from ppo_vs_dpo.preferences.schema import OPTIONAL_NUMBERS, Text, text_of

SIDES = ("chosen", "rejected")
# Columns that hold the conversation so far, where there is no prompt.
CONVERSATIONS = ("messages", "conversations", "conversation", "trajectory", "context")
# Columns that are part of what the model should read, where they have something to say.
SYSTEMS = ("system", "system_prompt", "system_message")
# Columns by which the question goes elsewhere.
QUESTIONS = ("question", "instruction", "query", "input", "problem", "request", "user", "text", "history", "context")
NOT_TEXT = ("tools", "images", "image", "videos", "audio", "audios")


def pairs(row: dict[str, Any], options: MappingOptions) -> dict[str, Any]:
    """A pair of texts or conversations.

    The prompt is the column ``prompt``, or what ``columns`` names, or a column of messages. Without one it is what two
    whole conversations share, or what two texts share up to the last mark of a turn. It is never guessed from answers.
    """
    renamed, used = _renamed(row, options)
    for name in NOT_TEXT:
        if name not in used and parsed(renamed.get(name), name) not in (None, "", "[]", "null", [], {}):
            raise UnmappableError("not_text", f"the column {name} is not empty, and it is not carried")
    chosen, rejected = (_side(renamed, side) for side in SIDES)
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise UnmappableError("wrong_type", "one side is a text and the other a list of messages")
    prompt = _prompt(renamed, options, isinstance(chosen, list), chosen)
    if isinstance(chosen, list):
        pair = conversation_pair(prompt, chosen, rejected)
    elif isinstance(prompt, list):
        pair = conversation_pair(prompt, *([message("assistant", text)] for text in (chosen, rejected)))
    elif prompt is not None:
        pair = _text_pair(prompt, chosen, rejected, options)
    elif "prompt" in row or any(isinstance(row.get(name), str) and row[name].strip() for name in QUESTIONS):
        raise UnmappableError("missing_field", _no_prompt(row))
    else:
        pair = _marked_pair(chosen, rejected)
    _check_all_read(renamed, used, pair)
    return {**pair, **_numbers(renamed)}


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


def _side(row: dict[str, Any], side: str) -> Text:
    value = parsed(value_of(row, side, (str, list, dict)), side)
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise UnmappableError("wrong_type", f"{side} is an object and no message")
    return messages_of(value, side)


def _prompt(row: dict[str, Any], options: MappingOptions, chat: bool, chosen: Text) -> str | list[Message] | None:
    """What is named as the prompt; ``None`` where nothing is."""
    prompt: Any = parsed(row.get("prompt"), "prompt")
    if prompt is None and "prompt" not in row:
        name = next((name for name in CONVERSATIONS if is_messages(parsed(row.get(name), name))), None)
        if name is not None:
            prompt = messages_of(parsed(row[name], name), name)
            # The whole conversation of the chosen side beside it.
            return None if chat and prompt[-len(chosen) :] == chosen else prompt
    if isinstance(prompt, list):
        prompt = messages_of(prompt, "prompt")
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
        name for name, value in row.items() if name not in known and isinstance(value, str) and " " in value.strip()
    ]


def _no_prompt(row: dict[str, Any]) -> str:
    others = _other_texts(row)
    hint = f"name it with columns: prompt={others[0]}" if others else "name the column with columns: prompt=NAME"
    what = "prompt is empty (null)" if "prompt" in row else "no prompt"
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
    """Texts beside a text prompt; where both repeat it, it is taken off them once."""
    texts = (chosen, rejected)
    if len(prompt.split()) > 3 and all(text.startswith(prompt.rstrip()) for text in texts):
        length = len(prompt.rstrip()) if not all(text.startswith(prompt) for text in texts) else len(prompt)
        chosen, rejected = (text[length:] for text in texts)
    elif all(text.startswith(DIALOGUE) for text in texts):
        pair = hh({"chosen": chosen, "rejected": rejected}, options)
        if " ".join(prompt.split()) not in " ".join(text_of(pair["prompt"]).split()):
            raise UnmappableError("prompt_mismatch", f"the prompt is {prompt[:60]!r}, and the dialogues ask otherwise")
        return pair
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


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


def _check_all_read(row: dict[str, Any], used: set[str], pair: dict[str, Any]) -> None:
    """What belongs in front of the question must be in the prompt, or be named."""
    prompt = " ".join(text_of(pair["prompt"]).split())
    for name in (*SYSTEMS, "input"):
        value = row.get(name)
        if name not in used and isinstance(value, str) and value.strip() and " ".join(value.split()) not in prompt:
            part = "input" if name == "input" else "system"
            raise UnmappableError(
                "unread",
                f"{name} has text that the prompt lacks. Say columns: {part}={name}, or leave it out: {part}=",
            )
    history = row.get("history")
    if "history" not in used and isinstance(history, list) and history:
        raise UnmappableError(
            "unread", "history is not empty. Say columns: history=history, or leave it out: history="
        )


SCORES = {
    "chosen_score": ("score_chosen", "rating_chosen", "chosen_rating", "chosen_avg_rating"),
    "rejected_score": ("score_rejected", "rating_rejected", "rejected_rating", "rejected_avg_rating"),
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
