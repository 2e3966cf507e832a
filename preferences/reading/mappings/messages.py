"""Messages as people bring them (OpenAI's, ShareGPT's, OpenAssistant's, JSON or Python text of them) in one form.

The form is ``{"role": "system" | "user" | "assistant" | "tool", "content": text}``. What it cannot hold (tool calls,
reasoning beside the content, images) is refused by name, never left out.
"""

import ast
import contextlib
import json
import re
from collections.abc import Iterable
from typing import Any

from ppo_vs_dpo.preferences.reading.mappings.base import UnmappableError

Message = dict[str, Any]

_NAMES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "chatbot", "bot", "bard", "bing", "model", "ai"),
    "tool": ("tool", "function", "ipython", "observation", "tool_response"),
}
ROLES = {name: role for role, names in _NAMES.items() for name in names}
_ROLE_KEYS, _TEXT_KEYS = ("role", "from"), ("content", "value", "text", "message", "parts")
# What a message may hold beside its text that decides what the model reads or should say, by the words of its name.
_BESIDE_TEXT = re.compile(
    r"(^|_)(tool_calls?|function_calls?|reasoning|thinking|thoughts?|analysis|rationale|scratchpad|chain_of_thought|cot"
    r"|refusal|audio|images?|videos?|files?|attachments?)(_|$)"
)
# What holds messages, where it is not the messages themselves.
_WRAPPERS = ("messages", "conversations", "conversation")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_CALLS = ("function_call", "tool_call")
# Ends a refusal of what only a chat template can hold.
RENDER = "; data.rendered=true writes it out with the model's chat template"
_TEXT_PARTS = ("text", "input_text", "output_text")
_MAY_BE_MESSAGES = re.compile(r"""\s*[\[{](?=.*['"](role|from)['"]\s*:)""", re.DOTALL)
_MESSAGES_AS_TEXT = re.compile(r"""\s*\[?\s*\{\s*['"](role|from|content|value)['"]\s*:""")


def is_messages(value: Any) -> bool:
    """Whether a value looks like a list of messages, whatever they call role and text."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and any(key in item for key in _ROLE_KEYS) for item in value)
    )


def parsed(value: Any, name: str) -> Any:
    """A value with messages that came as text (JSON, or Python's or NumPy's ``repr``), as one message or as columns.

    Everything else is given back as it is.

    Raises:
        UnmappableError: text that begins like messages and cannot be read as such.
    """
    if isinstance(value, str) and (_MESSAGES_AS_TEXT.match(value) or _MAY_BE_MESSAGES.match(value)):
        value = _read(value, name)
    if isinstance(value, dict):
        inner = next((value[key] for key in _WRAPPERS if is_messages(value.get(key))), None)
        if inner is not None:
            if value.get("tools") not in (None, "", [], {}):
                raise UnmappableError("not_text", f"{name} has tools, which are not carried")
            return inner
    if isinstance(value, dict) and any(key in value for key in _ROLE_KEYS):
        columns = {key: column for key, column in value.items() if isinstance(column, list)}
        role = next(key for key in _ROLE_KEYS if key in value)
        if role not in columns:
            return [value]
        if len({len(column) for column in columns.values()}) > 1:
            raise UnmappableError("wrong_type", f"{name} holds messages as columns of different length")
        return [dict(zip(columns, entries, strict=True)) for entries in zip(*columns.values(), strict=True)]
    return value


def _read(text: str, name: str) -> Any:
    """Messages, one message or what wraps them; the text itself where it is other JSON (an answer may be that)."""
    # NumPy prints an array of dicts without commas between them.
    for form in (text, re.sub(r"\}\s*\n\s*\{", "}, {", text)):
        for read in (json.loads, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                found = read(form.strip())
                if is_messages(found) or (isinstance(found, dict) and _holds_messages(found)):
                    return found
                return text
    if not _MESSAGES_AS_TEXT.match(text):
        return text
    raise UnmappableError("wrong_type", f"{name} is text that begins like messages and is neither JSON nor Python")


def _holds_messages(value: dict[str, Any]) -> bool:
    is_one = any(key in value for key in _ROLE_KEYS) and any(key in value for key in _TEXT_KEYS)
    return is_one or any(is_messages(value.get(key)) for key in _WRAPPERS)


def messages_of(value: list, name: str, beside: bool = False) -> list[Message]:
    """Messages in the one form.

    ``beside`` keeps tool calls and reasoning beside the text (``tool_calls``, ``reasoning_content``).

    Raises:
        UnmappableError: an unknown role, no text, or something that is not text.
    """
    return [_message(item, name, beside) for item in value]


def _message(item: Any, name: str, keep: bool = False) -> Message:
    role_key = next((key for key in _ROLE_KEYS if isinstance(item, dict) and isinstance(item.get(key), str)), None)
    if role_key is None:
        raise UnmappableError("wrong_type", f'{name} must hold messages {{"role": text, "content": text}}')
    beside = [key for key, value in item.items() if value and _is_beside_text(key, value)]
    if keep and {*beside} <= {"tool_calls", *_REASONING}:
        return _with_beside(item, name, role_key, beside)
    if beside or item[role_key].lower() in _CALLS:
        what = beside[0] if beside else f"the role {item[role_key]}"
        raise UnmappableError(
            "not_text", f"a message of {name} has {what}, which messages of text do not hold{RENDER}"
        )
    role = ROLES.get(item[role_key].strip().lower())
    if role is None:
        raise UnmappableError(
            "wrong_type", f"{name} has a message of the role {item[role_key]!r}; known are {', '.join(ROLES)}"
        )
    text_key = next((key for key in _TEXT_KEYS if key in item), None)
    if text_key is None:
        raise UnmappableError("wrong_type", f'{name} must hold messages {{"role": text, "content": text}}')
    return {"role": role, "content": _text(item[text_key], name)}


def _with_beside(item: dict[str, Any], name: str, role_key: str, beside: list[str]) -> Message:
    """A message with what stands beside its text: calls with their arguments as objects, reasoning under one name."""
    text_key = next((key for key in _TEXT_KEYS if key in item), "content")
    bare = {key: value for key, value in item.items() if key not in beside}
    calls = item.get("tool_calls") if "tool_calls" in beside else None
    if item[role_key].lower() in _CALLS:
        calls, bare = [as_object(item.get(text_key), name)], {role_key: "assistant", text_key: ""}
    elif calls and not bare.get(text_key):
        bare[text_key] = ""  # a call needs no words
    found = _message(bare, name)
    reasoning = next((item[key] for key in beside if key in _REASONING), None)
    if reasoning is not None:
        found["reasoning_content"] = reasoning if isinstance(reasoning, str) else json.dumps(reasoning)
    if calls:
        found["tool_calls"] = [_call(call, name) for call in without_nulls(calls)]
    for key in ("tool_call_id", "name"):
        if found["role"] == "tool" and isinstance(item.get(key), str):
            found[key] = item[key]
    return found


def _call(call: Any, name: str) -> dict[str, Any]:
    call = as_object(call, name)
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UnmappableError("wrong_type", f"a tool call of {name} has no function with a name")
    arguments = as_object(function.get("arguments") or function.get("parameters") or {}, name)
    more = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {"type": "function", **more, "function": {"name": function["name"], "arguments": arguments}}


def as_object(value: Any, name: str) -> dict[str, Any]:
    """An object, also where it came as JSON text (as OpenAI gives arguments)."""
    with contextlib.suppress(ValueError, TypeError):
        value = json.loads(value) if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise UnmappableError("wrong_type", f"a tool call of {name} is {str(value)[:60]!r}; it must be an object")
    return value


def without_nulls(value: Any) -> Any:
    """Nested values without nulls: Parquet gives every object the keys of all others."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _is_beside_text(key: str, value: Any) -> bool:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower()
    return isinstance(value, str | list | dict) and _BESIDE_TEXT.search(words) is not None


def _text(content: Any, name: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        raise UnmappableError("missing_field", f"a message of {name} has no content (null)")
    if isinstance(content, list):
        texts = []
        for part in content:
            if isinstance(part, str):
                texts.append(part)
            elif (
                isinstance(part, dict)
                and part.get("type", "text") in _TEXT_PARTS
                and isinstance(part.get("text"), str)
            ):
                texts.append(part["text"])
            else:
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise UnmappableError("not_text", f"a message of {name} has a part {kind!r}, which is not carried")
        return "".join(texts)
    raise UnmappableError("wrong_type", f"a message of {name} has content of type {type(content).__name__}")


def message(role: str, text: str) -> Message:
    """A message."""
    return {"role": role, "content": text}


def same(first: Message, second: Message) -> bool:
    """Whether two messages say the same; space around the text, which templates take off, does not count."""
    return {**first, "content": first["content"].strip()} == {**second, "content": second["content"].strip()}


# --- dialogues as text ---------------------------------------------------------------------------------------------
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_HEADINGS = {"user": "Human", "assistant": "Assistant", "system": "System"}
DIALOGUE = ("\n\nHuman:", "\n\nAssistant:")


def parse_dialogue(text: str, speakers: dict[str, str] = _SPEAKERS) -> list[Message]:
    """Messages of a ``\\n\\nHuman: ... \\n\\nAssistant: ...`` dialogue; neighbours of one role are joined.

    Raises:
        UnmappableError: text before the first turn, or no turn at all.
    """
    parts = re.split(rf"\n\n({'|'.join(speakers)}): ?", text)
    if parts[0].strip() or len(parts) < 3:
        raise UnmappableError("wrong_type", r"not a dialogue: it must start with \n\nHuman: or \n\nAssistant:")
    messages: list[Message] = []
    for speaker, content in zip(parts[1::2], parts[2::2], strict=True):
        role, content = speakers[speaker], content.strip()
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{content}"
        else:
            messages.append(message(role, content))
    return messages


def dialogue_text(messages: Iterable[Message]) -> str:
    """The inverse of `parse_dialogue`, ending with the header of the answer to come."""
    turns = "".join(f"\n\n{_HEADINGS.get(m['role'], m['role'].title())}: {m['content']}" for m in messages)
    return f"{turns}\n\nAssistant:"


def user_turn(prompt: str) -> list[Message]:
    """A text prompt as a conversation: a dialogue's turns, or one user message.

    A dialogue's last header is the answer's; it is not part of the prompt.
    """
    head, turn, rest = prompt.rpartition("\n\nAssistant:")
    if prompt.startswith(DIALOGUE) and turn and not rest.strip() and head:
        return parse_dialogue(head)
    return [message("user", prompt.strip())]
