"""What DPO learns from: the pair set, as token ids."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.trainer.dpo_trainer import DataCollatorForPreference

from ppo_vs_dpo.artifacts.resources import part
from ppo_vs_dpo.models.text.encoding import (
    MASKS,
    drop_long,
    encoded_pairs,
    soft_label_batch,
    soft_labels,
    turn_masks,
)

COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids"]
# Marks a batch with a pair that the reference has not read.
UNREAD = "unread"


@part("tokenising")
def dpo_dataset(
    pairs: Dataset | Path,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    context: int | None = None,
    use_soft_labels: bool = True,
    limit: int | None = None,
    cache: Path | None = None,
) -> Dataset:
    """Pairs as ``prompt_ids``, ``chosen_ids``, ``rejected_ids``; the answers end with EOS.

    Args:
        pairs: ``prompt``, ``chosen``, ``rejected`` and perhaps ``soft_label``; in memory, or a Parquet file.
        max_length: pairs with a longer sequence are left out (the reward model leaves out the same ones).
        use_soft_labels: keep ``soft_label`` where there is one.
        cache: for a file: the folder of token ids (`models.text.encoding.encode_pair_file`).

    Raises:
        UserError: no rows, chat data without a chat template, pairs that do not fit.
    """
    encoded = encoded_pairs(tokenizer, pairs, cache)
    if limit is not None and limit < len(encoded):
        encoded = encoded.select(range(limit))
    encoded = drop_long(encoded, encoded["length"][:], max_length, context, "dpo")
    labels = soft_labels(encoded, "dpo") if use_soft_labels else []
    return encoded.select_columns([*COLUMNS, *turn_masks(encoded), *labels])


@dataclass
class PairCollator(DataCollatorForPreference):
    """TRL's collator, with three things added.

    ``soft_label`` ``(B,)``, where the pairs have it, is 1 for a pair without one. ``completion_mask`` ``(2B, T)`` is 0
    where others speak within an answer of several turns.

    A pair whose ``ref_chosen_logps`` is NaN marks its batch: ``unread`` is True there, and missing elsewhere.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Chosen sequences in the first half of the batch, rejected ones in the second."""
        batch = super().torch_call(examples)
        for half, name in enumerate(MASKS):
            for row, example in enumerate(examples):
                if example.get(name) is not None:
                    start, mask = len(example["prompt_ids"]), torch.tensor(example[name], dtype=torch.long)
                    batch["completion_mask"][half * len(examples) + row, start : start + len(mask)] = mask
        unread = any(math.isnan(example.get("ref_chosen_logps", 0.0)) for example in examples)
        return {**batch, **soft_label_batch(examples), **({UNREAD: True} if unread else {})}
