"""What SFT learns from: ``data/sft_train.parquet`` as token ids with the loss on the answer."""

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.resources import part
from ppo_vs_dpo.models.text.encoding import drop_long, encode_answers, encode_prompts
from ppo_vs_dpo.models.text.prompts import is_conversational, require_chat_template

# What TRL's SFTTrainer takes; the first match decides.
FORMATS = (("prompt", "completion"), ("messages",), ("text",))


def own_words(answer: list[int], mask: list[int] | None) -> list[int]:
    """Labels of an answer: its tokens, without those of others within an answer of several turns."""
    return answer if mask is None else [token if own else -100 for token, own in zip(answer, mask, strict=True)]


@part("tokenising")
def sft_dataset(
    examples: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    completion_only_loss: bool | None,
    max_length: int | None,
    context: int | None,
) -> Dataset:
    """Examples in a form that ``trl.SFTTrainer`` trains on.

    ``prompt`` and ``completion`` are turned into ``input_ids`` and ``labels`` here, by the rules that sampling and
    scoring use too (`models.text.encoding`). ``messages`` and ``text`` are left to TRL.

    Args:
        examples: columns of one of `FORMATS`.
        completion_only_loss: no loss on the prompt nor on others' turns (the default for prompt and completion).
        max_length: longer examples are left out.

    Raises:
        UserError: no known columns, an empty data set, chat data without a chat template, rows that do not fit.
    """
    columns = next((format for format in FORMATS if set(format) <= set(examples.column_names)), None)
    if columns is None:
        raise UserError(
            f"data/sft_train.parquet has the columns {', '.join(examples.column_names)}; SFT needs prompt and "
            f"completion, or messages, or text."
        )
    if len(examples) == 0:
        raise UserError("data/sft_train.parquet has no rows: there is nothing to learn from.")
    if columns != ("prompt", "completion"):
        if columns == ("messages",):
            require_chat_template(tokenizer)
        return examples.select_columns(list(columns))
    if any(is_conversational(prompt) for prompt in examples["prompt"][:]):
        require_chat_template(tokenizer)
    prompts = encode_prompts(tokenizer, examples["prompt"][:])
    answers, masks = encode_answers(tokenizer, examples["prompt"][:], examples["completion"][:])
    hidden = completion_only_loss is not False
    rows = Dataset.from_dict(
        {
            "input_ids": [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)],
            "labels": [
                ([-100] * len(prompt) if hidden else prompt) + (own_words(answer, mask) if hidden else answer)
                for prompt, answer, mask in zip(prompts, answers, masks, strict=True)
            ],
        }
    )
    return drop_long(rows, [len(ids) for ids in rows["input_ids"][:]], max_length, context, "sft")
