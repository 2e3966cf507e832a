"""The testbed's step ``data``: write its world (reviews to learn from, prompts, the tokenizer)."""

from ppo_vs_dpo.artifacts.files import atomic_folder, write_parquet
from ppo_vs_dpo.artifacts.stage import StageContext
from ppo_vs_dpo.preferences.config import ReviewTestbed
from ppo_vs_dpo.preferences.schema import prompt_id
from ppo_vs_dpo.preferences.testbed.grammar import distinct_prompts, reviews
from ppo_vs_dpo.preferences.testbed.tokenizer import build_tokenizer


def prompt_rows(prompts: list[str]) -> dict[str, list[str]]:
    """Columns of a prompts file."""
    return {"prompt": prompts, "prompt_id": [prompt_id(prompt) for prompt in prompts]}


def write_world(context: StageContext, sft_examples: int) -> dict[str, int]:
    """Write reviews to learn from, whose prompts are of the training split, and the world's words, a tokenizer."""
    prompts, completions = zip(*reviews(context.seed, sft_examples), strict=True)
    write_parquet(context.dir / "sft_train.parquet", {"prompt": [*prompts], "completion": [*completions]})
    tokenizer = build_tokenizer()
    with atomic_folder(context.dir / "tokenizer") as folder:
        tokenizer.save_pretrained(folder)
    return {"sft_examples": len(prompts), "vocabulary": len(tokenizer)}


def data_step(context: StageContext, settings: ReviewTestbed) -> None:
    """Write ``data/{sft_train,prompts_train,prompts_heldout}.parquet`` and ``data/tokenizer/``."""
    # 1. Reviews and words.
    figures = write_world(context, settings.sft_examples)
    context.progress(1, 2, "reviews written")
    # 2. Prompts to practise on, and prompts to be judged on.
    train = distinct_prompts(context.seed, "train", settings.train_prompts)
    heldout = distinct_prompts(context.seed, "heldout", settings.heldout_prompts)
    write_parquet(context.dir / "prompts_train.parquet", prompt_rows(train))
    write_parquet(context.dir / "prompts_heldout.parquet", prompt_rows(heldout))
    context.finish(source=settings.source, train_prompts=len(train), heldout_prompts=len(heldout), **figures)
