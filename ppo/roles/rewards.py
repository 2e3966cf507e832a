"""Where scores come from: a reward model, with any tokenizer; Python functions; or a weighted mix of them."""

import contextlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ppo_vs_dpo.artifacts.awaiting import wait_for
from ppo_vs_dpo.artifacts.errors import UserError, short
from ppo_vs_dpo.models.loading.files import BIAS_KEY
from ppo_vs_dpo.models.loading.pretrained import context_length
from ppo_vs_dpo.models.loading.vocabulary import check_tokens
from ppo_vs_dpo.models.passes.logprobs import base
from ppo_vs_dpo.ppo.roles.given import as_value_or_reward
from ppo_vs_dpo.ppo.roles.shaping import combined
from ppo_vs_dpo.preferences.recipes.functions import ScoreError, as_scores, called, sums_of_dense
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


class EnsembleReward:
    """Several reward models as one: their mean, the worst, or the mean less their disagreement (`shaping.combined`).

    Raises:
        UserError: members of other vocabularies than the first.
    """

    def __init__(self, members: list[ModelReward], kind: str, coef: float):
        for number, member in enumerate(members):
            if not same_tokenizer(member.scorer.tokenizer, members[0].scorer.tokenizer):
                raise UserError(
                    f"reward_model is an ensemble, and member {number} ({member.name}) has another vocabulary or chat "
                    f"template than member 0 ({members[0].name}): their scores are of other texts. Train all from one "
                    f"policy (reward_model.ensemble), or give them as rewards of their own."
                )
        self.members, self.kind, self.coef = members, kind, coef
        self.name = f"ensemble of {len(members)} reward models ({kind})"

    def __call__(self, *asked, **columns) -> list[float]:
        found = [(one.name, one(*asked, **columns)) for one in self.members]  # all, before one is found unusable
        scores = [as_scores(name, values, asked[0], asked[1]) for name, values in found]
        return combined(torch.tensor(scores, dtype=torch.float64).T, self.kind, self.coef).tolist()


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

    Columns are those of the data set, ``finished`` (list of bool), ``prompt_ids`` and ``response_ids`` (lists of token
    ids); a function without ``**kwargs`` gets the ones it names. For a response it may also return a list with one
    number a token of ``response_ids``: dense rewards, whose sum is the score.
    """

    def __init__(self, function: RewardFunction):
        self.function = function
        self.name = f"reward function {getattr(function, '__name__', type(function).__name__)}"
        parameters = inspect.signature(function).parameters.values()
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.names = {p.name for p in parameters}

    def __call__(self, prompts, completions, prompt_ids, response_ids, finished, **columns) -> list[float]:
        columns = {"finished": finished, "prompt_ids": prompt_ids, "response_ids": response_ids, **columns}
        if not self.takes_all:
            columns = {k: v for k, v in columns.items() if k in self.names}
        try:
            return called(self.function, prompts=prompts, completions=completions, **columns)
        except Exception as error:
            row = self._culprit(prompts, completions, columns)
            where = (
                ""
                if row is None
                else f" for sample {row} (prompt {short(prompts[row])}, completion {short(completions[row])})"
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


class Rewards:
    """A weighted sum of rewards; with one part, that part.

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
        """The parts that are models of ours, members of an ensemble one by one, for the trainer to place or shard."""
        members = [one for part in self.parts for one in getattr(part, "members", [part])]
        return [one for one in members if isinstance(one, ModelReward)]

    @property
    def length_slope(self) -> float | None:
        """What a token more is worth to the weighted reward models, by their reports; ``None`` where none says."""
        slopes = [
            (weight / len(members), one.scorer.length_slope)
            for part, weight in zip(self.parts, self.weights, strict=True)
            for members in (getattr(part, "members", [part]),)
            for one in members
            if isinstance(one, ModelReward)
        ]
        if not slopes or any(slope is None for _, slope in slopes):
            return None
        return sum(weight * slope for weight, slope in slopes)

    def check_context(self, prompts: Sequence, longest: int, response_length: int) -> None:
        """Prompt and response must fit into every reward model, before anything is sampled.

        Raises:
            UserError: they do not.
        """
        for part in self.models():
            part.check_context(prompts, longest, response_length)

    def shared(self) -> tuple[PreTrainedModel, float, float] | None:
        """The first reward model that reads the policy's own tokens: what a value model can start from.

        Returns:
            The model, its weight in the mix, and the bias that is subtracted from its scores; ``None`` without one.
        """
        for part, weight in zip(self.parts, self.weights, strict=True):
            one = getattr(part, "members", [part])[0]
            if isinstance(one, ModelReward) and one.same_tokens:
                return one.model, weight, one.scorer.bias
        return None

    @property
    def wants_references(self) -> bool:
        """Whether a part compares with the reference's answers (a judge)."""
        return any(getattr(part, "wants_references", False) for part in self.parts)

    def __call__(self, prompts, completions, prompt_ids, response_ids, finished, **columns) -> "Scored":
        """Scores of ``N`` completions.

        Args:
            columns: of the data set; ``reference_answers`` where a part wants them.

        Raises:
            RewardError: a part raised, or gave what `preferences.recipes.functions.as_scores` does not take.
        """
        out, answers = Scored([0.0] * len(prompts), [], None), columns.pop("reference_answers", None)
        failed: RewardError | None = None
        for part, weight in zip(self.parts, self.weights, strict=True):
            if failed is not None and not isinstance(part, ModelReward | EnsembleReward):
                continue
            more = {"reference_answers": answers} if getattr(part, "wants_references", False) else {}
            try:
                found = part(prompts, completions, prompt_ids, response_ids, finished, **columns, **more)
                found, dense = sums_of_dense(part.name, found, [len(ids) for ids in response_ids])
                scores = as_scores(part.name, found, prompts, completions)
            except RewardError as raised:
                # Models that are in pieces are still asked: all ranks make their passes together.
                failed = failed or raised
                continue
            out.parts.append(scores)
            for row, score in enumerate(scores):
                out.total[row] += weight * score
            if dense is not None:
                weighted = [[weight * value for value in row] for row in dense]
                rows = zip(out.dense or [[0.0] * len(row) for row in dense], weighted, strict=True)
                out.dense = [[a + b for a, b in zip(*pair, strict=True)] for pair in rows]
        if failed is not None:
            raise failed
        return out


@dataclass
class Scored:
    """What the rewards say of ``N`` responses.

    Attributes:
        total: the weighted sum, dense rewards included.
        parts: each part's scores, without its weight.
        dense: of each response the weighted rewards of its tokens; ``None`` where no part has any.
    """

    total: list[float]
    parts: list[list[float]]
    dense: list[list[float]] | None


def make_rewards(
    reward_model: Any,
    reward_funcs: RewardFunction | list[RewardFunction] | None,
    tokenizer: PreTrainedTokenizerBase,
    own_tokenizer: PreTrainedTokenizerBase | None,
    weights: list[float] | None,
    batch_size: int,
    policy: PreTrainedModel | None = None,
    ensemble: str = "mean",
    ensemble_coef: float = 0.0,
) -> Rewards:
    """Put the rewards of a trainer together.

    Args:
        reward_model: a model, its name, a scorer, ``None``; a list of the first three is an ensemble.
        reward_funcs: a function or several.
        own_tokenizer: the reward model's; by default the one that lies where the model was loaded from, by name or as
            an object, else the policy's.
        weights: model first, then functions.
        policy: whose tokens a reward model without a tokenizer is taken to read.
    """
    parts: list[Any] = []
    if isinstance(reward_model, list | tuple):
        alike = (tokenizer, own_tokenizer, None, batch_size, policy)
        each = [make_rewards(one, None, *alike).parts[0] for one in reward_model]
        if len(each) < 2 or not all(isinstance(one, ModelReward) for one in each):
            raise UserError(
                f"reward_model is a list of {len(each)}: an ensemble is of two or more reward models (models, names "
                f"or RewardScorers). Functions go into reward_funcs."
            )
        parts, reward_model = [EnsembleReward(each, ensemble, ensemble_coef)], None
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
    # A judge is a part already.
    given = [one for one in functions if one is not None]
    parts.extend(one if getattr(one, "wants_references", False) else FunctionReward(one) for one in given)
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
