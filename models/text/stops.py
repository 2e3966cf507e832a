"""Strings that end a completion, looked for in its text."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase


def by_kind(strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> dict[bool, list[str]]:
    """The strings that are looked for in the plain text (under True), and those that hold special tokens
    (``<|im_end|>``), which plain text leaves out."""
    special = {*tokenizer.all_special_tokens}
    special |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    kinds: dict[bool, list[str]] = {True: [], False: []}
    for string in strings:
        kinds[not any(token in string for token in special)].append(string)
    return kinds


def stopped(tokens: torch.Tensor, tokenizer: PreTrainedTokenizerBase, kinds: dict[bool, list[str]]) -> list[bool]:
    """Which rows of ``tokens`` ``(B, n)`` hold one of the strings of `by_kind`."""
    found = [False] * len(tokens)
    for plain, strings in kinds.items():
        if strings:
            texts = tokenizer.batch_decode(tokens, skip_special_tokens=plain)
            found = [was or any(s in text for s in strings) for was, text in zip(found, texts, strict=True)]
    return found
