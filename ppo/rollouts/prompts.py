"""The prompts: encoded once, drawn in an order that depends on the seed and the update alone."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ppo_vs_dpo.artifacts.errors import UserError, first_sentence, short
from ppo_vs_dpo.models.loading.pretrained import context_length
from ppo_vs_dpo.models.passes.logprobs import base
from ppo_vs_dpo.models.text.chat_template import is_rendered
from ppo_vs_dpo.models.text.prompts import encode_prompt, truncate_prompt
from ppo_vs_dpo.ppo.config import PPOConfig
from ppo_vs_dpo.ppo.roles.roles import Roles

logger = logging.get_logger(__name__)


def allowed_prompt_length(policy: PreTrainedModel, response_length: int, max_prompt_length: int | None) -> int | None:
    """Tokens a prompt may have: ``max_prompt_length``, and what the response leaves of the context; ``None``: any.

    Raises:
        UserError: the response takes the whole context.
    """
    limit = context_length(policy)
    if limit is not None and response_length >= limit:
        raise UserError(
            f"ppo.response_length is {response_length}, and the model's context has {limit} positions: no room is "
            f"left "
            f"for a prompt. Lower response_length."
        )
    given = [n for n in (max_prompt_length, None if limit is None else limit - response_length) if n is not None]
    return min(given) if given else None


# What a tokenizer makes of a prompt; for the policy, not for reward functions.
ENCODED = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
# Names under which reward functions get what sampling found.
TAKEN = ("prompts", "completions", "prompt_ids", "response_ids", "finished", "reference_answers", "self")


def as_dataset(rows: Any, name: str) -> Dataset | None:
    """Prompts in any of the forms that people have: a data set, a list of rows, a streamed data set (read whole).

    Raises:
        UserError: something else, or a row that is no row; names it.
    """
    if rows is None or isinstance(rows, Dataset):
        return rows
    if isinstance(rows, DatasetDict | IterableDatasetDict):
        raise UserError(
            f"{name} has the splits {', '.join(rows)}; give one of them, {name}[{next(iter(rows), '')!r}]."
        )
    if isinstance(rows, str | bytes | dict) or not isinstance(rows, Iterable):
        raise UserError(f"{name} is a {type(rows).__name__}; a datasets.Dataset or a list of rows is needed.")
    rows = list(rows)
    wrong = next((number for number, row in enumerate(rows) if not isinstance(row, dict)), None)
    if wrong is not None:
        raise UserError(f"{name}, row {wrong}: a {type(rows[wrong]).__name__}, and a row is a dict with prompt.")
    kinds: dict[str, int] = {}
    for number, row in enumerate(rows):
        if row.get("prompt") is not None:
            kinds.setdefault(type(row["prompt"]).__name__, number)
    if len(kinds) > 1:
        found = ", ".join(f"{kind} (row {number})" for kind, number in kinds.items())
        raise UserError(f"{name}: prompts are {found}; all must be texts, or all lists of messages.")
    try:
        return Dataset.from_list(rows)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(f"{name}: its rows are of different kinds ({first_sentence(error)}).") from None


class PromptSet:
    """Prompts as token ids, with the other columns of their data set.

    Args:
        dataset: with a column ``prompt`` (text, or messages for the chat template), or ``input_ids`` as TRL <= 1.12
            had, padded or not, with ``attention_mask`` or without. Where there are both they must be the same tokens.
            ``position_ids`` that count the real tokens from 0 say nothing new, and others are refused.
        tokenizer: the policy's.
        max_length: of a prompt, in tokens; ``None``: no limit.
        truncate: cut over-long prompts from the left instead of stopping.
        name: for messages.

    Raises:
        UserError: no such column, one of a name in `TAKEN`, an empty prompt, one that is too long, or token ids that
            are none; names the row.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        truncate: bool = False,
        name: str = "train_dataset",
    ):
        dataset = as_dataset(dataset, name)
        if dataset is None or len(dataset) == 0:
            raise UserError(f"{name} has no prompts.")
        columns = list(dataset.column_names)
        written = _without_padding(dataset, tokenizer, name) if "input_ids" in columns else None
        given: list[list[int]] | None = None
        self.as_typed = "prompt" in columns
        if self.as_typed:
            self.prompts = list(dataset["prompt"])
        elif written is not None:
            given = written
            self.prompts = tokenizer.batch_decode(given, skip_special_tokens=True)
        else:
            raise UserError(f"{name} has no column prompt (nor input_ids); it has {', '.join(columns)}.")
        self.ids: list[list[int]] = []
        for row, prompt in enumerate(self.prompts):
            if given is None and not isinstance(prompt, str | list | type(None)):
                kind = type(prompt).__name__
                raise UserError(f"{name}, row {row}: the prompt is a {kind}; text or messages are needed.")
            if (given is None and not prompt) or (given is not None and not given[row]):
                raise UserError(f"{name}, row {row}: the prompt is empty.")
            ids = encode_prompt(tokenizer, prompt) if given is None else given[row]
            if given is None and written is not None and written[row] != ids:
                raise UserError(
                    f"{name}, row {row}: the columns prompt and input_ids are not the same tokens ({ids[:8]} ... and "
                    f"{written[row][:8]} ...). Which is meant? Remove the other: {name}.remove_columns('input_ids')."
                )
            if max_length is not None and len(ids) > max_length:
                if not truncate:
                    raise UserError(
                        f"{name}, row {row}: the prompt has {len(ids)} tokens, and {max_length} are allowed "
                        f"(max_prompt_length, or the context less response_length). Shorten it, raise the limit, or "
                        f"set "
                        f"truncate_prompts=true to cut such prompts from the left."
                    )
                ids = truncate_prompt(ids, max_length)
            self.ids.append(ids)
        taken = [c for c in columns if c in TAKEN]
        if taken:
            raise UserError(
                f"{name} has a column {taken[0]}, the name under which reward functions get what sampling found. "
                f"Rename it: {name}.rename_column({taken[0]!r}, 'my_{taken[0]}')."
            )
        other = [c for c in columns if c not in ("prompt", *ENCODED)]
        self.name = name
        self.columns: dict[str, list[Any]] = {column: list(dataset[column]) for column in other}

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.ids))

    def columns_of(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        """The other columns of some rows, as reward functions take them."""
        return {name: [values[row] for row in rows] for name, values in self.columns.items()}

    def drawn_for(self, update: int, size: int, seed: int) -> list[int]:
        """Rows of the prompts of one update.

        The prompts are shuffled afresh for each pass over them (N+ detail 21); updates take them in turn. The answer
        is a function of the arguments alone, so a resumed run needs no cursor.
        """
        positions = np.arange(update * size, (update + 1) * size)
        passes = positions // len(self)
        order = {p: self._shuffled(seed, int(p)) for p in np.unique(passes)}
        return [int(order[p][i]) for p, i in zip(passes, positions % len(self), strict=True)]

    def _shuffled(self, seed: int, epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(self))


def _without_padding(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, name: str) -> list[list[int]]:
    """The column ``input_ids`` less what is padding: where ``attention_mask`` is 0, or where there is no such column
    the padding tokens at either end, as TRL <= 1.12 masked them.

    Raises:
        UserError: a mask of another length; padding that could as well be text, since it is the end-of-sequence token.
    """
    size, pad, eos = len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id
    rows = []
    for row, ids in enumerate(dataset["input_ids"]):
        wrong = _not_ids(ids, size)
        if wrong:
            raise UserError(f"{name}, row {row}: input_ids {wrong}; it must be a list of ids of this tokenizer.")
        rows.append([int(token) for token in ids])
    if "attention_mask" in dataset.column_names:
        for row, mask in enumerate(dataset["attention_mask"]):
            if mask is None or len(mask) != len(rows[row]):
                found = "none" if mask is None else len(mask)
                raise UserError(
                    f"{name}, row {row}: input_ids has {len(rows[row])} entries and attention_mask {found}."
                )
            rows[row] = [token for token, real in zip(rows[row], mask, strict=True) if real]
        _check_positions(dataset, dataset["attention_mask"], name)
        return rows
    _check_positions(dataset, [[1] * len(ids) for ids in rows], name)
    for row, ids in enumerate(rows):
        start, stop = 0, len(ids)
        while start < stop and ids[start] == pad:
            start += 1
        while stop > start and ids[stop - 1] == pad:
            stop -= 1
        if pad == eos and (start > 1 or len(ids) - stop > 1):
            # One may be meant (a beginning of text, the end of a turn); a run of them is padding, or not.
            raise UserError(
                f"{name}, row {row}: input_ids begins or ends with several {tokenizer.pad_token}, which pads and also "
                f"ends sequences: which of them are padding? Give a column attention_mask, or ids without padding."
            )
        if pad != eos:
            rows[row] = ids[start:stop]
    return rows


def _not_ids(ids: Any, size: int) -> str:
    """What is wrong with a row of token ids; nothing: ``""``."""
    if not isinstance(ids, list | tuple):
        return f"is {ids!r}"
    for place, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int | np.integer | float) or token != int(token):
            what = f"{token!r}"
            return f"has {what[:40]} at place {place}"
        if not 0 <= token < size:
            return f"has {int(token)} at place {place}, and the tokenizer has the ids 0 to {size - 1}"
    return ""


def _check_positions(dataset: Dataset, masks: Sequence[Sequence[int]], name: str) -> None:
    """A column ``position_ids`` may count the real tokens from 0, as every pass here does; nothing else."""
    if "position_ids" not in dataset.column_names:
        return
    for row, (positions, mask) in enumerate(zip(dataset["position_ids"], masks, strict=True)):
        real = [int(p) for p, one in zip(positions or [], mask, strict=False) if one]
        if real != list(range(sum(map(bool, mask)))):
            raise UserError(
                f"{name}, row {row}: position_ids are {list(positions or [])[:8]} ..., and positions here count the "
                f"real tokens from 0. Remove the column, or leave such prompts out."
            )


def _check_value_context(roles: Roles, longest: int, budget: int) -> None:
    limit = None if roles.value is None else context_length(base(roles.value))
    if limit is not None and longest + budget > limit:
        raise UserError(
            f"value_model takes {limit} tokens, and the longest prompt ({longest}) with a response of {budget} "
            f"(ppo.response_length) has {longest + budget}. Lower response_length or max_prompt_length, or take a "
            f"value model with the policy's context."
        )


def say_where_no_turn(prompts: PromptSet, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn where a chat model would read bare text: it may be meant, and nothing else would show it."""
    first = prompts.prompts[0]
    if prompts.as_typed and isinstance(first, str) and tokenizer.chat_template and not is_rendered(tokenizer, first):
        logger.warning(
            "the prompts are plain text, and the policy is a chat model (its tokenizer has a chat template): it reads "
            "%s as it is, with no turn around it. To ask it as a user would, give messages: "
            '{"prompt": [{"role": "user", "content": ...}]}.',
            short(first, 60),
        )


def prompt_sets(
    train: Dataset | None, evaluation: Dataset | None, roles: Roles, args: PPOConfig
) -> tuple[PromptSet, PromptSet | None]:
    """The prompts to train on and, where there are any, those of the evaluation.

    Raises:
        UserError: a prompt that cannot be used, by policy or reward model, or evaluations without prompts.
    """
    budget = args.sampling().max_new_tokens
    limit = allowed_prompt_length(roles.policy, budget, args.max_prompt_length)
    if evaluation is None and args.eval_strategy != "no":
        raise UserError(
            f"ppo.eval_strategy is {args.eval_strategy.value} and there is no eval_dataset: pass prompts to "
            f"evaluate on, or eval_strategy=no."
        )
    sets = [PromptSet(train, roles.tokenizer, limit, args.truncate_prompts)]
    if evaluation is not None:
        sets.append(PromptSet(evaluation, roles.tokenizer, limit, args.truncate_prompts, "eval_dataset"))
    say_where_no_turn(sets[0], roles.tokenizer)
    for one in sets:
        roles.rewards.check_context(one.prompts, one.longest, budget)
        _check_value_context(roles, one.longest, budget)
    return sets[0], sets[1] if len(sets) > 1 else None
