"""What DPO learns from: the pair set, as token ids."""

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from artifacts.errors import UserError
from models.encoding import drop_long, encode_pairs, pair_lengths

COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids"]


def dpo_dataset(
    pairs: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    context: int | None = None,
) -> Dataset:
    """Pairs as ``prompt_ids``, ``chosen_ids``, ``rejected_ids``; the answers end with EOS.

    Args:
        pairs: ``prompt``, ``chosen``, ``rejected``.
        tokenizer: of the policy.
        max_length: pairs with a longer sequence are left out (the reward model leaves out the same ones).
        context: the model's context length.

    Raises:
        UserError: no rows, chat data without a chat template, pairs that do not fit.
    """
    if len(pairs) == 0:
        raise UserError("pairs/train.parquet has no rows: there is nothing to learn from.")
    encoded = encode_pairs(tokenizer, pairs)
    return drop_long(encoded, pair_lengths(encoded), max_length, context, "dpo").select_columns(COLUMNS)
