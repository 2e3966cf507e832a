"""Whole data sets as token ids, by the rules of `models.text.prompts`, in batches.

Why not TRL's own tokenisation: it renders a conversation whole, and many chat templates put a line break after the
token that ends the answer; the reward would be trained at that line break, which no rollout contains. Here a sequence
is what the policy sees and writes: the prompt with the header of the answer, the answer, EOS.
"""

import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from filelock import FileLock
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ppo_vs_dpo.artifacts.errors import UserError, not_the_file
from ppo_vs_dpo.artifacts.files import atomic_path, fingerprint_file, sha256_of
from ppo_vs_dpo.artifacts.resources import part
from ppo_vs_dpo.models.text.prompts import (
    Prompt,
    completion_ids,
    encode_prompt,
    encode_texts,
    is_conversational,
    require_chat_template,
)
from ppo_vs_dpo.models.text.turns import encode_turns

TEXTS = ("prompt", "chosen", "rejected")
MASKS = ("chosen_mask", "rejected_mask")
# Counted up when the functions below make other tokens of the same texts: what was cached before is not read.
RULES = 2
_CHUNK = 1_000


@part("tokenising")
def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], first_row: int = 0
) -> list[list[int]]:
    """`models.text.prompts.encode_prompt` of every prompt.

    ``first_row`` is the number of the first one in its file, for messages.

    Raises:
        UserError: an empty prompt (names its row), conversations without a chat template.
    """
    empty = [row for row, prompt in enumerate(prompts, start=first_row) if not prompt]
    if empty:
        raise UserError(f"row {empty[0]}: an empty prompt ({len(empty)} in all): there is nothing to continue.")
    if any(is_conversational(prompt) for prompt in prompts):
        require_chat_template(tokenizer)
        return [encode_prompt(tokenizer, prompt) for prompt in prompts]
    return encode_texts(tokenizer, prompts)


@part("tokenising")
def encode_completions(
    tokenizer: PreTrainedTokenizerBase, completions: Sequence[Prompt], finished: Iterable[bool] | None = None
) -> list[list[int]]:
    """`models.text.prompts.encode_completion` of every completion: its tokens and, where finished (all by default),
    EOS."""
    ids = completion_ids(tokenizer, completions)
    ends = [True] * len(ids) if finished is None else list(finished)
    return [[*row, tokenizer.eos_token_id] if end else row for row, end in zip(ids, ends, strict=True)]


def encode_answers(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    completions: Sequence[Prompt],
    finished: Iterable[bool] | None = None,
) -> tuple[list[list[int]], list[list[int] | None]]:
    """Completions after their prompts, of one turn (`encode_completions`) or several (`turns.encode_turns`).

    Returns:
        Token ids, and for each completion which of its tokens are the assistant's own; ``None`` where all are.
    """
    ends = [True] * len(completions) if finished is None else list(finished)
    several = [
        row for row, completion in enumerate(completions) if isinstance(completion, list) and len(completion) > 1
    ]
    if not several:
        return encode_completions(tokenizer, completions, ends), [None] * len(completions)
    ids: list[list[int]] = [[]] * len(completions)
    masks: list[list[int] | None] = [None] * len(completions)
    single = sorted(set(range(len(completions))) - set(several))
    found = encode_completions(tokenizer, [completions[row] for row in single], [ends[row] for row in single])
    for row, tokens in zip(single, found, strict=True):
        ids[row] = tokens
    for row in several:
        ids[row], masks[row] = encode_turns(tokenizer, prompts[row], completions[row], ends[row])
    return ids, masks


def encoded_pairs(tokenizer: PreTrainedTokenizerBase, pairs: Dataset | Path, cache: Path | None = None) -> Dataset:
    """What a branch learns from: `encode_pairs` of rows in memory, or `encode_pair_file` (by default beside the file).

    Raises:
        UserError: no rows, or what those raise.
    """
    if isinstance(pairs, Path):
        return encode_pair_file(tokenizer, pairs, cache or pairs.parent / "tokens")
    if len(pairs) == 0:
        raise UserError("pairs/train.parquet has no rows: there is nothing to learn from.")
    return encode_pairs(tokenizer, pairs)


@part("tokenising")
def encode_pairs(tokenizer: PreTrainedTokenizerBase, pairs: Dataset) -> Dataset:
    """Pairs (``prompt``, ``chosen``, ``rejected``) as ``prompt_ids``, ``chosen_ids``, ``rejected_ids``, in memory.

    The two answers end with EOS and do not include the prompt; ``length`` is the tokens of the longer sequence (prompt
    and answer). ``chosen_mask`` and ``rejected_mask`` say of an answer of several turns which tokens are the
    assistant's; they are null where all are. The texts are left out, all other columns kept.
    """
    batches = pairs.with_format("arrow").iter(batch_size=_CHUNK) if len(pairs) else [pairs.data.table]
    return Dataset(pa.concat_tables(_encoded_tables(tokenizer, batches)))


@part("tokenising")
def encode_pair_file(tokenizer: PreTrainedTokenizerBase, path: Path, cache: Path) -> Dataset:
    """`encode_pairs` of a Parquet file, a thousand pairs at a time: neither texts nor token ids fill the memory.

    Args:
        cache: a folder for token ids. They are named by the content of the pairs and the tokenizer: who comes second
            (the other branch, a sweep point, a resumed run) finds them there.

    Returns:
        The encoded pairs, mapped into memory from the disk.

    Raises:
        UserError: no such file, half a file, no rows, a missing column, an empty prompt.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist. Run the stage that writes it first.")
    made_from = [RULES, fingerprint_file(path), tokenizer_fingerprint(tokenizer)]
    target = cache / f"{sha256_of(made_from)[:24]}.arrow"
    # The ranks of a machine come at the same time, and so may the branch beside this one: one works, the others find
    # it done.
    with _alone(target):
        if target.is_file() and not _first_agrees(tokenizer, path, target):
            target.unlink()
        if not target.is_file():
            _write_tokens(tokenizer, path, target)
    return Dataset.from_file(str(target))


def _alone(target: Path) -> FileLock:
    """A lock that processes of this machine and user share for a file, in its folder for temporary files."""
    name = sha256_of([str(target.resolve()), os.getuid()])[:24]
    return FileLock(Path(tempfile.gettempdir()) / f"ppo_vs_dpo-{name}.lock")


def _write_tokens(tokenizer: PreTrainedTokenizerBase, path: Path, target: Path) -> None:
    try:
        pq.read_metadata(path)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a complete Parquet file ({error}). Run its stage again.") from None
    with pq.ParquetFile(path) as table, atomic_path(target) as temporary:
        if table.metadata.num_rows == 0:
            raise UserError(f"{path} has no rows: there is nothing to learn from.")
        missing = [name for name in TEXTS if name not in table.schema_arrow.names]
        if missing:
            have = ", ".join(table.schema_arrow.names)
            raise UserError(f"{path} has no column {', '.join(missing)}; it has {have}.")
        bar = tqdm(total=table.metadata.num_rows, desc=f"tokenising {path.name}", unit="pairs", disable=None)
        batches = _encoded_tables(tokenizer, table.iter_batches(batch_size=_CHUNK))
        first = next(batches)
        with pa.OSFile(str(temporary), "wb") as out, pa.ipc.new_stream(out, first.schema) as writer:
            for batch in itertools.chain([first], batches):
                writer.write_table(batch)
                bar.update(len(batch))
        bar.close()


def _first_agrees(tokenizer: PreTrainedTokenizerBase, path: Path, cached: Path) -> bool:
    """Whether the cache holds as many pairs as there are, the first with the tokens that the tokenizer makes of it.

    The cache's name knows texts and tokenizer, not the version of the libraries that tokenised; and a stream that was
    cut where a chunk ends reads as a shorter one.
    """
    try:
        kept = Dataset.from_file(str(cached))
    except (pa.ArrowException, OSError, ValueError) as error:
        if not_the_file(error):
            raise
        return False
    with pq.ParquetFile(path) as table:
        if len(kept) != table.metadata.num_rows:
            return False
        first = next(table.iter_batches(batch_size=1), None)
    if first is None:
        return True
    pair, then = first.to_pylist()[0], kept[0]
    prompts = [pair["prompt"]]
    now = {"prompt_ids": encode_prompts(tokenizer, prompts)[0]}
    for side, mask in zip(("chosen", "rejected"), MASKS, strict=True):
        (now[f"{side}_ids"],), (now[mask],) = encode_answers(tokenizer, prompts, [pair[side]])
    return all(then.get(name) == value for name, value in now.items())


def _encoded_tables(
    tokenizer: PreTrainedTokenizerBase, batches: Iterable[pa.Table | pa.RecordBatch]
) -> Iterator[pa.Table]:
    """Chunks of encoded pairs; 32 bits a token."""
    ids = pa.list_(pa.int32())
    first_row = 0
    for batch in batches:
        texts = {name: batch.column(name).to_pylist() for name in TEXTS}
        prompts = encode_prompts(tokenizer, texts["prompt"], first_row)
        encoded = [encode_answers(tokenizer, texts["prompt"], texts[side]) for side in ("chosen", "rejected")]
        sides = [answers for answers, _ in encoded]
        lengths = [len(p) + max(len(a), len(b)) for p, a, b in zip(prompts, *sides, strict=True)]
        kept = {name: batch.column(name) for name in batch.schema.names if name not in texts}
        columns = {
            **kept,
            "prompt_ids": pa.array(prompts, ids),
            "chosen_ids": pa.array(sides[0], ids),
            "rejected_ids": pa.array(sides[1], ids),
            **{name: pa.array(masks, pa.list_(pa.int8())) for name, (_, masks) in zip(MASKS, encoded, strict=True)},
            "length": pa.array(lengths, pa.int32()),
        }
        yield pa.table(columns)
        first_row += len(batch)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that decides what `encode_pairs` makes of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # Padding and truncation are states of the last call, not of the tokenizer.
    rules = json.loads(backend.to_str()) | {"padding": None, "truncation": None} if backend else tokenizer.get_vocab()
    return sha256_of([type(tokenizer).__name__, rules, tokenizer.chat_template, tokenizer.eos_token_id])


def count_rows(path: Path) -> int:
    """Rows of a Parquet file, 0 where there is none; nothing else of it is read."""
    return pq.read_metadata(path).num_rows if path.is_file() else 0


def turn_masks(encoded: Dataset) -> list[str]:
    """The columns of `MASKS` where a pair has an answer of several turns, ``[]`` where none has."""
    have = [name for name in MASKS if name in encoded.column_names]
    return have if any(encoded.data.column(name).null_count < len(encoded.data) for name in have) else []


def soft_labels(encoded: Dataset, where: str) -> list[str]:
    """``["soft_label"]`` where encoded pairs have probabilities that chosen is better, ``[]`` where they have none.

    Raises:
        UserError: one is not in [0, 1]; names its row.
    """
    if "soft_label" not in encoded.column_names:
        return []
    labels = encoded["soft_label"][:]
    wrong = [row for row, label in enumerate(labels) if label is not None and not 0 <= label <= 1]
    if wrong:
        name = encoded[wrong[0]].get("pair_id", wrong[0])
        raise UserError(
            f"{where}: pair {name} has soft_label {labels[wrong[0]]}; it is the probability that chosen is better and "
            f"must be between 0 and 1. Mend it, or set {where}.use_soft_labels=false."
        )
    return [] if all(label is None for label in labels) else ["soft_label"]


def soft_label_batch(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """``soft_label`` ``(B,)`` where the rows have it, 1 for a pair without one."""
    if "soft_label" not in rows[0]:
        return {}
    labels = [1.0 if row["soft_label"] is None else row["soft_label"] for row in rows]
    return {"soft_label": torch.tensor(labels, dtype=torch.float)}


def left_out(given: int, kept: int, where: str, limit: int | None) -> list[str]:
    """A sentence where rows were left out for their length, to be said on the console."""
    if given == kept:
        return []
    return [f"{given - kept} of {given} rows are longer than {where}.max_length={limit} tokens and were left out."]


def drop_long(rows: Dataset, lengths: Sequence[int], limit: int | None, context: int | None, where: str) -> Dataset:
    """Leave out rows longer than ``limit``; what is left must fit into the model.

    Pairs are dropped, never cut: the reward model and DPO must learn from the same ends.

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
