"""What samples a rollout's responses: one small interface, and the engine that works everywhere.

`TransformersEngine` is this project's own loop (`models.sampling.generation`) on the very model that trains. An
engine that keeps weights of its own (`models.sampling.vllm.colocated`) gets the trained ones before it samples, and
reports the probabilities that it sampled with: its kernels round otherwise than the trainer's.
"""

from collections.abc import Sequence
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_vs_dpo.models.sampling.generation import Generated, SamplingConfig, generate


class Engine(Protocol):
    """Samples completions of one policy, whose weights change.

    Attributes:
        keeps_weights: whether the engine samples with a copy of the weights and kernels of its own. Its
            log-probabilities may then differ from the trainer's, and every completion carries them.
        forgets: whether its weights are gone after each call (an engine that sleeps): they are sent before the next.
        streams: whether it takes the weights a bucket at a time, from all ranks together: then nothing is gathered
            around its calls, and it samples the reference, too.
    """

    keeps_weights: bool
    forgets: bool
    streams: bool

    def update_weights(self, model: PreTrainedModel) -> None:
        """Sample with the present weights of ``model`` from now on.

        Args:
            model: the policy, whole on this process unless the engine ``streams``.
        """

    def generate(
        self, prompt_ids: Sequence[list[int]], sampling: SamplingConfig, seeds: Sequence[int]
    ) -> list[Generated]:
        """Draw one completion for every prompt.

        Args:
            prompt_ids: ``N`` prompts as token ids, none empty.
            seeds: ``N`` seeds, one a row: the same seeds and weights give the same completions.

        Returns:
            ``N`` completions in the order of the prompts. ``logprobs`` are those of the sampled tokens at the
            sampling temperature, always where the engine keeps weights of its own.

        Raises:
            UserError: something in the arguments that the engine cannot do.
        """


class TransformersEngine:
    """The loop of `models.sampling.generation` on the model as it is: no copy, nothing to synchronise.

    Args:
        eos_token_ids: tokens that end a completion.
        tokenizer: for stop strings.
        with_logprobs: completions carry log-probabilities and entropies.
    """

    keeps_weights = False
    forgets = False
    streams = False

    def __init__(self, eos_token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, with_logprobs: bool = False):
        self.eos_token_ids, self.tokenizer, self.with_logprobs = eos_token_ids, tokenizer, with_logprobs
        self.model: PreTrainedModel | None = None

    def update_weights(self, model: PreTrainedModel) -> None:
        """Sample from this model: the object itself is kept, so its weights are always the present ones."""
        self.model = model

    def generate(
        self, prompt_ids: Sequence[list[int]], sampling: SamplingConfig, seeds: Sequence[int]
    ) -> list[Generated]:
        """See `Engine.generate` and `models.sampling.generation.generate`."""
        return generate(
            self.model,
            prompt_ids,
            sampling,
            eos_token_ids=self.eos_token_ids,
            seeds=seeds,
            tokenizer=self.tokenizer,
            with_logprobs=self.with_logprobs,
        )
