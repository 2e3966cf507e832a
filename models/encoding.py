"""Whole data sets as token ids, by the rules of `models.prompts`, in batches.

Why not TRL's own tokenisation: it renders a conversation whole, and many chat templates put a line break after the
token that ends the answer; the reward would be trained at that line break, which no rollout contains. Here a sequence
is what the policy sees and writes: the prompt with the header of the answer, the answer, EOS.
"""

from collections.abc import Iterable, Sequence

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from artifacts.errors import UserError
from models.prompts import (
    Prompt,
    completion_text,
    encode_prompt,
    is_conversational,
    require_chat_template,
    without_final_eos,
)


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """`models.prompts.encode_prompt` of every prompt.

    Raises:
        UserError: an empty prompt (names its row), conversations without a chat template.
    """
    empty = [row for row, prompt in enumerate(prompts) if not prompt]
    if empty:
        raise UserError(f"row {empty[0]}: an empty prompt ({len(empty)} in all): there is nothing to continue.")
    if any(is_conversational(prompt) for prompt in prompts):
        require_chat_template(tokenizer)
        return [encode_prompt(tokenizer, prompt) for prompt in prompts]
    ids = tokenizer(list(prompts), verbose=False)["input_ids"] if prompts else []
    return [without_final_eos(tokenizer, row) for row in ids]


def encode_completions(
    tokenizer: PreTrainedTokenizerBase, completions: Sequence[Prompt], finished: Iterable[bool] | None = None
) -> list[list[int]]:
    """`models.prompts.encode_completion` of every completion: its tokens and, where finished (all by default), EOS."""
    texts = [completion_text(completion) for completion in completions]
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    ends = [True] * len(ids) if finished is None else list(finished)
    return [[*row, tokenizer.eos_token_id] if end else row for row, end in zip(ids, ends, strict=True)]


def encode_pairs(tokenizer: PreTrainedTokenizerBase, pairs: Dataset) -> Dataset:
    """Pairs (``prompt``, ``chosen``, ``rejected``) as ``prompt_ids``, ``chosen_ids``, ``rejected_ids``.

    The two answers end with EOS and do not include the prompt. All other columns are kept.
    """
    columns = {
        "prompt_ids": encode_prompts(tokenizer, pairs["prompt"][:]),
        "chosen_ids": encode_completions(tokenizer, pairs["chosen"][:]),
        "rejected_ids": encode_completions(tokenizer, pairs["rejected"][:]),
    }
    kept = {name: pairs[name][:] for name in pairs.column_names if name not in columns}
    return Dataset.from_dict({**kept, **columns})


def pair_lengths(pairs: Dataset) -> list[int]:
    """Tokens of the longer sequence (prompt and answer) of each encoded pair."""
    rows = zip(pairs["prompt_ids"][:], pairs["chosen_ids"][:], pairs["rejected_ids"][:], strict=True)
    return [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in rows]


def drop_long(rows: Dataset, lengths: Sequence[int], limit: int | None, context: int | None, where: str) -> Dataset:
    """Leave out rows longer than ``limit``; what is left must fit into the model.

    Pairs are dropped, never cut: the reward model and DPO must learn from the same ends.

    Args:
        rows: encoded rows.
        lengths: tokens of each.
        limit: ``max_length`` of the stage, ``None`` for no limit.
        context: the model's context length, ``None`` where it has none.
        where: the stage, for messages.

    Raises:
        UserError: all rows are too long, or one does not fit into the context; names it.
    """
    kept = [row for row, length in enumerate(lengths) if limit is None or length <= limit]
    if not kept and lengths:
        raise UserError(
            f"{where}.max_length is {limit} tokens and the shortest of {len(lengths)} rows has {min(lengths)}: "
            f"nothing is left to train on. Raise {where}.max_length."
        )
    longest = max(kept, key=lambda row: lengths[row], default=None)
    if longest is not None and context is not None and lengths[longest] > context:
        name = rows[longest].get("pair_id", longest)
        raise UserError(
            f"{where}: row {name} has {lengths[longest]} tokens and the model takes {context}. "
            f"Set {where}.max_length={context} (longer rows are left out) or choose a model with a longer context."
        )
    return rows if len(kept) == len(rows) else rows.select(kept)
