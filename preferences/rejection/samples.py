"""Sampling a policy and scoring the samples, some prompts at a time: resumable, in bounded memory."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ppo_vs_dpo.models.loading.config import ModelConfig
from ppo_vs_dpo.models.loading.pretrained import load_sampler
from ppo_vs_dpo.models.sampling.generation import SamplingConfig, generate, row_seed
from ppo_vs_dpo.models.text.prompts import decode_completion, encode_prompt
from ppo_vs_dpo.preferences.recipes.steplog import StepLog
from ppo_vs_dpo.preferences.schema import Text

# Scores of completions: (prompts, texts, finished) -> one number each.
Scorer = Callable[[Sequence[Text], Sequence[str], Sequence[bool]], list[float]]


class Sampler:
    """Draws completions of a policy; a completion depends on the prompt, the draw and the seed, on nothing else."""

    def __init__(self, policy: str | Path, sampling: SamplingConfig, seed: int, config: ModelConfig | None = None):
        self.model, self.tokenizer, self.eos = load_sampler(policy, config)
        self.sampling, self.seed = sampling, seed

    def draw(self, prompts: Sequence[Text], ids: Sequence[str], samples: int) -> list[list[dict[str, Any]]]:
        """``samples`` completions of each prompt, as ``{"text", "finished"}``.

        The ``ids`` of the prompts seed the draws.
        """
        encoded = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        generated = generate(
            self.model,
            [row for row in encoded for _ in range(samples)],
            self.sampling,
            eos_token_ids=self.eos,
            seeds=[row_seed(self.seed, "samples", identity, draw) for identity in ids for draw in range(samples)],
            tokenizer=self.tokenizer,
        )
        flat = [
            {"text": decode_completion(self.tokenizer, sample.token_ids), "finished": sample.finished}
            for sample in generated
        ]
        return [flat[start : start + samples] for start in range(0, len(flat), samples)]


def sample_and_score(
    prompts: Iterator[dict[str, Any]],
    log: StepLog,
    sampler: Sampler,
    scorer: Scorer,
    samples: int,
    prompts_per_step: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Append a line ``{"prompt_id", "prompt", "samples": [{"text", "finished", "score"}, ...]}`` for every prompt.

    Prompts that the log has already are skipped. No more than ``prompts_per_step * samples`` texts are held at once.
    """
    done = {row["prompt_id"] for row in log}
    count = len(done)
    if progress is not None:
        progress(count)
    chunk: list[dict[str, Any]] = []

    def work() -> None:
        drawn = sampler.draw([row["prompt"] for row in chunk], [row["prompt_id"] for row in chunk], samples)
        flat = [sample for row in drawn for sample in row]
        repeated = [row["prompt"] for row in chunk for _ in range(samples)]
        scores = scorer(repeated, [sample["text"] for sample in flat], [sample["finished"] for sample in flat])
        for sample, score in zip(flat, scores, strict=True):
            sample["score"] = float(score)
        log.append(
            {"prompt_id": row["prompt_id"], "prompt": row["prompt"], "samples": own}
            for row, own in zip(chunk, drawn, strict=True)
        )
        log.sync()

    for row in prompts:
        if row["prompt_id"] in done:
            continue
        chunk.append(row)
        if len(chunk) == prompts_per_step:
            work()
            count, chunk = count + len(chunk), []
            if progress is not None:
                progress(count)
    if chunk:
        work()
