"""What the reward model learns from: the pair set, as sequences that end where the score is read."""

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from artifacts.errors import UserError
from models.encoding import drop_long, encode_pairs, pair_lengths


def reward_dataset(
    pairs: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    context: int | None = None,
    use_margin: bool = False,
) -> Dataset:
    """Pairs as ``trl.RewardTrainer`` takes them: ``chosen_ids`` and ``rejected_ids``, prompt and EOS included.

    Args:
        pairs: ``prompt``, ``chosen``, ``rejected`` and, with ``use_margin``, ``margin``.
        tokenizer: of the reward model.
        max_length: pairs with a longer sequence are left out.
        context: the model's context length.
        use_margin: keep ``margin``; TRL subtracts it in the loss wherever the column exists.

    Raises:
        UserError: no rows, a missing margin, chat data without a chat template, pairs that do not fit.
    """
    if len(pairs) == 0:
        raise UserError("pairs/train.parquet has no rows: there is nothing to learn from.")
    if use_margin and "margin" not in pairs.column_names:
        raise UserError("reward_model.use_margin is on, and pairs/train.parquet has no column margin.")
    encoded = encode_pairs(tokenizer, pairs)
    encoded = drop_long(encoded, pair_lengths(encoded), max_length, context, "reward_model")
    columns = {
        side: [prompt + answer for prompt, answer in zip(encoded["prompt_ids"][:], encoded[side][:], strict=True)]
        for side in ("chosen_ids", "rejected_ids")
    }
    if use_margin:
        columns["margin"] = encoded["margin"][:]
    return Dataset.from_dict(columns)
