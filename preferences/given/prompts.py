"""Step ``data`` of the sources that make their pairs: prompts to train on, to test on, and held out."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import atomic_folder, atomic_path, read_parquet
from ppo_vs_dpo.artifacts.stage import StageContext
from ppo_vs_dpo.models.loading.config import ModelConfig
from ppo_vs_dpo.models.loading.pretrained import load_tokenizer
from ppo_vs_dpo.models.training import model_settings
from ppo_vs_dpo.preferences.config import MadePairs
from ppo_vs_dpo.preferences.reading.as_read import text_for_a_chat_model
from ppo_vs_dpo.preferences.reading.mappings import UnmappableError, value_of
from ppo_vs_dpo.preferences.reading.parquet import TableWriter, example_schema, prompt_schema
from ppo_vs_dpo.preferences.reading.prompts import read_prompts
from ppo_vs_dpo.preferences.reading.readers import is_local, whole_rows
from ppo_vs_dpo.preferences.schema import Text, prompt_id

SPLITS = ("train", "test", "heldout")
# Prompts that are looked at before the first stage.
LOOKED_AT = 50


def data_step(context: StageContext, settings: MadePairs) -> None:
    """Write ``data/prompts_{train,test,heldout}.parquet``, and SFT examples and a tokenizer where there are any."""
    if settings.prompts_path == "testbed":
        figures = _testbed(context, settings)
    elif (folder := run_folder(settings.prompts_path)) is not None:
        figures = _earlier_run(context, settings, folder)
    else:
        figures = _texts(context, settings) if settings.prefix_words else _prompts(context, settings)
    context.finish(source=settings.source, prompts_path=settings.prompts_path, **figures)


def _testbed(context: StageContext, settings: MadePairs) -> dict[str, int]:
    from ppo_vs_dpo.preferences.testbed.grammar import distinct_prompts
    from ppo_vs_dpo.preferences.testbed.world import write_world

    figures = write_world(context, settings.sft_examples)
    sizes = {name: getattr(settings, f"{name}_prompts") for name in SPLITS}
    prompts = {name: distinct_prompts(context.seed, name, size) for name, size in sizes.items()}
    return _write(context, prompts) | {"sft_examples": figures["sft_examples"]}


def run_folder(path: str) -> Path | None:
    """The run that a path names, by its folder or by its folder ``data``; ``None`` where it is no run."""
    for folder in (Path(path), Path(path).parent):
        if (folder / "config.yaml").is_file() and (folder == Path(path) or Path(path).name == "data"):
            return folder
    return None


def _earlier_run(context: StageContext, settings: MadePairs, folder: Path) -> dict[str, int]:
    """The prompts, SFT examples and tokenizer of another run: what was held out there stays held out here."""
    examples = folder / "data" / "sft_train.parquet"
    if examples.is_file():
        with atomic_path(context.dir / examples.name) as temporary:
            shutil.copyfile(examples, temporary)
    if (folder / "data" / "tokenizer").is_dir():
        with atomic_folder(context.dir / "tokenizer") as target:
            shutil.copytree(folder / "data" / "tokenizer", target, dirs_exist_ok=True)
    found: dict[str, list[Text]] = {}
    for name in SPLITS:
        path = folder / "data" / f"prompts_{name}.parquet"
        if not path.is_file() and name == "test":
            path = folder / "pairs" / "test.parquet"
        if not path.is_file():
            raise UserError(f"data.prompts_path: {path} does not exist; {folder} is not a run whose data is done.")
        unique = {prompt_id(prompt): prompt for prompt in read_parquet(path, ["prompt"])["prompt"][:]}
        found[name] = list(unique.values())[: getattr(settings, f"{name}_prompts")]
    return _write(context, found)


def _prompts(context: StageContext, settings: MadePairs) -> dict[str, int]:
    wanted = settings.train_prompts + settings.test_prompts + settings.heldout_prompts
    prompts = list(read_prompts(settings.prompts_path, settings.split, settings.conversational, wanted))
    _check_form(model_settings(context), settings, prompts)
    return _write(context, _divide(prompts, settings))


def look(settings: MadePairs, model: ModelConfig) -> None:
    """Read the first prompts of a local file as the step will, in a second and without a trace.

    Raises:
        UserError: what the step would stop for.
    """
    path = settings.prompts_path
    if path == "testbed" or run_folder(path) is not None or not is_local(path) or not Path(path).exists():
        return
    if settings.prefix_words:
        next(_text_rows(settings), None)
        return
    _check_form(model, settings, list(read_prompts(path, settings.split, settings.conversational, LOOKED_AT)))


def _check_form(model: ModelConfig, settings: MadePairs, prompts: list[Text]) -> None:
    """Plain text for a chat model would be answered without a turn between question and answer.

    Raises:
        UserError: the run's model has a chat template, and ``data.conversational`` does not say that text is meant.
    """
    if settings.conversational is not None or model.path is None or not prompts:
        return
    why = text_for_a_chat_model(load_tokenizer(model.path, model), prompts[0])
    if why is not None:
        raise UserError(f"{settings.prompts_path}: {why}")


def _divide(prompts: list[Text], settings: MadePairs) -> dict[str, list[Text]]:
    """Held-out and test prompts by fingerprint, the rest to train on; shares shrink where there are too few."""
    wanted = {name: getattr(settings, f"{name}_prompts") for name in SPLITS}
    scale = min(1.0, len(prompts) / sum(wanted.values()))
    heldout, test = (max(1, int(scale * wanted[name])) if wanted[name] else 0 for name in ("heldout", "test"))
    if heldout + test >= len(prompts):
        raise UserError(
            f"{settings.prompts_path} has {len(prompts)} different prompts: too few for some to train on beside "
            f"{heldout} held out and {test} to test on. Give more, or set data.test_prompts=0."
        )
    ordered = sorted(prompts, key=prompt_id)
    return {
        "heldout": ordered[:heldout],
        "test": ordered[heldout : heldout + test],
        "train": ordered[heldout + test :][: wanted["train"]],
    }


def _texts(context: StageContext, settings: MadePairs) -> dict[str, int]:
    """IMDb prefixes (Rafailov et al. 2023, App. C.1): a text's first words are the prompt, the rest is for SFT."""
    rng = random.Random(f"prefixes-{context.seed}")
    least, most = settings.prefix_words
    texts: dict[str, str] = {}
    limit = max(settings.sft_examples, settings.train_prompts) + settings.test_prompts + settings.heldout_prompts
    for text in _text_rows(settings):
        words = text.split(" ")
        count = rng.randint(least, most)
        if len(words) > count:
            texts.setdefault(" ".join(words[:count]), " " + " ".join(words[count:]))
        if len(texts) >= limit:
            break
    split = _divide(list(texts), settings)
    kept_out = {*split["heldout"], *split["test"]}
    starts = tuple(kept_out)
    with TableWriter(context.dir / "sft_train.parquet", example_schema(False)) as examples:
        for prompt, rest in texts.items():
            # A longer prefix may begin with a held-out one: its text would give that one away.
            if examples.rows < settings.sft_examples and not (prompt + rest).startswith(starts):
                examples.write({"prompt": prompt, "completion": rest})
    return _write(context, split) | {"sft_examples": examples.rows}


def _text_rows(settings: MadePairs) -> Iterator[str]:
    path = settings.prompts_path
    for place, row in whole_rows(path, settings.split):
        try:
            yield " ".join(value_of(row, "text").replace("<br />", " ").split())
        except UnmappableError as problem:
            raise UserError(f"{place}: {problem}. data.prefix_words needs a column text.") from None


def _write(context: StageContext, prompts: dict[str, list[Text]]) -> dict[str, int]:
    chat = any(isinstance(prompt, list) for items in prompts.values() for prompt in items)
    for name, items in prompts.items():
        with TableWriter(context.dir / f"prompts_{name}.parquet", prompt_schema(chat)) as out:
            for prompt in items:
                out.write({"prompt": prompt, "prompt_id": prompt_id(prompt)})
    return {f"{name}_prompts": len(items) for name, items in prompts.items()}
