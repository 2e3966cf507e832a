"""The testbed's step ``pairs``: two samples of the SFT policy for a prompt, labelled by Bradley-Terry on gold."""

from collections.abc import Callable

import numpy as np
from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_parquet, write_parquet
from ppo_vs_dpo.artifacts.stage import StageContext
from ppo_vs_dpo.models.loading.pretrained import load_sampler
from ppo_vs_dpo.models.sampling.generation import SamplingConfig, generate, row_seed
from ppo_vs_dpo.models.text.prompts import decode_completions, encode_texts
from ppo_vs_dpo.preferences.config import ReviewTestbed
from ppo_vs_dpo.preferences.recipes.bradley_terry import (
    accuracy_ceiling,
    draw_labels,
    label_entropy,
    preference_probability,
)
from ppo_vs_dpo.preferences.recipes.functions import score_with
from ppo_vs_dpo.preferences.recipes.named import load_gold
from ppo_vs_dpo.preferences.schema import make_pair, pair_set
from ppo_vs_dpo.preferences.testbed.grammar import distinct_prompts

# A second sample that equals the first says nothing; after this many further draws the prompt gives no pair.
REDRAWS = 4


def pairs_step(context: StageContext, settings: ReviewTestbed) -> None:
    """Draw two samples of ``sft/model`` for each prompt, label them by Bradley-Terry on gold, write ``pairs/``."""
    context.run.require("sft")
    gold = load_gold(settings.gold)
    train_prompts = read_parquet(context.run.path("data", "prompts_train.parquet"), ["prompt"])["prompt"]
    prompts = {
        "train": [train_prompts[i % len(train_prompts)] for i in range(settings.pairs)],
        "test": distinct_prompts(context.seed, "test", settings.test_pairs),
    }
    # 1. Sample.
    sampler = _Sampler(context, settings, total=2 * (settings.pairs + settings.test_pairs))
    drawn = {split: sampler.pairs(split, prompts[split]) for split in prompts}
    # 2. Label.
    rng = np.random.default_rng(row_seed(context.seed, "labels"))
    rows = {split: _label(drawn[split], gold, rng) for split in prompts}
    # 3. Write.
    for split, split_rows in rows.items():
        write_parquet(context.dir / f"{split}.parquet", split_rows)
    probability = {
        split: preference_probability(
            [row["chosen_score"] for row in split_rows], [row["rejected_score"] for row in split_rows]
        )
        for split, split_rows in rows.items()
    }
    samples = [row[side] for row in rows["train"] for side in ("chosen_score", "rejected_score")]
    context.finish(
        pair_set=pair_set({split: [row["pair_id"] for row in rows[split]] for split in rows}),
        label_ceiling={split: accuracy_ceiling(p) for split, p in probability.items()},
        label_entropy={split: label_entropy(p) for split, p in probability.items()},
        gold_mean=float(np.mean(samples)),
        gold_sd=float(np.std(samples)),
        redrawn=sampler.redrawn,
        dropped=sampler.dropped,
    )


class _Sampler:
    """Draws pairs of different, finished samples; counts what had to be drawn again or dropped."""

    def __init__(self, context: StageContext, settings: ReviewTestbed, total: int):
        self.model, self.tokenizer, self.eos = load_sampler(context.run.path("sft", "model"))
        self.sampling = SamplingConfig(
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            batch_size=settings.generation_batch_size,
        )
        self.context, self.total, self.done = context, total, 0
        self.redrawn = self.dropped = 0

    def _draw(self, split: str, prompts: list[str], slots: list[tuple[int, int]], attempt: int) -> list[str | None]:
        """One text for each slot (row, side); ``None`` where the sample is empty or did not end."""
        generated = generate(
            self.model,
            encode_texts(self.tokenizer, [prompts[row] for row, _ in slots]),
            self.sampling,
            eos_token_ids=self.eos,
            seeds=[row_seed(self.context.seed, "pairs", split, row, side, attempt) for row, side in slots],
            # No other stage runs beside this one.
            workers=OmegaConf.select(self.context.run.config, "launch.workers", default=1),
            progress=lambda done, total: self.context.progress(self.done + done, self.total, "sampling"),
        )
        texts = decode_completions(self.tokenizer, [sample.token_ids for sample in generated])
        return [text if sample.finished and text else None for text, sample in zip(texts, generated, strict=True)]

    def pairs(self, split: str, prompts: list[str]) -> list[tuple[str, str, str]]:
        """(prompt, first, second) for each prompt whose two samples could be told apart."""
        texts: dict[tuple[int, int], str | None] = {}
        wanted = [(row, side) for row in range(len(prompts)) for side in (0, 1)]
        for attempt in range(1 + REDRAWS):
            for slot, text in zip(wanted, self._draw(split, prompts, wanted, attempt), strict=True):
                texts[slot] = text
            if attempt == 0:
                self.done += len(wanted)
            # Draw again what is empty or did not end, and the second of two equal samples.
            wanted = [
                (row, side)
                for row in range(len(prompts))
                for side in (0, 1)
                if texts[row, side] is None or (side == 1 and texts[row, 0] == texts[row, 1])
            ]
            if not wanted:
                break
            self.redrawn += len(wanted) if attempt < REDRAWS else 0
        lost = {row for row, _ in wanted}
        if len(lost) == len(prompts):
            raise UserError(
                f"no pair for any of {len(prompts)} prompts: in {1 + REDRAWS} draws each, the SFT policy's samples "
                f"were equal or did not end within data.max_new_tokens={self.sampling.max_new_tokens}. "
                f"Train it longer, or raise data.temperature ({self.sampling.temperature}) or data.max_new_tokens."
            )
        self.dropped += len(lost)
        return [(prompt, texts[row, 0], texts[row, 1]) for row, prompt in enumerate(prompts) if row not in lost]


def _label(
    drawn: list[tuple[str, str, str]], gold: Callable[..., list[float]], rng: np.random.Generator
) -> list[dict]:
    """Rows of the schema: the chosen side is drawn with probability sigma(gold_1 - gold_2)."""
    prompts = [prompt for prompt, _, _ in drawn]
    first = score_with(gold, "data.gold", prompts, [one for _, one, _ in drawn])
    second = score_with(gold, "data.gold", prompts, [two for _, _, two in drawn])
    first_wins = draw_labels(preference_probability(first, second), rng)
    rows = []
    for (prompt, one, two), score_one, score_two, wins in zip(drawn, first, second, first_wins, strict=True):
        sides = [(one, score_one), (two, score_two)]
        (chosen, chosen_score), (rejected, rejected_score) = sides if wins else sides[::-1]
        rows.append(make_pair(prompt, chosen, rejected, chosen_score=chosen_score, rejected_score=rejected_score))
    return rows
