"""Where scores come from: a reward model, with any tokenizer; Python functions; or a weighted mix of them."""

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ppo_vs_dpo.artifacts.awaiting import wait_for
from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.files import BIAS_KEY
from ppo_vs_dpo.models.loading.pretrained import check_tokens, context_length
from ppo_vs_dpo.models.passes.logprobs import base
from ppo_vs_dpo.ppo.roles.given import as_value_or_reward
from ppo_vs_dpo.preferences.recipes.functions import ScoreError, as_scores, called
from ppo_vs_dpo.reward_model.scorer import RewardScorer, scoring_tokenizer

logger = logging.get_logger(__name__)

RewardFunction = Callable[..., Sequence[float]]


# A reward that cannot be used; carries the row of the sample.
RewardError = ScoreError


class ModelReward:
    """Scores of a reward model (`reward_model.scorer.RewardScorer`), read at the last real token.

    Where its tokenizer is the policy's and it reads sequences as the policy writes them, the sampled token ids are
    scored as they are. Else prompt and completion are tokenised again as the reward model's own tokenizer pairs them.

    Args:
        scorer: the reward model with its tokenizer.
        tokenizer: the policy's.
    """

    def __init__(self, scorer: RewardScorer, tokenizer: PreTrainedTokenizerBase):
        scorer.model.requires_grad_(False)
        self.scorer = scorer
        self.same_tokens = same_tokenizer(scorer.tokenizer, tokenizer) and scorer.is_decoder
        # The run's arithmetic, once the trainer has placed the model.
        self.computing: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
        self.name = f"reward model {getattr(scorer.model, 'name_or_path', '') or type(scorer.model).__name__}"

    @property
    def model(self) -> torch.nn.Module:
        """The reward model, for the trainer to place or shard."""
        return self.scorer.model

    @model.setter
    def model(self, model: torch.nn.Module) -> None:
        # A DeepSpeed engine works by hooks on the module inside it.
        self.scorer.model = getattr(model, "module", model)

    def check_context(self, prompts: Sequence, longest: int, response_length: int) -> None:
        """See `Rewards.check_context`."""
        if not self.same_tokens:
            self.scorer.check_context(prompts, response_length, self.name, "ppo.response_length")
            return
        limit = context_length(self.model)
        if limit is not None and longest + response_length > limit:
            raise UserError(
                f"{self.name} takes {limit} tokens, and the longest prompt ({longest}) with a response of "
                f"{response_length} (ppo.response_length) has {longest + response_length}. Lower response_length or "
                f"max_prompt_length, or take a reward model with the policy's context."
            )

    def __call__(self, prompts, completions, prompt_ids, response_ids, finished, **columns) -> list[float]:
        with self.computing():
            if self.same_tokens:
                return self.scorer.score_sequences([[*p, *r] for p, r in zip(prompt_ids, response_ids, strict=True)])
            return self.scorer.score(prompts, completions, finished)


class ScorerReward:
    """Any other object with ``score(prompts, completions, finished) -> list[float]``."""

    def __init__(self, scorer: Any):
        self.scorer = scorer
        self.name = f"reward model {getattr(scorer, 'name', '') or type(scorer).__name__}"

    def __call__(self, prompts, completions, prompt_ids, response_ids, finished, **columns) -> list[float]:
        found = self.scorer.score(prompts, completions, finished)
        return wait_for(found) if inspect.isawaitable(found) else found


class FunctionReward:
    """A Python function ``f(prompts, completions, **columns) -> list[float]``; a coroutine is awaited.

    Columns are those of the data set, and ``finished`` (list of bool); a function without ``**kwargs`` gets the ones
    it names.
    """

    def __init__(self, function: RewardFunction):
        self.function = function
        self.name = f"reward function {getattr(function, '__name__', type(function).__name__)}"
        parameters = inspect.signature(function).parameters.values()
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.names = {p.name for p in parameters}

    def __call__(self, prompts, completions, prompt_ids, response_ids, finished, **columns) -> list[float]:
        columns = {"finished": finished, **columns}
        if not self.takes_all:
            columns = {k: v for k, v in columns.items() if k in self.names}
        try:
            return called(self.function, prompts=prompts, completions=completions, **columns)
        except Exception as error:
            row = self._culprit(prompts, completions, columns)
            where = (
                ""
                if row is None
                else f" for sample {row} (prompt {_short(prompts[row])}, completion {_short(completions[row])})"
            )
            raise RewardError(f"{self.name} raised {type(error).__name__}: {error}{where}.", row) from error

    def _culprit(self, prompts, completions, columns) -> int | None:
        """The first sample that raises by itself."""
        for row in range(len(prompts)):
            try:
                called(
                    self.function,
                    prompts=[prompts[row]],
                    completions=[completions[row]],
                    **{k: [v[row]] for k, v in columns.items()},
                )
            except Exception:
                return row
        return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


class Rewards:
    """A weighted sum of rewards; with one part, that part.

    Args:
        parts: at least one.
        weights: one each; 1 by default.

    Raises:
        UserError: no part, or another number of weights.
    """

    def __init__(self, parts: list[Any], weights: list[float] | None = None):
        if not parts:
            raise UserError("PPO needs a reward: pass reward_model, reward_funcs, or both.")
        weights = [1.0] * len(parts) if weights is None else list(weights)
        if len(weights) != len(parts):
            raise UserError(f"reward_weights has {len(weights)} entries for {len(parts)} rewards; give one each.")
        self.parts, self.weights = parts, weights

    def models(self) -> list[ModelReward]:
        """The parts that are models of ours, for the trainer to place or shard."""
        return [part for part in self.parts if isinstance(part, ModelReward)]

    def check_context(self, prompts: Sequence, longest: int, response_length: int) -> None:
        """Prompt and response must fit into every reward model, before anything is sampled.

        Args:
            prompts: all of them.
            longest: tokens of the longest, in the policy's tokens.
            response_length: budget of a response.

        Raises:
            UserError: they do not.
        """
        for part in self.parts:
            if isinstance(part, ModelReward):
                part.check_context(prompts, longest, response_length)

    def shared(self) -> tuple[PreTrainedModel, float, float] | None:
        """The first reward model that reads the policy's own tokens: what a value model can start from.

        Returns:
            The model, its weight in the mix, and the bias that is subtracted from its scores; ``None`` without one.
        """
        for part, weight in zip(self.parts, self.weights, strict=True):
            if isinstance(part, ModelReward) and part.same_tokens:
                return part.model, weight, part.scorer.bias
        return None

    def __call__(self, prompts, completions, prompt_ids, response_ids, finished, **columns) -> list[float]:
        """Scores of ``N`` completions.

        Raises:
            RewardError: a part raised, or gave what `preferences.recipes.functions.as_scores` does not take.
        """
        total = [0.0] * len(prompts)
        for part, weight in zip(self.parts, self.weights, strict=True):
            scores = part(prompts, completions, prompt_ids, response_ids, finished, **columns)
            for row, score in enumerate(as_scores(part.name, scores, prompts, completions)):
                total[row] += weight * score
        return total


def make_rewards(
    reward_model: Any,
    reward_funcs: RewardFunction | list[RewardFunction] | None,
    tokenizer: PreTrainedTokenizerBase,
    own_tokenizer: PreTrainedTokenizerBase | None,
    weights: list[float] | None,
    batch_size: int,
    policy: PreTrainedModel | None = None,
) -> Rewards:
    """Put the rewards of a trainer together.

    Args:
        reward_model: a model, its name, a scorer, or ``None``.
        reward_funcs: a function or several.
        tokenizer: the policy's.
        own_tokenizer: the reward model's; by default the one that lies where the model was loaded from, by name or as
            an object, else the policy's.
        weights: model first, then functions.
        batch_size: rows per forward pass of the model.
        policy: whose tokens a reward model without a tokenizer is taken to read.
    """
    parts: list[Any] = []
    if isinstance(reward_model, str):
        reward_model = RewardScorer.load(reward_model, batch_size=batch_size)
        if own_tokenizer is not None:
            reward_model.tokenizer = own_tokenizer
            check_tokens(reward_model.model, own_tokenizer, "the reward model")
    if isinstance(reward_model, torch.nn.Module):
        model = as_value_or_reward(reward_model, trainable=False)
        bias = float(getattr(model.config, BIAS_KEY, 0.0))
        # As when it is given by name: what its config says about who trained it decides how it is read.
        own_tokenizer = own_tokenizer or _tokenizer_beside(model) or _policys_for(model, tokenizer, policy)
        reward_model = RewardScorer(model, own_tokenizer, bias, batch_size)
    if isinstance(reward_model, RewardScorer):
        parts.append(ModelReward(reward_model, tokenizer))
    elif hasattr(reward_model, "score"):
        parts.append(ScorerReward(reward_model))
    elif callable(reward_model):
        parts.append(FunctionReward(reward_model))
    elif reward_model is not None:
        raise UserError(
            f"reward_model is a {type(reward_model).__name__}; give a model, a name, a scorer or a function."
        )
    functions = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    parts.extend(FunctionReward(function) for function in functions if function is not None)
    return Rewards(parts, weights)


def _tokenizer_beside(model: torch.nn.Module) -> PreTrainedTokenizerBase | None:
    """The tokenizer in the folder (or on the Hub) that a model was loaded from, ``None`` where there is none."""
    path = str(getattr(model, "name_or_path", "") or "")
    try:
        return scoring_tokenizer(path) if path else None
    except UserError:
        return None


def _policys_for(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, policy: torch.nn.Module | None
) -> PreTrainedTokenizerBase:
    """The policy's tokenizer for a model of which nothing else is known; said where they may not belong together."""
    sizes = [tokens_of(one) for one in (model, policy)]
    if None not in sizes and sizes[0] not in (sizes[1], len(tokenizer)):
        logger.warning(
            "reward_model came without a tokenizer, and the policy's writes its input: the one has %d tokens, the "
            "policy %d. If it is not of that tokenizer, its scores mean nothing: pass reward_processing_class.",
            *sizes,
        )
    return tokenizer


def tokens_of(model: torch.nn.Module | None) -> int | None:
    """How many tokens a model has an embedding for, ``None`` where it does not say."""
    embeddings = getattr(base(model), "get_input_embeddings", lambda: None)() if model is not None else None
    return getattr(embeddings, "num_embeddings", None)


def same_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give the same ids to the same text (same vocabulary, same rendering of conversations)."""
    return a is b or (a.get_vocab() == b.get_vocab() and a.chat_template == b.chat_template)
