"""What a chat template does to a conversation, found by rendering: what is left out, added, or there already."""

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ppo_vs_dpo.models.text.prompts import (
    Prompt,
    encode_completion,
    encode_prompt,
    is_conversational,
    render_prompt,
)

_PROBE = "0"
_SHOWN = 40


def marks_of(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The special tokens that frame a sequence or a turn: BOS, EOS, and those that the chat template writes."""
    special = {str(token) for token in tokenizer.all_special_tokens}
    found = {mark for mark in (tokenizer.bos_token, tokenizer.eos_token) if mark}
    if tokenizer.chat_template:
        rendered = _rendered(tokenizer, [{"role": "user", "content": _PROBE}])
        found |= {token for token in special if token in rendered}
    return frozenset(found)


def is_rendered(tokenizer: PreTrainedTokenizerBase, prompt: str) -> bool:
    """Whether a text prompt ends as the chat template lets an answer begin: it was rendered already."""
    if not tokenizer.chat_template:
        return False
    _, _, tail = _rendered(tokenizer, [{"role": "user", "content": _PROBE}]).rpartition(_PROBE)
    return bool(tail.strip()) and prompt.rstrip().endswith(tail.strip())


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str:
    """The text of a conversation with the header of the answer; empty where the template refuses it."""
    try:
        return render_prompt(tokenizer, messages)
    except TemplateError:
        return ""


def marks_inside(marks: frozenset[str], value: Prompt, answer: bool = False) -> list[str]:
    """Marks that a text carries where only the template, or the end of an answer, may put them.

    ``marks`` are from `marks_of`; the end of an ``answer`` may have one (it is taken off).
    """
    if not answer and not is_conversational(value):
        return []  # a text prompt may be rendered
    texts = [message["content"] for message in value] if is_conversational(value) else [value]
    if answer:
        texts[-1] = texts[-1].rstrip()
        for mark in marks:
            texts[-1] = texts[-1].removesuffix(mark).rstrip()
    return sorted(mark for mark in marks if any(mark in text for text in texts))


def left_out(tokenizer: PreTrainedTokenizerBase, prompt: list[dict[str, Any]]) -> list[str]:
    """Roles of a prompt whose words the chat template does not write.

    Raises:
        jinja2.TemplateError: the template refuses the conversation.
    """
    rendered = "".join(render_prompt(tokenizer, prompt).split())
    missing = []
    for message in prompt:
        # Reasoning of earlier turns is taken out by design.
        said = "".join(message["content"].rpartition("</think>")[2].split())
        if said not in rendered:
            missing.append(message["role"])
    return missing


def disagreement(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answer: Prompt) -> str | None:
    """Where training reads another sequence than the template writes of prompt and answer; ``None``: nowhere.

    What the template puts after EOS does not count (`models.text.encoding` says why).
    """
    if not is_conversational(prompt) or len(answer) != 1:
        return None
    ours = [*encode_prompt(tokenizer, prompt), *encode_completion(tokenizer, answer)]
    try:
        theirs = tokenizer.apply_chat_template([*prompt, *answer], tokenize=True, return_dict=True)["input_ids"]
    except TemplateError as error:
        return f"the chat template refuses the first pair with its answer ({error})."
    if theirs[: len(ours)] == ours:
        return None
    same = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    here, there = (tokenizer.decode(ids[same:])[:_SHOWN] for ids in (ours, theirs))
    if same == len(ours) - 1:
        return (
            f"training ends an answer with {tokenizer.eos_token!r} (the tokenizer's EOS), and the chat template ends "
            f"it with {there!r}. A chat model expects the latter: see whether model.path has the right EOS token."
        )
    return (
        f"training and sampling read {here!r} where the chat template itself writes {there!r} (after "
        f"{tokenizer.decode(ours[max(0, same - 8) : same])!r})."
    )
