"""Models that answer and choose: a local model, an OpenAI-compatible endpoint, or a Python object."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.config import ModelConfig
from ppo_vs_dpo.models.loading.pretrained import context_length, load_sampler
from ppo_vs_dpo.models.passes.logprobs import pad_batch
from ppo_vs_dpo.models.sampling.chat import ChatEndpoint, EndpointDown, GarbageError, Refused, Reply, after_thinking
from ppo_vs_dpo.models.sampling.generation import SamplingConfig, generate
from ppo_vs_dpo.models.text.prompts import decode_completion, encode_prompt
from ppo_vs_dpo.preferences.config import Endpoint
from ppo_vs_dpo.preferences.reading.mappings import dialogue_text
from ppo_vs_dpo.preferences.recipes.named import load_gold
from ppo_vs_dpo.preferences.schema import Text

# What the judge's answer starts with, so that the next token is the letter (Bai et al. 2022b, section 4.1).
PREFILL = "The answer is ("
# A judge without log-probabilities says A or B; that is taken as these log-odds, not as certainty.
HARD_LOGIT = 3.0
# An endpoint that refused so many requests and answered none will answer none.
MOST_REFUSED = 16


@dataclass(frozen=True)
class Request:
    """A conversation to answer, or a plain text to continue, with the seed of its own random stream."""

    conversation: Text
    seed: int


@dataclass(frozen=True)
class Answer:
    """A text, and whether it ended by itself."""

    text: str
    finished: bool


class Model(Protocol):
    """What helper, critic and judge must be able to do. Results come as they are ready, with their number."""

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer | Refused]]:
        """Answers to conversations, or why one is refused."""

    def choose(self, questions: Sequence[Request]) -> Iterator[tuple[int, float | Refused]]:
        """Log-odds of (A) against (B) for questions that end by asking for one of the two letters; NaN: too long."""


class EndpointError(UserError):
    """A model that does not answer; what was finished is kept."""


class LocalModel:
    """A local causal language model, through the project's generation engine.

    A tokenizer without a chat template gets the dialogue as plain text (a base model continues it).
    """

    def __init__(self, path: str, sampling: SamplingConfig, config: ModelConfig | None = None):
        self.model, self.tokenizer, self.eos = load_sampler(path, config)
        self.sampling = sampling

    def _encode(self, conversation: Text) -> list[int]:
        if isinstance(conversation, list) and not self.tokenizer.chat_template:
            conversation = dialogue_text(conversation)
        return encode_prompt(self.tokenizer, conversation)

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """See `Model.answer`."""
        stops = () if self.tokenizer.chat_template else ("\n\nHuman:",)
        sampling = SamplingConfig(**{**vars(self.sampling), "stop_strings": list(stops)})
        encoded = [self._encode(request.conversation) for request in requests]
        limit = context_length(self.model)
        fits = [n for n, ids in enumerate(encoded) if limit is None or len(ids) + sampling.max_new_tokens <= limit]
        for number in set(range(len(requests))) - set(fits):
            yield number, Answer("", False)  # too long to be answered: the pair's filter counts it as empty
        generated = generate(
            self.model,
            [encoded[number] for number in fits],
            sampling,
            eos_token_ids=self.eos,
            seeds=[requests[number].seed for number in fits],
            tokenizer=self.tokenizer,
        )
        for number, sample in zip(fits, generated, strict=True):
            request = requests[number]
            text = decode_completion(self.tokenizer, sample.token_ids).split("\n\nHuman:")[0]
            yield number, Answer(text if isinstance(request.conversation, str) else text.strip(), sample.finished)

    def choose(self, questions: Sequence[Request]) -> Iterator[tuple[int, float]]:
        """See `Model.choose`: the logits of the two letters after `PREFILL`; their difference is the log-odds."""
        letters = [self.tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in ("A", "B")]
        if any(len(ids) != 1 for ids in letters):
            raise UserError("the judge's tokenizer has no single tokens for the letters A and B; use another judge.")
        prefill = self.tokenizer(PREFILL, add_special_tokens=False)["input_ids"]
        prompts = [self._encode(question.conversation) + prefill for question in questions]
        limit = context_length(self.model)
        too_long = {number for number, ids in enumerate(prompts) if limit is not None and len(ids) >= limit}
        yield from ((number, math.nan) for number in sorted(too_long))  # counted as "too long"
        # Similar lengths together: less padding.
        order = sorted(set(range(len(prompts))) - too_long, key=lambda number: len(prompts[number]))
        for start in range(0, len(order), self.sampling.batch_size):
            numbers = order[start : start + self.sampling.batch_size]
            some = [prompts[number] for number in numbers]
            # All but the last token left-padded: the last column is each question's end.
            batch = pad_batch([ids[:-1] for ids in some], [ids[-1:] for ids in some], self.tokenizer.pad_token_id)
            batch = batch.to(next(self.model.parameters()).device)
            with torch.no_grad():
                logits = self.model(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    position_ids=batch.position_ids,
                    logits_to_keep=1,
                ).logits[:, -1]
            first, second = (logits[:, ids[0]].double() for ids in letters)
            yield from zip(numbers, (first - second).tolist(), strict=True)


class OpenAIModel:
    """Any OpenAI-compatible endpoint (`models.sampling.chat.ChatEndpoint`), asked several things at once."""

    def __init__(self, settings: Endpoint, max_tokens: int, temperature: float, top_p: float):
        self.endpoint = ChatEndpoint(
            settings.model,
            settings.base_url,
            settings.api_key_env,
            settings.timeout,
            settings.retries,
            who="the model",
            key_needed=True,
        )
        self.at_once, self.max_tokens = settings.requests_at_once, max_tokens
        self.drawing = {"temperature": temperature, "top_p": top_p}
        self.answered = 0

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer | Refused]]:
        """See `Model.answer`."""
        yield from self._all(requests, self._answer)

    def choose(self, questions: Sequence[Request]) -> Iterator[tuple[int, float | Refused]]:
        """See `Model.choose`."""
        yield from self._all(questions, self._choose)

    def _all(self, requests: Sequence[Request], ask) -> Iterator[tuple[int, Any]]:
        """What is refused comes last, and only from an endpoint that answers others."""
        refused: dict[int, Refused] = {}
        with ThreadPoolExecutor(self.at_once) as pool:
            futures = {pool.submit(ask, request): number for number, request in enumerate(requests)}
            failure: EndpointError | None = None
            for future in as_completed(futures):
                if future.cancelled():
                    continue
                try:
                    result = future.result()
                    self.answered += 1
                    yield futures[future], result
                except Refused as reason:
                    refused[futures[future]] = reason
                    if not self.answered and len(refused) >= MOST_REFUSED:
                        for other in futures:
                            other.cancel()
                except EndpointError as error:
                    # Requests that are on their way may still come back and are kept; no new ones are sent.
                    failure = failure or error
                    for other in futures:
                        other.cancel()
            if refused and not self.answered and failure is None:
                failure = EndpointError(f"{next(iter(refused.values()))} It has answered none so far.")
            if failure is not None:
                raise failure
        yield from refused.items()

    def _ask(self, request: Request, read: Callable[[Reply], Any], budget: int, **parameters: Any) -> Any:
        said = request.conversation
        messages = [{"role": "user", "content": said}] if isinstance(said, str) else said
        try:
            return self.endpoint.ask(messages, budget, read=read, **parameters)
        except (EndpointDown, UserError) as error:
            raise EndpointError(f"{error}. Finished steps are kept: the same command goes on.") from None

    def _answer(self, request: Request) -> Answer:
        return self._ask(request, _as_answer, self.max_tokens, seed=request.seed % 2**31, **self.drawing)

    def _choose(self, request: Request) -> float:
        return self._ask(request, _as_choice, 8, temperature=0.0, logprobs=True, top_logprobs=20)


def _as_answer(reply: Reply) -> Answer:
    # What a model thinks is no part of its answer.
    return Answer(after_thinking(reply.text).strip(), reply.finish == "stop")


def _as_choice(reply: Reply) -> float:
    log_odds = _log_odds(reply)
    if log_odds is not None:
        return log_odds
    letter = re.search(r"\b([AB])\b", after_thinking(reply.text))
    if letter is None:
        raise GarbageError(f"neither A nor B in {reply.text!r}")
    return HARD_LOGIT if letter[1] == "A" else -HARD_LOGIT


def _log_odds(reply: Reply) -> float | None:
    """log p(A) - log p(B) at the first token that is one of the letters; ``None`` without log-probabilities."""
    for options, token in zip(reply.tokens, reply.written, strict=True):
        letters: dict[str, float] = {}
        for option, logprob in options.items():
            letter = option.strip(" ()\n")
            if letter in ("A", "B"):
                # " A", "(A" and "A" are the same answer.
                letters[letter] = float(torch.tensor([letters.get(letter, -math.inf), logprob]).logsumexp(0))
        if token.strip(" ()\n") in ("A", "B") and letters:
            # A letter that is not among the 20 most likely is less likely than all of them.
            floor = min(options.values())
            return letters.get("A", floor) - letters.get("B", floor)
    return None


def load_model(settings: Endpoint, sampling: SamplingConfig, policy: str, config: ModelConfig | None = None) -> Model:
    """The model that an endpoint's settings describe.

    It is ``policy`` where ``settings.model`` is null.

    Raises:
        UserError: it cannot be loaded, or its key is missing.
    """
    if settings.kind == "python":
        return load_gold(settings.function)()
    if settings.kind == "openai":
        return OpenAIModel(settings, sampling.max_new_tokens, sampling.temperature, sampling.top_p)
    return LocalModel(settings.model or policy, sampling, config)
