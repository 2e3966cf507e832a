"""Where an LLM judge's replies come from: an OpenAI-compatible endpoint, or a model loaded here."""

import os
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch

from ppo_vs_dpo.artifacts.errors import UserError


@dataclass
class Reply:
    """What came back.

    Attributes:
        text: the reply.
        tokens: for each generated token its most likely alternatives, ``{token: log-probability}``; empty if unknown.
        prompt_tokens: counted by the backend.
        completion_tokens: counted by the backend.
    """

    text: str
    tokens: list[dict[str, float]] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Backend(Protocol):
    """Answers conversations."""

    def ask(self, messages: list[dict[str, str]], max_tokens: int, temperature: float, seed: int) -> Reply:
        """One reply.

        Raises:
            EndpointDown: it cannot be had, now or after retries.
        """

    def identity(self) -> dict[str, Any]:
        """What its replies depend on; no secrets."""


class EndpointDown(Exception):
    """The backend gives no replies any more; the message is for people."""


class RateLimit:
    """At most ``per_minute`` calls in any minute, spread evenly; thread-safe."""

    def __init__(self, per_minute: float | None):
        self.interval = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Sleep until this call may go out."""
        if not self.interval:
            return
        with self._lock:
            now = time.monotonic()
            at = max(now, self._next)
            self._next = at + self.interval
        time.sleep(max(0.0, at - now))


class OpenAIBackend:
    """Any endpoint that speaks OpenAI's chat-completions protocol, through the ``openai`` client.

    Args:
        model: its name at the endpoint.
        base_url: the endpoint; ``None`` for the client's default.
        api_key_env: name of the environment variable that holds the key; only its name is ever written down.
        timeout: seconds for one request.
        retries: of the client, with growing pauses, on refused connections, time-outs, 429 and 5xx.
        requests_per_minute: rate limit, ``None`` for none.
        logprobs: ask for log-probabilities of the verdict; switched off if the endpoint refuses them.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        timeout: float = 60.0,
        retries: int = 3,
        requests_per_minute: float | None = None,
        logprobs: bool = True,
    ):
        try:
            import openai
        except ImportError:
            raise UserError("an LLM judge needs the openai client: pip install 'ppo-vs-dpo[judge]'.") from None
        key = os.environ.get(api_key_env, "")
        if not key and base_url is None:
            raise UserError(f"the judge {model} needs an API key in the environment variable {api_key_env}.")
        # Endpoints on one's own machine ask for no key; the client wants one.
        self._client = openai.OpenAI(base_url=base_url, api_key=key or "none", timeout=timeout, max_retries=retries)
        self._openai = openai
        self.model, self.logprobs = model, logprobs
        self.host = urlsplit(base_url).hostname if base_url else "the client's default endpoint"
        self._rate = RateLimit(requests_per_minute)

    def identity(self) -> dict[str, Any]:
        """Model, host, whether log-probabilities were asked for."""
        return {"model": self.model, "endpoint": self.host}

    def ask(self, messages: list[dict[str, str]], max_tokens: int, temperature: float, seed: int) -> Reply:
        """One reply.

        Raises:
            EndpointDown: refused, unreachable or failing after all retries.
            UserError: the endpoint does not know the model or the key.
        """
        self._rate.wait()
        extra: dict[str, Any] = {"logprobs": True, "top_logprobs": 10} if self.logprobs else {}
        try:
            found = self._client.chat.completions.create(
                model=self.model,
                messages=messages,
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed,
                **extra,
            )
        except (self._openai.AuthenticationError, self._openai.PermissionDeniedError, self._openai.NotFoundError) as e:
            raise UserError(f"the judge's endpoint {self.host} refuses {self.model}: {_first_line(e)}") from None
        except (self._openai.BadRequestError, self._openai.UnprocessableEntityError) as error:
            if self.logprobs and "logprob" in str(error).lower():
                self.logprobs = False  # this endpoint gives none
                return self.ask(messages, max_tokens, temperature, seed)
            raise EndpointDown(f"the judge's endpoint {self.host} refuses a request: {_first_line(error)}") from None
        except (self._openai.OpenAIError, ValueError) as error:  # ValueError: a body that is not JSON
            raise EndpointDown(f"the judge's endpoint {self.host} does not answer: {_first_line(error)}") from None
        return _reply(found)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _reply(found: Any) -> Reply:
    """The client's answer as a `Reply`; an answer without choices or text is an empty one, which does not parse."""
    choices = getattr(found, "choices", None) or []
    message = choices[0].message if choices else None
    text = (message.content if message is not None else None) or ""
    content = getattr(getattr(choices[0], "logprobs", None), "content", None) if choices else None
    tokens = [
        {top.token: top.logprob for top in item.top_logprobs or []} | {item.token: item.logprob}
        for item in content or []
    ]
    usage = getattr(found, "usage", None)
    return Reply(
        text,
        tokens,
        getattr(usage, "prompt_tokens", 0) or 0,
        getattr(usage, "completion_tokens", 0) or 0,
    )


class LocalBackend:
    """A chat model loaded in this process.

    Args:
        path: Hub name or folder.
        model_config: how to load it.
    """

    def __init__(self, path: str, model_config: Any = None):
        from ppo_vs_dpo.models.loading.pretrained import eos_token_ids, load_policy, load_tokenizer

        self.path = path
        self._tokenizer = load_tokenizer(path, model_config)
        self._model = load_policy(path, model_config)
        if torch.accelerator.is_available():
            self._model.to(torch.accelerator.current_accelerator())
        self._eos = eos_token_ids(self._model, self._tokenizer)
        self._lock = threading.Lock()

    def identity(self) -> dict[str, Any]:
        """The model's name."""
        return {"model": self.path, "endpoint": "local"}

    @torch.no_grad()
    def ask(self, messages: list[dict[str, str]], max_tokens: int, temperature: float, seed: int) -> Reply:
        """One reply with the ten likeliest tokens at every step; one at a time."""
        from ppo_vs_dpo.models.passes.logprobs import pad_batch, response_logits
        from ppo_vs_dpo.models.sampling.generation import SamplingConfig, generate
        from ppo_vs_dpo.models.text.prompts import decode_completion, encode_prompt

        with self._lock:
            prompt = encode_prompt(self._tokenizer, messages)
            sampling = SamplingConfig(max_new_tokens=max_tokens, temperature=temperature)
            sample = generate(self._model, [prompt], sampling, eos_token_ids=self._eos, seeds=[seed])[0]
            device = next(self._model.parameters()).device
            batch = pad_batch([prompt], [sample.token_ids], self._tokenizer.pad_token_id, device)
            top = response_logits(self._model, batch).float().log_softmax(-1).topk(10, dim=-1)
        tokens = [
            {self._tokenizer.decode([i]): value for i, value in zip(ids, values, strict=True)}
            for ids, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
        text = decode_completion(self._tokenizer, sample.token_ids)
        return Reply(text, tokens, len(prompt), len(sample.token_ids))
