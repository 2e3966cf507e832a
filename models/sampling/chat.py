"""Chat models behind an OpenAI-compatible endpoint, asked patiently; what they say is checked before it is believed.

Who pays for replies wants to know which of four things happened: a reply; this one request is refused (`Refused`), and
others may be answered; the endpoint gives nothing now (`EndpointDown`); the user has something to mend (`UserError`).
A page of a proxy, ``{}``, ``null`` or a list with status 200 is no reply, however often it comes.
"""

import json
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from ppo_vs_dpo.artifacts.awaiting import wait_for
from ppo_vs_dpo.artifacts.errors import UserError, first_sentence

# Longest pause that an endpoint may ask for (Retry-After), in seconds.
LONGEST_PAUSE = 60.0
# What an endpoint may not know, and how it is called in a request.
DISPENSABLE = ("logprobs", "temperature", "top_p", "seed")
_UNKNOWN_TO_IT = re.compile(
    r"not support|no support|unsupported|unrecogni[sz]ed|unknown|unexpected|not allowed|not permitted|extra inputs"
    r"|only the default|deprecated",
    re.I,
)
_FILTERED = re.compile(r"content.{0,3}(filter|management|policy)|moderation|safety|flagged|responsible ai", re.I)
_TOO_LONG = re.compile(r"context.{0,10}(length|window|size)|too (long|many tokens)|maximum.{0,20}tokens", re.I)


# How models mark their thinking: DeepSeek-R1, Qwen3 and most others; Magistral; Seed; gpt-oss (harmony).
THINKING = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel|>analysis", "<|channel|>final<|message|>"),
)


@dataclass
class Reply:
    """What came back.

    Attributes:
        text: the reply; thinking that the endpoint keeps apart is not in it.
        tokens: for each generated token its most likely alternatives, ``{token: log-probability}``; empty if unknown.
        prompt_tokens: counted by the endpoint.
        completion_tokens: counted by the endpoint, thinking included.
        finish: why it ended: ``stop``, ``length`` (cut off), ``content_filter``; empty where it was not said.
        written: the generated tokens that ``tokens`` belong to, where the endpoint names them.
    """

    text: str
    tokens: list[dict[str, float]] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish: str = ""
    written: list[str] = field(default_factory=list)


class EndpointDown(Exception):
    """The endpoint gives no replies any more; the message is for people."""


class Refused(Exception):
    """This request is not answered, others may be (a content filter, too long a prompt); the message is for people."""


class GarbageError(Exception):
    """A body that is no chat completion; says what it is."""


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


class ChatEndpoint:
    """One model at one endpoint, through the ``openai`` client.

    Args:
        model: its name at the endpoint.
        base_url: the endpoint; ``None`` for the client's default.
        api_key_env: name of the environment variable that holds the key; only its name is ever written down.
        timeout: seconds for one request, from its first byte sent to its last byte read.
        retries: further tries, with growing pauses, after a refused connection, a time-out, 408, 409, 429, 5xx, or a
            body that is no reply.
        requests_per_minute: rate limit, ``None`` for none.
        who: whose endpoint it is, for messages.
        key_needed: also where ``base_url`` is set.

    Raises:
        UserError: no client, or no key where one is needed.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        timeout: float = 60.0,
        retries: int = 3,
        requests_per_minute: float | None = None,
        who: str = "the judge",
        key_needed: bool = False,
    ):
        try:
            import openai
        except ImportError:
            raise UserError(f"{who} needs the openai client: pip install 'ppo-vs-dpo[judge]'.") from None
        self._key = os.environ.get(api_key_env, "")
        if not self._key and (base_url is None or key_needed):
            raise UserError(f"{who} {model} needs an API key in the environment variable {api_key_env}.")
        self._openai = openai
        self.model, self.timeout, self.retries, self.who = model, timeout, retries, who
        # Endpoints on one's own machine ask for no key; the client wants one. One place decides what is tried again.
        self._client = openai.AsyncOpenAI(
            base_url=base_url, api_key=self._key or "none", timeout=timeout, max_retries=0
        )
        self.address = without_secrets(str(self._client.base_url))
        self._rate = RateLimit(requests_per_minute)
        self._lock = threading.Lock()
        self._dropped: set[str] = set()
        self._budget: str | None = None  # the name that the endpoint was found to know
        self.pause = 0.5

    @property
    def dropped(self) -> list[str]:
        """Parameters that the endpoint does not know and is no longer sent."""
        return sorted(self._dropped)

    def masked(self, text: str) -> str:
        """A text without the key, which some endpoints send back."""
        return text.replace(self._key, "***") if len(self._key) > 3 else text

    def _said(self, what: str) -> str:
        return self.masked(f"{self.who}'s endpoint {self.address} {what}")

    def ask(
        self,
        messages: list[dict[str, Any]],
        budget: int,
        reasoning: bool = False,
        read: Callable[[Reply], Any] = lambda reply: reply,
        **parameters: Any,
    ) -> Any:
        """One reply, as ``read`` takes it.

        Args:
            reasoning: the model thinks first: the budget goes by the name that includes thinking.
            read: what to make of the reply; by a `GarbageError` it asks for another one.
            parameters: ``temperature``, ``seed``, ``logprobs`` and the like; what the endpoint does not know is left
                out from then on (`dropped`).

        Raises:
            Refused: this request is not answered.
            EndpointDown: nothing is, after all tries.
            UserError: the endpoint does not know the model or the key.
        """
        reason, told = "", 0.0
        for attempt in range(self.retries + 1):
            if attempt:
                growing = self.pause * 2 ** (attempt - 1) * (0.75 + 0.5 * random.random())
                time.sleep(min(LONGEST_PAUSE, max(growing, told)))
            self._rate.wait()
            told = 0.0
            try:
                return read(self._once(messages, budget, reasoning, parameters))
            except self._openai.APITimeoutError:
                reason = f"no answer within {self.timeout:g} seconds"
            except TimeoutError:
                reason = f"no whole answer within {self.timeout:g} seconds"
            except self._openai.APIConnectionError as error:
                reason = f"it could not be reached ({first_line(error.__cause__ or error)})"
            except self._openai.APIStatusError as error:
                reason = f"status {error.status_code}: {first_line(error)}"
                if error.status_code >= 500 and _is_about_this(error):
                    raise Refused(self._said(f"refuses a request: {reason}")) from None
                if error.status_code not in (408, 409, 429) and error.status_code < 500:
                    break
                told = _told_to_wait(error)
            except (GarbageError, self._openai.OpenAIError, ValueError) as error:
                reason = f"an answer that is none: {first_line(error)}"
        raise EndpointDown(self._said(f"does not answer: {reason}, {attempt + 1} times")) from None

    def _once(self, messages, budget: int, reasoning: bool, parameters: dict[str, Any]) -> Reply:
        left_out = set(self._dropped)
        name = self._budget or ("max_completion_tokens" if reasoning else "max_tokens")
        tried: set[str] = set()
        while True:
            sent = {key: value for key, value in parameters.items() if key not in left_out and value is not None}
            if sent.pop("logprobs", None):
                sent |= {"logprobs": True, "top_logprobs": sent.pop("top_logprobs", 10)}
            else:
                sent.pop("top_logprobs", None)
            try:
                reply = self._send(messages, {name: budget, **sent})
            except self._openai.APIStatusError as error:
                if error.status_code in (401, 404) or (error.status_code == 403 and not _is_about_this(error)):
                    raise UserError(self._said(f"refuses {self.model}: {first_line(error)}")) from None
                if error.status_code not in (400, 403, 413, 422, 451):
                    raise
                unknown = self._unknown_in(error, {name, *sent} - tried)
                if unknown is None:
                    raise Refused(self._said(f"refuses a request: {first_line(error)}")) from None
                tried.add(unknown)
                if unknown == name:
                    name = "max_tokens" if name == "max_completion_tokens" else "max_completion_tokens"
                    tried.add(name)
                else:
                    left_out.add(unknown)
                continue
            with self._lock:  # it went through: from now on like this
                self._dropped |= left_out
                self._budget = name if name in tried else self._budget
            return reply

    def _unknown_in(self, error: Any, sent: set[str]) -> str | None:
        """The parameter that an error is about, if one of those that can be left out or called otherwise."""
        text = str(error).lower()
        if _FILTERED.search(text):
            return None
        candidates = [key for key in (*DISPENSABLE, "max_tokens", "max_completion_tokens") if key in sent]
        if not _UNKNOWN_TO_IT.search(text):
            # Endpoints refuse log-probabilities in many words (too many, not with this model): none are needed.
            return "logprobs" if "logprobs" in candidates and "logprob" in text else None
        body = error.body if isinstance(getattr(error, "body", None), dict) else {}
        named = getattr(error, "param", None) or body.get("param")
        if named in candidates:
            return named
        return next((key for key in candidates if key.removesuffix("s") in text), None)

    def _send(self, messages: list[dict[str, Any]], parameters: dict[str, Any]) -> Reply:
        reply = reply_of(completion(self._client, self.timeout, model=self.model, messages=messages, **parameters))
        reply.text = self.masked(reply.text)
        return reply


def completion(client: Any, timeout: float, **parameters: Any) -> Any:
    """The body of one chat completion, as JSON has it.

    Args:
        client: an ``openai.AsyncOpenAI``.
        timeout: seconds for all of it. The client's own is for each read: a byte a second would never end.

    Raises:
        TimeoutError: it took longer.
        GarbageError: it is not JSON.
    """

    async def whole() -> Any:
        raw = await client.chat.completions.with_raw_response.create(**parameters)
        return raw.http_response

    response = wait_for(whole(), seconds=timeout)
    try:
        return json.loads(response.content)
    except (ValueError, UnicodeDecodeError):
        kind = response.headers.get("content-type", "no content type").split(";")[0]
        raise GarbageError(f"status {response.status_code} with {kind} that is not JSON") from None


def _told_to_wait(error: Any) -> float:
    """Seconds that the endpoint asks to wait for; 0 where it names none (or a date)."""
    try:
        return max(0.0, float(error.response.headers.get("retry-after", 0)))
    except ValueError:
        return 0.0


def _is_about_this(error: Any) -> bool:
    """Whether an error is about this one request: a content filter, or a prompt that is too long."""
    return bool(_FILTERED.search(str(error)) or _TOO_LONG.search(str(error)))


def without_secrets(url: str) -> str:
    """An address as it may be written down: no user, no password, no query."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    where = f"{host}:{parts.port}" if parts.port else host
    return urlunsplit((parts.scheme, where, parts.path.rstrip("/"), "", ""))


def first_line(error: Any) -> str:
    """The first line of an error, 200 characters at most, without control characters."""
    return "".join(c if c.isprintable() else " " for c in first_sentence(error))[:200]


def reply_of(body: Any) -> Reply:
    """A chat completion's body as a `Reply`.

    Raises:
        GarbageError: it is something else; says what.
    """
    if not isinstance(body, dict):
        raise GarbageError(f"JSON that is {'null' if body is None else 'a ' + type(body).__name__}, not an object")
    choices = body.get("choices")
    if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
        said = body.get("error")
        said = said.get("message") if isinstance(said, dict) else said
        raise GarbageError(f"no choices in it{f' ({said})' if said else ''}")
    choice = choices[0]
    message = choice.get("message")
    if not isinstance(message, dict):
        raise GarbageError("no message in it")
    finish = choice.get("finish_reason")
    finish = finish if isinstance(finish, str) else ""
    text = _text_of(message.get("content"))
    if text is None:
        # A model that only thought, or would not: that is a reply, and was paid for. Nothing at all is none.
        thought = any(message.get(key) for key in ("reasoning_content", "reasoning", "refusal", "tool_calls"))
        if not thought and finish not in ("length", "content_filter"):
            raise GarbageError("no text in it")
        refusal = message.get("refusal")
        text = refusal if isinstance(refusal, str) else ""
    usage = body.get("usage") if isinstance(body.get("usage"), dict) else {}
    tokens, written = _tokens_of(choice.get("logprobs"))
    used = (_count(usage, "prompt_tokens"), _count(usage, "completion_tokens"))
    return Reply(text, tokens, *used, finish, written)


def _text_of(content: Any) -> str | None:
    """A text, or the text parts of a list; parts with thinking are not text."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [
            part for part in content if isinstance(part, dict) and part.get("type", "text") in ("text", "output_text")
        ]
        texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        return "".join(texts) if texts else None
    return None


def _tokens_of(logprobs: Any) -> tuple[list[dict[str, float]], list[str]]:
    """Alternatives at every generated token, and the tokens."""
    items = logprobs.get("content") if isinstance(logprobs, dict) else None
    alternatives, written = [], []
    for item in items if isinstance(items, list) else []:
        if not isinstance(item, dict):
            continue
        some = [*(top for top in item.get("top_logprobs") or [] if isinstance(top, dict)), item]
        alternatives.append({top["token"]: float(top["logprob"]) for top in some if _is_logprob(top)})
        written.append(str(item.get("token", "")))
    return alternatives, written


def _is_logprob(top: dict[str, Any]) -> bool:
    value = top.get("logprob")
    return isinstance(top.get("token"), str) and isinstance(value, int | float) and math.isfinite(value)


def _count(usage: dict[str, Any], key: str) -> int:
    value = usage.get(key)
    return int(value) if isinstance(value, int | float) and math.isfinite(value) and value >= 0 else 0


def after_thinking(text: str) -> str:
    """What a reply says after its thinking; nothing where the thinking has no end.

    Endpoints that keep thinking apart send none. Others leave it in the text between marks, whose first one the chat
    template may have put into the prompt already.
    """
    for opening, closing in THINKING:
        _, mark, after = text.rpartition(closing)
        if mark:
            text = after
        elif opening in text:
            text = text[: text.index(opening)]
    return text
