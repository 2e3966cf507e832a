"""The trained reward model as a function from prompts and completions to scores: what other stages use."""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, write_json
from ppo_vs_dpo.artifacts.resources import part
from ppo_vs_dpo.models.loading.adapters import check_adapters
from ppo_vs_dpo.models.loading.config import ModelConfig
from ppo_vs_dpo.models.loading.files import BIAS_KEY, FOREIGN_KEY
from ppo_vs_dpo.models.loading.heads import load_reward, named_head
from ppo_vs_dpo.models.loading.pretrained import context_length, load_tokenizer
from ppo_vs_dpo.models.loading.vocabulary import check_tokens
from ppo_vs_dpo.models.passes.logprobs import base
from ppo_vs_dpo.models.passes.scores import Reader, is_encoder, padded_rows
from ppo_vs_dpo.models.sharding.deepspeed import is_sharded
from ppo_vs_dpo.models.text.pairing import CONTINUED, encode_sequences, style_of
from ppo_vs_dpo.models.text.prompts import Prompt

# In the saved model's config.json, beside the bias: what one more token is worth to it, among SFT samples.
SLOPE_KEY = "length_slope"


def read_bias(path: str | Path) -> float:
    """The bias stored in a model folder, 0 where there is none (a reward model trained elsewhere).

    Raises:
        UserError: it is no number.
    """
    config = Path(path) / "config.json"
    bias = read_json(config).get(BIAS_KEY, 0.0) if config.is_file() else 0.0
    if isinstance(bias, bool) or not isinstance(bias, int | float) or not math.isfinite(bias):
        raise UserError(f"{config}: {BIAS_KEY} is {bias!r}; it must be a number, the mean score of SFT samples.")
    return float(bias)


def store_bias(path: str | Path, bias: float) -> None:
    """Put the bias into a model folder's ``config.json`` (beside an adapter, too)."""
    _store(path, BIAS_KEY, bias)


def read_length_slope(path: str | Path) -> float | None:
    """The score that one more token is worth to a model, where its stage has measured it."""
    config = Path(path) / "config.json"
    return read_json(config).get(SLOPE_KEY) if config.is_file() else None


def store_length_slope(path: str | Path, slope: float) -> None:
    """Put it beside the bias."""
    _store(path, SLOPE_KEY, slope)


def _store(path: str | Path, key: str, value: float) -> None:
    config = Path(path) / "config.json"
    content = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    write_json(config, {**content, key: value})


class RewardScorer:
    """Scores r(prompt, completion) of a reward model, less its bias: the mean over SFT samples is then 0.

    Example::

        from ppo_vs_dpo import RewardScorer

        scorer = RewardScorer.load("my_reward_model")  # of the stage, or any one-label model of the Hub
        print(scorer.score(["the film"], [" was good"]))

    A score is the model's own: what its forward pass gives for the sequence that its tokenizer makes of prompt and
    completion. Where a faster way gives the same (a probe at construction says so) it is taken. A model of this
    project is read at the last real token, found by the attention mask: at EOS for a finished completion. That is
    where training read it (Huang et al. 2024, details 12 and 15). Which it is its config says (`is_foreign`), be it a
    folder or an object.

    Args:
        model: a sequence-classification model with one label.
        tokenizer: its tokenizer.
        bias: subtracted from the model's output.
        batch_size: sequences scored at once.
        foreign: it was trained elsewhere: the score stands where transformers reads it, and conversations are rendered
            whole by the chat template. ``None``: what `is_foreign` says of the model.

    Raises:
        UserError: the model does not give one number a sequence, or has fewer tokens than the tokenizer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        bias: float = 0.0,
        batch_size: int = 64,
        foreign: bool | None = None,
    ):
        self.model, self.tokenizer, self.bias, self.batch_size = model.eval(), tokenizer, bias, batch_size
        self.foreign = is_foreign(model) if foreign is None else foreign
        self.length_slope: float | None = None
        check_adapters(model, "the reward model")
        if isinstance(base(model), PreTrainedModel):
            check_tokens(base(model), tokenizer, "the reward model")
        # Under ZeRO-3 a model without its engine cannot be asked yet: the first scores ask it.
        if not any(is_sharded(parameter) for parameter in model.parameters()):
            _ = self.reader

    @functools.cached_property
    def reader(self) -> Reader:
        """How this model's scores are read; the probe."""
        pad = self.tokenizer.pad_token_id
        special, end = self.tokenizer.all_special_ids, self.tokenizer.eos_token_id
        return Reader(self.model, 0 if pad is None else pad, not self.foreign, special, end)

    @functools.cached_property
    def style(self) -> str:
        """How prompt and completion are put together (`models.text.pairing.style_of`)."""
        return style_of(self.tokenizer, self.reader.causal, self.foreign)

    @property
    def is_decoder(self) -> bool:
        """Whether it reads a policy's own tokens, prompt and response, from left to right to a linear head.

        Known from the probe; by the architecture's name while the weights are in pieces.
        """
        if "reader" not in self.__dict__:
            return not is_encoder(self.model)
        return self.reader.fast and self.reader.causal and self.style == CONTINUED

    @classmethod
    def load(
        cls,
        path: str | Path,
        model_config: ModelConfig | None = None,
        batch_size: int = 64,
        head: str | None = None,
    ) -> "RewardScorer":
        """Load from a folder that the reward-model stage saved, or any one-label model of the Hub.

        Args:
            path: folder (whole model or adapter) or Hub name.
            head: the name of a head that other projects made (`models.loading.heads`): ``v_head``, ``value_head``.

        Raises:
            UserError: no head, more than one label, not one number a sequence.
        """
        model = load_reward(path, model_config, head)
        if torch.accelerator.is_available():
            model.to(torch.accelerator.current_accelerator())
        return cls.of(model, path, model_config, batch_size, head)

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        path: str | Path,
        model_config: ModelConfig | None = None,
        batch_size: int = 64,
        head: str | None = None,
    ) -> "RewardScorer":
        """A scorer of a model that was loaded from ``path`` already; the arguments are those of `load`."""
        tokenizer = scoring_tokenizer(path, model_config)
        # A head of that kind is read at the last real token by those who made it, too.
        foreign = head is None and is_foreign(path) and named_head(path, model_config) is None
        scorer = cls(model, tokenizer, read_bias(path), batch_size, foreign)
        scorer.length_slope = read_length_slope(path)
        return scorer

    def encode(
        self, prompts: Sequence[Prompt], completions: Sequence[Prompt], finished: Iterable[bool] | None = None
    ) -> list[list[int]]:
        """Token ids of prompt and completion, as this model was trained to read them (`style`).

        Where they are continued, EOS stands at the end of a completion that is finished (all by default).

        Raises:
            UserError: a sequence is longer than the model's context; names its number.
        """
        rows = encode_sequences(self.tokenizer, prompts, completions, finished, self.style)
        limit = context_length(self.model)
        for number, row in enumerate(rows):
            if limit is not None and len(row) > limit:
                raise UserError(
                    f"sample {number}: prompt and completion have {len(row)} tokens, and the reward model takes "
                    f"{limit}. Shorten the response budget or the prompts."
                )
        return rows

    def check_context(self, prompts: Sequence[Prompt], max_new_tokens: int, who: str, key: str) -> None:
        """The longest prompt and a whole response must fit into the model's context.

        ``max_new_tokens`` are in the policy's tokens; ``key`` is the setting that holds them.

        Raises:
            UserError: they do not.
        """
        limit = context_length(self.model)
        if limit is None or not prompts:
            return
        empty = [[{"role": "assistant", "content": ""}] if isinstance(prompt, list) else "" for prompt in prompts]
        longest = max(map(len, encode_sequences(self.tokenizer, prompts, empty, [False] * len(prompts), self.style)))
        if longest + max_new_tokens > limit:
            raise UserError(
                f"{who}: the longest prompt has {longest} tokens for it, and with a response of {max_new_tokens} "
                f"({key}) it would be {longest + max_new_tokens}; the reward model takes {limit}. Lower {key}, leave "
                f"long prompts out, or take a model with a longer context."
            )

    @part("scoring")
    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Prompt], finished: Iterable[bool] | None = None
    ) -> list[float]:
        """Score texts or conversations, which this model's own tokenizer encodes.

        Args:
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
            some = [rows[number] for number in numbers]
            types = [getattr(row, "token_types", None) for row in some]
            known = None if None in types else padded_rows(types, 0, device)[0]
            values = self.reader(self.model, *padded_rows(some, self.reader.pad_id, device), known) - self.bias
            for number, value in zip(numbers, values.tolist(), strict=True):
                scores[number] = value
        return scores


def is_foreign(source: str | Path | torch.nn.Module) -> bool:
    """Whether others trained a model, given as a folder or as an object: then it is read as transformers reads it.

    The configuration says so: it carries the bias of the scores where this project's stage trained the model. One that
    was trained elsewhere and stands in a run (``reward_model.path``) has a bias, too, and says what it is. A role on a
    shared base is ours.
    """
    if isinstance(source, str | Path):
        file = Path(source) / "config.json"
        config = read_json(file) if file.is_file() else {}
    elif not isinstance(base(source), PreTrainedModel):
        return False
    else:
        config = vars(source.config)
    return BIAS_KEY not in config or bool(config.get(FOREIGN_KEY))


def scoring_tokenizer(path: str | Path, model_config: ModelConfig | None = None) -> PreTrainedTokenizerBase:
    """A reward model's tokenizer; the run's ``model.chat_template`` serves only one that has none."""
    model_config = model_config or ModelConfig()
    own = load_tokenizer(path, dataclasses.replace(model_config, chat_template=None), writes=False)
    if own.chat_template or not model_config.chat_template:
        return own
    return load_tokenizer(path, model_config, writes=False)
