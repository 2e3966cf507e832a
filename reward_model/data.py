"""What the reward model learns from: the pair set, as sequences that end where the score is read."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.trainer.reward_trainer import DataCollatorForPreference

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.resources import part
from ppo_vs_dpo.models.text.encoding import drop_long, encoded_pairs, soft_label_batch, soft_labels

COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids"]


@part("tokenising")
def reward_dataset(
    pairs: Dataset | Path,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    context: int | None = None,
    use_margin: bool = False,
    use_soft_labels: bool = True,
    cache: Path | None = None,
) -> Dataset:
    """Pairs as `PairCollator` takes them: ``prompt_ids``, ``chosen_ids`` and ``rejected_ids`` (answers, EOS included).

    Args:
        pairs: ``prompt``, ``chosen``, ``rejected`` and, where they are used, ``margin`` and ``soft_label``; in memory,
            or a Parquet file.
        max_length: pairs with a longer sequence are left out.
        use_margin: keep ``margin``; TRL subtracts it in the loss wherever the column exists.
        use_soft_labels: keep ``soft_label`` where there is one.
        cache: for a file: the folder of token ids (`models.text.encoding.encode_pair_file`).

    Raises:
        UserError: no rows, no margin in any, chat data without a chat template, pairs that do not fit.
    """
    encoded = encoded_pairs(tokenizer, pairs, cache)
    if use_margin:
        encoded = _checked_margins(encoded)
    encoded = drop_long(encoded, encoded["length"][:], max_length, context, "reward_model")
    labels = soft_labels(encoded, "reward_model") if use_soft_labels else []
    return encoded.select_columns([*COLUMNS, *(["margin"] if use_margin else []), *labels])


def _checked_margins(encoded: Dataset) -> Dataset:
    """A pair without a margin (null or NaN) has 0, the plain loss; `without_margin` says how many."""
    if "margin" not in encoded.column_names:
        raise UserError("reward_model.use_margin is on, and pairs/train.parquet has no column margin.")
    margins = encoded["margin"][:]
    known = [margin is not None and not math.isnan(margin) for margin in margins]
    if not any(known):
        raise UserError("reward_model.use_margin is on, and no pair has a margin.")
    wrong = [row for row, margin in enumerate(margins) if known[row] and math.isinf(margin)]
    if wrong:
        name = encoded[wrong[0]].get("pair_id", wrong[0])
        raise UserError(f"reward_model: pair {name} has the margin {margins[wrong[0]]}; it must be a number.")
    if all(known):
        return encoded
    plain = [margin if is_known else None for margin, is_known in zip(margins, known, strict=True)]
    return encoded.remove_columns("margin").add_column("margin", plain)


def without_margin(dataset: Dataset) -> list[str]:
    """A sentence where some pairs have no margin, to be said on the console."""
    if "margin" not in dataset.column_names:
        return []
    missing = sum(margin is None for margin in dataset["margin"][:])
    return [f"{missing} of {len(dataset)} pairs have no margin; their loss is the plain one."] if missing else []


@dataclass
class PairCollator(DataCollatorForPreference):
    """TRL's collator, from prompts and answers apart.

    ``soft_label`` ``(B,)`` is 1 where a pair has none, and ``margin`` ``(B,)`` 0.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Chosen sequences in the first half of the batch, rejected ones in the second."""
        sides = ("chosen_ids", "rejected_ids")
        whole = [{**row, **{side: row.get("prompt_ids", []) + row[side] for side in sides}} for row in examples]
        if "margin" in whole[0]:
            whole = [{**row, "margin": row["margin"] or 0.0} for row in whole]
        return {**super().torch_call(whole), **soft_label_batch(examples)}
