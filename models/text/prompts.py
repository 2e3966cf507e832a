"""From a prompt (text or conversation) and a completion to token ids, in one place."""

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ppo_vs_dpo.artifacts.errors import UserError

Prompt = str | list[dict[str, Any]]


def is_conversational(prompt: Any) -> bool:
    """Whether a prompt or completion is a list of messages."""
    return isinstance(prompt, list)


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a `UserError` for a tokenizer that cannot render conversations."""
    if not tokenizer.chat_template:
        raise UserError(
            f"the prompts are conversations, and the tokenizer {tokenizer.name_or_path} has no chat template. "
            f"Use an instruction-tuned model, give one in model.chat_template=FILE, or data with plain-text prompts."
        )


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """The text that the policy continues: the prompt itself, or the conversation with the generation header."""
    if isinstance(prompt, str):
        return prompt
    require_chat_template(tokenizer)
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids that the policy continues: with the tokenizer's own special tokens, or the chat template's.

    Raises:
        UserError: an empty prompt, or a conversation without a chat template.
    """
    if not prompt:
        raise UserError("an empty prompt: there is nothing to continue.")
    if isinstance(prompt, str):
        return encode_texts(tokenizer, [prompt])[0]
    require_chat_template(tokenizer)
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of text prompts, with the tokenizer's own special tokens in front, once.

    A text that begins with them (a chat template rendered it) gets no second ones: it is read as the template's.
    """
    if not texts:
        return []
    rows = tokenizer(list(texts), verbose=False)["input_ids"]
    mark = "".join(tokenizer.convert_ids_to_tokens(own_start(tokenizer)))
    for number, text in enumerate(texts):
        if mark and text.startswith(mark):
            rows[number] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [without_final_eos(tokenizer, row) for row in rows]


def own_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens (BOS, or GLM's two) that the tokenizer puts in front of every text."""
    own, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    places = [n for n in range(len(own) - len(bare) + 1) if own[n : n + len(bare)] == bare]
    return own[: places[0]] if places else []


def without_final_eos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Some tokenizers end every text with EOS; a prompt must not end."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def completion_text(completion: Prompt) -> str:
    """The text of a completion: itself, or the content of its message.

    Raises:
        UserError: an answer of several turns; whose words are whose only its prompt tells (`models.text.turns`).
    """
    if isinstance(completion, str):
        return completion
    if len(completion) != 1 or completion[0].get("role", "assistant") != "assistant":
        raise UserError(
            f"a completion of {len(completion)} messages ({', '.join(m.get('role', '?') for m in completion)}): one "
            f"message of the assistant is needed here."
        )
    return str(completion[0]["content"])


def without_eos_text(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A completion without the end-of-sequence marks that it carries as text; they are added as tokens."""
    mark = tokenizer.eos_token
    while mark and (bare := text.rstrip()).endswith(mark):
        text = bare[: -len(mark)]
    return text


def encode_completion(tokenizer: PreTrainedTokenizerBase, completion: Prompt, finished: bool = True) -> list[int]:
    """Token ids of a completion, with EOS at the end when it is finished.

    They are what the tokenizer makes of it after a prompt: see `completion_ids`.
    """
    ids = completion_ids(tokenizer, [completion])[0]
    return [*ids, tokenizer.eos_token_id] if finished else ids


def completion_ids(tokenizer: PreTrainedTokenizerBase, completions: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of completions as they stand after a prompt, so that prompt and completion are the text joined.

    An EOS that a text carries at its end (a template rendered it) is left out.

    Most tokenizers take a text the same way wherever it stands. Those of the SentencePiece kind put a space before
    every text, also before a completion, which continues one: they are given it after a mark, whose tokens are then
    taken off.
    """
    texts = [without_eos_text(tokenizer, completion_text(completion)) for completion in completions]
    if not texts:
        return []
    found: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    if not puts_a_space_first(tokenizer):
        return found
    for chat in (False, True):
        left = [row for row, completion in enumerate(completions) if is_conversational(completion) == chat]
        for mark in _marks(tokenizer, chat):
            start = tokenizer(mark, add_special_tokens=False)["input_ids"]
            if not left or not start:
                continue
            whole = tokenizer([mark + texts[row] for row in left], add_special_tokens=False, verbose=False)[
                "input_ids"
            ]
            # A mark that melts into the text shows it by other tokens at the start; the next one is tried.
            stands = {
                row: ids[len(start) :] for row, ids in zip(left, whole, strict=True) if ids[: len(start)] == start
            }
            for row, ids in stands.items():
                found[row] = ids
            left = [row for row in left if row not in stands]
    return found


def puts_a_space_first(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer reads a text as if a space stood before it (SentencePiece, or byte-level told to)."""
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[:1]
    return bool(first) and first[0][:1] in ("\u2581", "\u0120")


def _marks(tokenizer: PreTrainedTokenizerBase, chat: bool) -> list[str]:
    """Texts to put before a completion: what ends a conversation's prompt, or marks that seldom melt into words."""
    marks = ["\n", ")", "0"]
    if chat and tokenizer.chat_template:
        marks.insert(0, render_prompt(tokenizer, [{"role": "user", "content": "0"}]))
    return marks


def decode_completion(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    """The text of generated tokens, without special tokens and without tidying spaces.

    A space that the first token begins with is part of it, also where the tokenizer would take it off a text's start.
    """
    return decode_completions(tokenizer, [token_ids])[0]


def decode_completions(tokenizer: PreTrainedTokenizerBase, rows: Iterable[list[int]]) -> list[str]:
    """`decode_completion` of many: the tokenizer is asked once how it takes spaces."""
    space_first = puts_a_space_first(tokenizer)
    mark = tokenizer(")", add_special_tokens=False)["input_ids"] if space_first else []

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def after_mark(ids: list[int]) -> str:
        before, whole = text(mark), text([*mark, *ids])
        return whole[len(before) :] if before and whole.startswith(before) else text(ids)

    return [after_mark(ids) if space_first else text(ids) for ids in rows]


def truncate_prompt(prompt_ids: list[int], max_length: int | None) -> list[int]:
    """Keep the last ``max_length`` tokens: the end of a prompt is what the response answers."""
    return prompt_ids if max_length is None else prompt_ids[-max_length:]
