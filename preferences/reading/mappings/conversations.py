"""From two conversations to one prompt and two answers; the prompt is what the source says it is."""

from typing import Any

from ppo_vs_dpo.preferences.reading.mappings.base import UnmappableError
from ppo_vs_dpo.preferences.reading.mappings.messages import Message, message, same

_CUT = 60


def conversation_pair(
    prompt: str | list[Message] | None, chosen: list[Message], rejected: list[Message]
) -> dict[str, Any]:
    """A pair of two conversations.

    A prompt that is given stays the prompt: where both sides repeat it, it is taken off them once; what both sides
    say before the assistant's first word is added to it (a prompt that holds the system message alone). Where none is
    given, or where it is a text that the conversations ask too, the prompt is what the two conversations share, up to
    the assistant's turn in which they part.

    ``chosen`` and ``rejected`` are whole conversations, or the answers alone.

    Raises:
        UnmappableError: the sides answer different prompts, there is no prompt, or a side does not begin and end with
            the assistant.
    """
    sides = {"chosen": chosen, "rejected": rejected}
    if not chosen or not rejected:
        raise UnmappableError("empty", "a response without messages")
    whole = chosen[0]["role"] != "assistant" and rejected[0]["role"] != "assistant"
    head: list[Message] = []
    if isinstance(prompt, list) and prompt:
        repeats = [_starts_with(side, prompt) for side in (chosen, rejected)]
        if all(repeats):
            head, sides = prompt, {name: side[len(prompt) :] for name, side in sides.items()}
        elif any(repeats):
            raise UnmappableError("prompt_mismatch", "one side repeats the prompt and the other does not")
        elif not whole or all(item["role"] == "system" for item in prompt):
            head = prompt
        elif (rest := _after_system(prompt)) != prompt and all(_starts_with(s, rest) for s in (chosen, rejected)):
            # Both sides repeat the question, and the system message stands in a column of its own.
            head, sides = prompt, {name: side[len(rest) :] for name, side in sides.items()}
        elif not all(_holds(side, prompt) for side in (chosen, rejected)):
            raise UnmappableError("prompt_mismatch", "the conversations neither repeat the prompt nor answer it")
    elif isinstance(prompt, str) and prompt.strip():
        if whole:
            _check_asked(prompt, chosen, rejected)
        else:
            head = [message("user", prompt)]
    shared = 0
    first, second = sides["chosen"], sides["rejected"]
    while shared < min(len(first), len(second)) and same(first[shared], second[shared]):
        shared += 1
    if not head:
        # The last assistant's turn at or before the place where they part.
        shared = min(shared, len(first) - 1, len(second) - 1)
        while shared > 0 and not first[shared]["role"] == second[shared]["role"] == "assistant":
            shared -= 1
    else:
        shared = next((n for n, item in enumerate(first[:shared]) if item["role"] == "assistant"), shared)
    head = [*head, *first[:shared]]
    sides = {name: side[shared:] for name, side in sides.items()}
    _check(head, sides, prompt if isinstance(prompt, list) else [])
    return {"prompt": head, **sides}


def _check_asked(prompt: str, chosen: list[Message], rejected: list[Message]) -> None:
    """A text prompt beside whole conversations must be what they ask."""
    wanted = _flat(prompt)
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        asked = [_flat(item["content"]) for item in side if item["role"] == "user"]
        if not any(text and (text in wanted or wanted in text) for text in asked):
            raise UnmappableError(
                "prompt_mismatch", f"the prompt is {prompt[:_CUT]!r}, and the user of {name} does not say that"
            )


def _check(head: list[Message], sides: dict[str, list[Message]], given: list[Message]) -> None:
    if not head:
        first = {name: side[0]["role"] if side else "nobody" for name, side in sides.items()}
        if set(first.values()) == {"assistant"}:
            raise UnmappableError("missing_field", "no prompt: both sides begin with the assistant")
        raise UnmappableError("prompt_mismatch", "the two conversations share no beginning, and there is no prompt")
    chosen, rejected = sides["chosen"], sides["rejected"]
    shorter = min(len(chosen), len(rejected))
    if len(chosen) != len(rejected) and all(map(same, chosen[:shorter], rejected[:shorter])):
        raise UnmappableError("prompt_mismatch", "one conversation goes on where the other ends")
    for name, side in sides.items():
        for place, item in (("begins", side[0]), ("ends", side[-1])):
            if item["role"] != "assistant":
                raise UnmappableError("not_assistant", f"{name} {place} with the {item['role']}'s words")
    if sum(item["role"] == "system" for item in head) > max(1, sum(item["role"] == "system" for item in given)):
        raise UnmappableError("prompt_mismatch", "the prompt has a system message and the conversations another")
    if head[-1]["role"] == "assistant":
        raise UnmappableError("not_assistant", "the prompt ends with the assistant's words")


def _after_system(prompt: list[Message]) -> list[Message]:
    start = next((n for n, item in enumerate(prompt) if item["role"] != "system"), len(prompt))
    return prompt[start:]


def _starts_with(side: list[Message], prompt: list[Message]) -> bool:
    return len(side) >= len(prompt) and all(map(same, prompt, side))


def _holds(side: list[Message], prompt: list[Message]) -> bool:
    """Whether a conversation has the prompt somewhere (after a system message of its own)."""
    return any(_starts_with(side[start:], prompt) for start in range(len(side)))


def _flat(text: str) -> str:
    return " ".join(text.split())
