"""One pair as the model reads it: every token, and which of them carry loss."""

import itertools
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from ppo_vs_dpo.models.text.encoding import encode_answers, encode_prompts


def sequence_of(tokenizer: PreTrainedTokenizerBase, pair: dict[str, Any]) -> dict[str, dict[str, list]]:
    """``chosen`` and ``rejected``, each with ``ids``, ``tokens`` (their texts) and ``loss`` (1 where trained).

    The same functions make them that make the training data, so this is what SFT and DPO train on and what the reward
    model reads.
    """
    prompts = [pair["prompt"]]
    head = encode_prompts(tokenizer, prompts)[0]
    found = {}
    for side in ("chosen", "rejected"):
        (ids,), (mask,) = encode_answers(tokenizer, prompts, [pair[side]])
        whole = [*head, *ids]
        loss = [0] * len(head) + (mask or [1] * len(ids))
        found[side] = {"ids": whole, "tokens": pieces(tokenizer, whole), "loss": loss}
    return found


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text that each token adds to those before it; joined they are the text. Half a character adds none."""
    found, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and end < len(ids):
            found.append("")
            continue
        found.append(text[len(before) :])
        before = text
    return found


def show_sequence(sequence: dict[str, dict[str, list]], model: str, console: Console, tokens: bool = False) -> None:
    """Print a pair's two sequences: a line for each run of tokens with the same mask, or a line for each token."""
    console.print(f"\n[bold]What the model reads[/] of the first pair ({escape(model)}); ⏎ is a line break")
    for side, parts in sequence.items():
        trained = sum(parts["loss"])
        last = escape(parts["tokens"][-1])
        console.print(f"  [bold]{side}[/]: {len(parts['ids'])} tokens, loss on {trained}; score read at {last!r}")
        if tokens:
            table = Table("token", "id", "loss", box=None, pad_edge=False, show_header=True)
            for text, token, loss in zip(parts["tokens"], parts["ids"], parts["loss"], strict=True):
                table.add_row(f"    {escape(_line(text))}", str(token), "loss" if loss else "")
            console.print(table)
            continue
        for loss, run in itertools.groupby(zip(parts["loss"], parts["tokens"], strict=True), key=lambda item: item[0]):
            text = escape(_line("".join(piece for _, piece in run)))
            console.print(f"    [green]loss    │ {text}[/]" if loss else f"    [dim]no loss │ {text}[/]")


def _line(text: str) -> str:
    return text.replace("\n", "⏎")
