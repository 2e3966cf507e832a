"""Steps for pairs that are there (Hub, files, configuration): ``data`` reads and splits, ``pairs`` hands on."""

import dataclasses
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import atomic_path, write_json
from ppo_vs_dpo.artifacts.stage import StageContext
from ppo_vs_dpo.models.loading.config import ModelConfig
from ppo_vs_dpo.models.loading.pretrained import load_tokenizer
from ppo_vs_dpo.models.training import model_settings
from ppo_vs_dpo.preferences.config import GivenPairs
from ppo_vs_dpo.preferences.reading.as_read import said_of
from ppo_vs_dpo.preferences.reading.importing import TokenLimits, stage_pairs
from ppo_vs_dpo.preferences.reading.mappings import MappingOptions
from ppo_vs_dpo.preferences.reading.mappings.rendered import Renderer
from ppo_vs_dpo.preferences.reading.near import LeakCount
from ppo_vs_dpo.preferences.reading.parquet import (
    TableWriter,
    example_schema,
    pair_schema,
    prompt_schema,
    read_rows,
    text_type,
    without_empty_columns,
)
from ppo_vs_dpo.preferences.reading.prompts import read_examples, read_prompts
from ppo_vs_dpo.preferences.reading.readers import Placed, from_columns, is_local, read_any, read_files
from ppo_vs_dpo.preferences.reading.validation import Checker, Report, policies
from ppo_vs_dpo.preferences.schema import OPTIONAL, pair_set, prompt_id


def source_rows(settings: GivenPairs, test: bool = False) -> Iterator[Placed] | None:
    """Rows to train on, or those of the test split; ``None`` where there is no test split."""
    if test:
        if settings.test_path is not None:
            return _rows(settings, settings.test_path, settings.split)
        return None if settings.test_split is None else _rows(settings, settings.path, settings.test_split)
    if settings.inline is not None:
        return from_columns(settings.inline, "data.inline")
    return _rows(settings, settings.path, settings.split)


def _rows(settings: GivenPairs, path: str, split: str) -> Iterator[Placed]:
    hub = {"subset": settings.subset, "revision": settings.revision, "streaming": settings.streaming}
    return read_any(path, split, **hub)


def mapping_options(settings: GivenPairs, tokenizer: PreTrainedTokenizerBase | None = None) -> MappingOptions:
    """What the mapping is told; rendering needs the tokenizer of the model that reads the pairs."""
    return MappingOptions(
        columns=settings.columns,
        conversational=settings.conversational,
        min_score_ratio=settings.min_score_ratio,
        dimension=settings.dimension,
        drop_both_unsafe=settings.drop_both_unsafe,
        drop_both_safe=settings.drop_both_safe,
        render=Renderer(tokenizer) if settings.rendered else None,
    )


@dataclass(frozen=True)
class Splits:
    """Prompt ids that are kept from training, as integers; all others are for training."""

    heldout: frozenset[int]
    test: frozenset[int]

    def of(self, identity: str) -> str:
        """The split of a prompt id."""
        number = int(identity, 16)
        return "heldout" if number in self.heldout else "test" if number in self.test else "train"


def split_prompts(prompts: set[int], settings: GivenPairs) -> Splits:
    """Shares of the prompts, in the order of their fingerprints: the same for every seed and every machine.

    Raises:
        UserError: too few prompts to leave any for training.
    """
    ordered = sorted(prompts)
    n_heldout = _share(len(ordered), settings.heldout_fraction, settings.heldout_prompts)
    n_test = _share(len(ordered), settings.test_fraction)
    if n_heldout + n_test >= len(ordered):
        raise UserError(
            f"{len(ordered)} prompts cannot be split into {n_heldout} held-out, {n_test} for test pairs and some to "
            f"train on. Give more pairs, or set data.test_fraction=0 or data.heldout_fraction=0."
        )
    return Splits(frozenset(ordered[:n_heldout]), frozenset(ordered[n_heldout : n_heldout + n_test]))


def _share(total: int, fraction: float, most: int | None = None) -> int:
    """At least one where a share is asked for."""
    number = max(1, round(fraction * total)) if fraction > 0 else 0
    return number if most is None else min(number, most)


# Rows of a local file that are read before a run starts: enough to see other columns, or text for a chat model.
LOOKED_AT = 50


def look(settings: GivenPairs, model: ModelConfig) -> None:
    """Read the first rows of a local file as the step will, in a second and without a trace.

    Raises:
        UserError: what the step would stop for; or the file is not there.
    """
    for path in (settings.path, settings.test_path):
        if path is None or not is_local(path) or not Path(path).exists():
            continue
        report = Report(f"{path} (its first rows)")
        checker = Checker(report, policies(settings.on_problem))
        limits = TokenLimits(_tokenizer(model))
        with tempfile.TemporaryDirectory() as folder:
            rows = itertools.islice(read_files(path), LOOKED_AT)
            out = Path(folder) / "first.parquet"
            options = mapping_options(settings, limits.tokenizer)
            stage_pairs(rows, out, report, checker, options, settings.format, limits)
        report.raise_errors()


def data_step(context: StageContext, settings: GivenPairs) -> None:
    """Read, check and split the pairs; write prompts, SFT examples and ``data/pairs_{train,test}.parquet``."""
    model = model_settings(context)
    policy = policies(settings.on_problem)
    report = Report(settings.path or "data.inline")
    checker = Checker(report, policy)
    limits = TokenLimits(_tokenizer(model), settings.max_prompt_tokens, settings.max_response_tokens)
    staging = context.dir / "staging"

    def progress(rows: int) -> None:
        context.progress(rows, max(rows, settings.max_pairs or 0) + 1, f"{rows} rows read")

    # 1. Read and check. Test rows first: where both splits have a pair, the training split loses it.
    test_rows = source_rows(settings, test=True)
    test_prompts: set[int] = set()
    common = (report, checker, mapping_options(settings, limits.tokenizer), settings.format, limits)
    if test_rows is not None:
        stage_pairs(test_rows, staging / "test.parquet", *common, progress=progress)
        test_prompts, checker.prompts = checker.prompts, set()
    stage_pairs(
        source_rows(settings), staging / "train.parquet", *common, max_pairs=settings.max_pairs, progress=progress
    )
    # 2. Prompts that both splits have.
    if test_prompts:
        leaked = checker.prompts & test_prompts
        if leaked:
            for row in read_rows(staging / "train.parquet", ["prompt_id", "place"]):
                if int(row["prompt_id"], 16) in leaked:
                    checker.drops("leakage", row["place"], f"prompt {row['prompt_id']}")
    report.prompts = len(checker.prompts | test_prompts)
    report.statistics = checker.statistics.summary()
    # 3. Stop here for what must not be trained on; the report says what.
    write_json(context.dir / "report.json", dataclasses.asdict(report))
    report.raise_errors()
    # 4. Split and write.
    counts = _write_splits(context, settings, staging, checker, test_prompts)
    if settings.prompts_path is not None:
        counts |= _more_prompts(context, settings, checker)
    if settings.sft_path is not None:
        counts |= _sft_file(context, settings, checker)
    report.pairs = counts["train_pairs"] + counts["test_pairs"] + counts["heldout_pairs"]
    # 5. Prompts under another fingerprint that say nearly the same on both sides.
    if leak := near_leaks(context.dir):
        report.said.append(leak)
    write_json(context.dir / "report.json", dataclasses.asdict(report))
    shutil.rmtree(staging)
    context.finish(
        source=settings.source,
        path=settings.path,
        format=report.format,
        rows=report.rows,
        problems={kind: found.count for kind, found in report.problems.items()},
        warnings=[*said_of(report), *report.said],
        **counts,
    )


def near_leaks(folder: Path) -> str | None:
    """Test and held-out prompts that are near duplicates of training prompts, or ``None``."""
    kept = {
        row["prompt_id"]: row["prompt"]
        for name in ("prompts_heldout", "pairs_test")
        for row in read_rows(folder / f"{name}.parquet", ["prompt_id", "prompt"])
    }
    leaks = LeakCount(list(kept.values()))
    for number, row in enumerate(read_rows(folder / "prompts_train.parquet", ["prompt"])):
        leaks.passes(f"prompt {number} of prompts_train.parquet", row["prompt"])
    return leaks.sentence()


def _tokenizer(model: ModelConfig):
    if model.path is None:
        raise UserError(
            "these pairs need a model with a tokenizer of its own, and model.path is not set. "
            "Add model=pretrained model.path=HUB_NAME_OR_FOLDER."
        )
    return load_tokenizer(model.path, model)


def _write_splits(
    context: StageContext, settings: GivenPairs, staging: Path, checker: Checker, test_prompts: set[int]
) -> dict[str, int]:
    chat = bool(checker.conversational)
    if test_prompts:
        # The held-out prompts come out of the given test split, at most half of it.
        ordered = sorted(test_prompts)
        n_heldout = min(settings.heldout_prompts, len(ordered) // 2) if settings.heldout_fraction > 0 else 0
        splits = Splits(frozenset(ordered[:n_heldout]), frozenset(ordered[n_heldout:]))
    else:
        splits = split_prompts(checker.prompts, settings)
    keep_leaks = checker.policy["leakage"] == "keep"
    seen = {"train": set(), "heldout": set()}
    heldout_pairs = 0
    folder = context.dir
    with (
        TableWriter(folder / "pairs_train.parquet", pair_schema(chat)) as train,
        TableWriter(folder / "pairs_test.parquet", pair_schema(chat)) as test,
        TableWriter(folder / "prompts_train.parquet", prompt_schema(chat)) as prompts,
        TableWriter(
            folder / "prompts_heldout.parquet", prompt_schema(chat, ("reference", text_type(chat)))
        ) as heldout,
        TableWriter(folder / "sft_train.parquet", example_schema(chat)) as examples,
    ):
        for name in ("test", "train") if test_prompts else ("train",):
            for row in read_rows(staging / f"{name}.parquet"):
                if row["pair_id"] in checker.contradictory:
                    continue
                split = splits.of(row["prompt_id"])
                if name == "train" and test_prompts and split != "train":
                    if not keep_leaks:
                        continue
                    split = "train"
                first = split in seen and row["prompt_id"] not in seen[split]
                if first:
                    seen[split].add(row["prompt_id"])
                if split == "train":
                    train.write(row)
                    if first:
                        prompts.write(row)
                    if settings.sft == "chosen":
                        examples.write({"prompt": row["prompt"], "completion": row["chosen"]})
                elif split == "test":
                    test.write(row)
                else:
                    heldout_pairs += 1
                    if first:
                        # Of an answer of several turns, what answers the prompt: its first.
                        heldout.write({**row, "reference": row["chosen"][:1] if chat else row["chosen"]})
        if train.rows == 0:
            raise UserError(
                f"{settings.path or 'data.inline'}: no usable pair is left to train on; data/report.json says why."
            )
    for name in ("pairs_train", "pairs_test"):
        without_empty_columns(folder / f"{name}.parquet", OPTIONAL)
    if settings.sft == "none":
        (folder / "sft_train.parquet").unlink()
    return {
        "train_pairs": train.rows,
        "test_pairs": test.rows,
        "heldout_pairs": heldout_pairs,
        "train_prompts": prompts.rows,
        "heldout_prompts": heldout.rows,
        "sft_examples": examples.rows if settings.sft == "chosen" else 0,
    }


def _kept_out(folder: Path) -> set[str]:
    """Ids of the prompts that no training file may hold."""
    files = [folder / f"{name}.parquet" for name in ("prompts_heldout", "pairs_test")]
    return {row["prompt_id"] for file in files for row in read_rows(file, ["prompt_id"])}


def _sft_file(context: StageContext, settings: GivenPairs, checker: Checker) -> dict[str, int]:
    """SFT examples of ``data.sft_path``, but those whose prompt is kept from training."""
    chat = bool(checker.conversational)
    kept_out = _kept_out(context.dir)
    withheld = 0
    with TableWriter(context.dir / "sft_train.parquet", example_schema(chat)) as out:
        for prompt, completion in read_examples(settings.sft_path, settings.split, chat):
            if prompt_id(prompt) in kept_out:
                withheld += 1
            else:
                out.write({"prompt": prompt, "completion": completion})
    return {"sft_examples": out.rows, "withheld_examples": withheld}


def _more_prompts(context: StageContext, settings: GivenPairs, checker: Checker) -> dict[str, int]:
    """Add the prompts of ``data.prompts_path`` to the training prompts, but those that are kept from training."""
    folder = context.dir
    chat = bool(checker.conversational)
    kept_out = _kept_out(folder)
    known: set[str] = set()
    added = withheld = 0
    with TableWriter(folder / "prompts_train.parquet", prompt_schema(chat)) as out:
        for row in read_rows(folder / "prompts_train.parquet"):  # the old file, until the new one takes its place
            known.add(row["prompt_id"])
            out.write(row)
        for prompt in read_prompts(settings.prompts_path, settings.split, chat):
            identity = prompt_id(prompt)
            withheld += identity in kept_out
            if identity in kept_out or identity in known:
                continue
            known.add(identity)
            added += 1
            out.write({"prompt": prompt, "prompt_id": identity})
    return {"train_prompts": len(known), "added_prompts": added, "withheld_prompts": withheld}


def pairs_step(context: StageContext, settings: GivenPairs) -> None:
    """Hand on the pairs that ``data`` split, with the hash that both branches must agree on."""
    context.run.require("data")
    ids: dict[str, list[str]] = {}
    for split in ("train", "test"):
        source = context.run.path("data", f"pairs_{split}.parquet")
        if not source.is_file():
            raise UserError(f"{source} does not exist: run the stage data again.")
        ids[split] = [row["pair_id"] for row in read_rows(source, ["pair_id"])]
        with atomic_path(context.dir / f"{split}.parquet") as temporary:
            shutil.copyfile(source, temporary)
    context.finish(pair_set=pair_set(ids))
