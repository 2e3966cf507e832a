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


def data_step(context: StageContext, settings: ReviewTestbed) -> None:
    """Write ``data/{sft_train,prompts_train,prompts_heldout}.parquet`` and ``data/tokenizer/``."""
    # 1. Reviews to learn from; their prompts are of the training split.
    examples = list(reviews(context.seed, settings.sft_examples))
    write_parquet(
        context.dir / "sft_train.parquet",
        {"prompt": [prompt for prompt, _ in examples], "completion": [completion for _, completion in examples]},
    )
    context.progress(1, 3, "reviews written")
    # 2. Prompts to practise on, and prompts to be judged on.
    train = distinct_prompts(context.seed, "train", settings.train_prompts)
    heldout = distinct_prompts(context.seed, "heldout", settings.heldout_prompts)
    write_parquet(context.dir / "prompts_train.parquet", prompt_rows(train))
    write_parquet(context.dir / "prompts_heldout.parquet", prompt_rows(heldout))
    context.progress(2, 3, "prompts written")
    # 3. The world's words.
    tokenizer = build_tokenizer()
    with atomic_folder(context.dir / "tokenizer") as folder:
        tokenizer.save_pretrained(folder)
    context.finish(
        source=settings.source,
        sft_examples=len(examples),
        train_prompts=len(train),
        heldout_prompts=len(heldout),
        vocabulary=len(tokenizer),
    )
