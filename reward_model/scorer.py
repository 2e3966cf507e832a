"""The trained reward model as a function from prompts and completions to scores: what other stages use."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, write_json
from ppo_vs_dpo.models.loading.config import ModelConfig
from ppo_vs_dpo.models.loading.pretrained import context_length, load_tokenizer, load_value_or_reward
from ppo_vs_dpo.models.passes.logprobs import Batch, sequence_scores
from ppo_vs_dpo.models.text.encoding import encode_answers, encode_prompts
from ppo_vs_dpo.models.text.prompts import Prompt

# The mean score of SFT samples, in the saved model's config.json; subtracted from every score.
BIAS_KEY = "score_bias"


def read_bias(path: str | Path) -> float:
    """The bias stored in a model folder, 0 where there is none (a reward model trained elsewhere)."""
    config = Path(path) / "config.json"
    return float(read_json(config).get(BIAS_KEY, 0.0)) if config.is_file() else 0.0


def store_bias(path: str | Path, bias: float) -> None:
    """Put the bias into a model folder's ``config.json`` (beside an adapter, too)."""
    config = Path(path) / "config.json"
    content = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    write_json(config, {**content, BIAS_KEY: bias})


class RewardScorer:
    """Scores r(prompt, completion) of a reward model; the mean over SFT samples is 0.

    The score is read at the last real token, found by the attention mask: at EOS for a finished completion. That is
    where training read it (Huang et al. 2024, details 12 and 15).

    Args:
        model: a sequence-classification model with one label.
        tokenizer: its tokenizer.
        bias: subtracted from the model's output.
        batch_size: sequences scored at once.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bias: float = 0.0, batch_size: int = 64
    ):
        self.model, self.tokenizer, self.bias, self.batch_size = model.eval(), tokenizer, bias, batch_size

    @classmethod
    def load(cls, path: str | Path, model_config: ModelConfig | None = None, batch_size: int = 64) -> "RewardScorer":
        """Load from a folder that the reward-model stage saved, or any one-label model of the Hub.

        Args:
            path: folder (whole model or adapter) or Hub name.
            model_config: dtype and attention of the run.
            batch_size: sequences scored at once.
        """
        model = load_value_or_reward(path, model_config)
        if torch.accelerator.is_available():
            model.to(torch.accelerator.current_accelerator())
        return cls(model, load_tokenizer(path, model_config), read_bias(path), batch_size)

    def encode(
        self, prompts: Sequence[Prompt], completions: Sequence[Prompt], finished: Iterable[bool] | None = None
    ) -> list[list[int]]:
        """Token ids of prompt and completion, with EOS where the completion is finished (all by default).

        Raises:
            UserError: a sequence is longer than the model's context; names its number.
        """
        heads = encode_prompts(self.tokenizer, prompts)
        tails, _ = encode_answers(self.tokenizer, prompts, completions, finished)
        rows = [head + tail for head, tail in zip(heads, tails, strict=True)]
        limit = context_length(self.model)
        for number, row in enumerate(rows):
            if limit is not None and len(row) > limit:
                raise UserError(
                    f"sample {number}: prompt and completion have {len(row)} tokens, and the reward model takes "
                    f"{limit}. Shorten the response budget or the prompts."
                )
        return rows

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Prompt], finished: Iterable[bool] | None = None
    ) -> list[float]:
        """Score texts or conversations, which this model's own tokenizer encodes.

        Args:
            prompts: ``N`` prompts.
            completions: ``N`` completions.
            finished: whether each ended by itself; an unfinished one has no EOS and is read at its last token.

        Returns:
            ``N`` scores.
        """
        return self.score_sequences(self.encode(prompts, completions, finished))

    @torch.no_grad()
    def score_sequences(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Score whole sequences of token ids; similar lengths share a batch, the order is kept."""
        device = next(self.model.parameters()).device
        order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
        scores = [0.0] * len(rows)
        for start in range(0, len(order), self.batch_size):
            numbers = order[start : start + self.batch_size]
            longest = max(len(rows[number]) for number in numbers)
            ids = torch.tensor([[*rows[n], *[0] * (longest - len(rows[n]))] for n in numbers], device=device)
            lengths = torch.tensor([len(rows[n]) for n in numbers], device=device)
            mask = (torch.arange(longest, device=device) < lengths[:, None]).long()
            values = sequence_scores(self.model, ids, mask) - self.bias
            for number, value in zip(numbers, values.tolist(), strict=True):
                scores[number] = value
        return scores

    @torch.no_grad()
    def score_ids(self, batch: Batch) -> torch.Tensor:
        """Score a batch of the policy's own tokens (the tokenizers must be the same).

        Args:
            batch: from `models.passes.logprobs.pad_batch`.

        Returns:
            ``(B,)`` fp32.
        """
        return sequence_scores(self.model, batch.input_ids, batch.attention_mask) - self.bias
