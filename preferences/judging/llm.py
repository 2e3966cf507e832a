"""An LLM as judge: both orders always, replies kept, nothing guessed, nothing paid for twice."""

import concurrent.futures
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import sha256_of
from ppo_vs_dpo.models.sampling.chat import ChatEndpoint, EndpointDown, Refused, Reply
from ppo_vs_dpo.preferences.judging.backends import Backend, LocalBackend, OpenAIBackend
from ppo_vs_dpo.preferences.judging.cache import Cache
from ppo_vs_dpo.preferences.judging.template import JudgeTemplate, load_template

ORDERS = ("forward", "swapped")
# An endpoint that refused so many requests and answered none will answer none.
MOST_REFUSED = 16


@dataclass
class LLMJudgeConfig:
    """One entry of ``compare.judges`` with ``kind: llm``.

    Attributes:
        name: in the report.
        kind: ``llm``.
        model: name at the endpoint, or a folder or Hub name where ``local`` is on.
        template: a name in configs/judge, or a YAML file.
        local: load the model in this process instead of asking an endpoint.
        base_url: the endpoint; empty for OpenAI's own.
        api_key_env: environment variable that holds the key.
        concurrency: requests at the same time.
        requests_per_minute: rate limit.
        timeout: seconds for one request, from the first byte sent to the last byte read.
        retries: of a failed request, with growing pauses.
        max_completion_tokens: for a model that thinks before it answers: budget of thinking and reply together, sent
            under this name; empty for one that does not, whose budget is the template's.
        reasks: further tries for a reply that names no verdict.
        repeats: how often each question is asked in each order; from 2 on, the report says how often the judge
            contradicts itself, and what its win rates are without that noise.
        temperature: of the judge.
        logprobs: weigh verdicts by the judge's log-probabilities where they are given.
        n_prompts: how many prompts it judges; empty for all.
        pairs: ``[[policy, versus], ...]``; empty for all pairs of the main policies.
        price_in: money for a million prompt tokens.
        price_out: money for a million reply tokens.
        max_cost: stop before starting if the estimate is above this.
    """

    name: str = "llm"
    kind: str = "llm"
    model: str = "???"
    template: str = "hh_helpfulness"
    local: bool = False
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    requests_per_minute: float | None = None
    timeout: float = 60.0
    retries: int = 3
    max_completion_tokens: int | None = None
    reasks: int = 2
    repeats: int = 1
    temperature: float = 0.0
    logprobs: bool = True
    n_prompts: int | None = None
    pairs: list[Any] = field(default_factory=list)
    price_in: float = 0.0
    price_out: float = 0.0
    max_cost: float | None = None


@dataclass(frozen=True)
class Comparison:
    """One thing to judge: two completions of one prompt."""

    policy: str
    versus: str
    prompt_id: str
    prompt: str
    ours: str
    theirs: str


@dataclass
class Judgement:
    """The typed judgement of all judges that read.

    Attributes:
        judge: name of the judge.
        policy: whose completion is preferred at 1.
        versus: whose at 0.
        prompt_id: which prompt.
        order: ``forward`` (the policy's completion shown first) or ``swapped``.
        preference: in [0, 1] for the policy, ``None`` where no reply named a verdict.
        raw: the reply.
        attempts: replies asked for.
        repeat: 0 for the first time the question is asked, 1 for the second.
        why: why there is no preference: ``refused`` by the endpoint, ``cut off``, ``no verdict``; else empty.
    """

    judge: str
    policy: str
    versus: str
    prompt_id: str
    order: str
    preference: float | None
    raw: str
    attempts: int
    repeat: int = 0
    why: str = ""


@dataclass
class Usage:
    """What was asked and paid."""

    requests: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unparseable: int = 0
    refused: int = 0
    cut_off: int = 0
    weighted: int = 0


def preference_from_tokens(template: JudgeTemplate, reply: Reply) -> float | None:
    """P(first) / (P(first) + P(second)) at the verdict's token (AlpacaEval 2's weighting); ties share equally.

    The verdict's token is the last one of the reply that is an answer word. ``None`` where log-probabilities are
    missing or give one side only.
    """
    for alternatives in reversed(reply.tokens):
        if not alternatives:
            continue
        likeliest = max(alternatives, key=alternatives.get)
        if template.side_of_token(likeliest) is None:
            continue
        mass = {"first": 0.0, "second": 0.0, "tie": 0.0}
        for token, logprob in alternatives.items():
            side = template.side_of_token(token)
            if side is not None:
                mass[side] += math.exp(logprob)
        total = sum(mass.values())
        return (mass["first"] + 0.5 * mass["tie"]) / total if total > 0 else None
    return None


class LLMJudge:
    """Asks a language model about pairs of completions."""

    in_sample = False

    def __init__(self, config: LLMJudgeConfig, backend: Backend | None = None, cache: Cache | None = None):
        self.config, self.name = config, config.name
        self.template = load_template(config.template)
        self.backend = backend or make_backend(config)
        self.cache = cache or Cache(None)
        self.usage = Usage()
        self.budget = config.max_completion_tokens or self.template.max_tokens
        self.refusal = ""
        self._lock = threading.Lock()

    def identity(self) -> dict[str, Any]:
        """What its verdicts depend on."""
        return {
            "kind": "llm",
            **self.backend.identity(),
            "template": self.template.name,
            "template_hash": self.template.identity(),
            "temperature": self.config.temperature,
            "logprobs": self.config.logprobs,
            **({"max_completion_tokens": self.budget} if self.config.max_completion_tokens else {}),
            **({"repeats": self.config.repeats} if self.config.repeats > 1 else {}),
            **({"without": ", ".join(self.backend.dropped())} if self.backend.dropped() else {}),
        }

    def estimate(self, comparisons: Sequence[Comparison]) -> dict[str, float]:
        """Requests, tokens (four characters each) and money that judging will take at most, what is kept left out."""
        requests = prompt_tokens = 0
        for comparison in comparisons:
            for order in ORDERS:
                messages = self._messages(comparison, order)
                new = sum(self.cache.get(self._key(messages, r, 0)) is None for r in range(self.config.repeats))
                requests += new
                prompt_tokens += new * (sum(len(message["content"]) for message in messages) // 4 + 8)
        completion_tokens = requests * self.budget
        return {
            "requests": requests,
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "cost": self._money(prompt_tokens, completion_tokens),
        }

    def _money(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.config.price_in + completion_tokens * self.config.price_out) / 1e6

    def counted(self) -> dict[str, float]:
        """What was really asked and paid."""
        return {**asdict(self.usage), "cost": self._money(self.usage.prompt_tokens, self.usage.completion_tokens)}

    def judge(
        self, comparisons: Sequence[Comparison], progress: Callable[[int, int], None] | None = None
    ) -> tuple[list[Judgement], str | None]:
        """Both orders of every comparison, ``repeats`` times.

        A comparison that the endpoint refuses is left out and counted (`Usage.refused`). One that refuses all of
        them from the start is stopped: that is no matter of a prompt.

        Returns:
            The judgements that were reached, in the order of the comparisons (forward, then swapped), and why it
            stopped early, or ``None``. Every reply is in the cache: the same call goes on where it stopped.

        Raises:
            UserError: the estimate is above ``max_cost``, or the endpoint refuses the model or the key.
        """
        estimate = self.estimate(comparisons)
        if self.config.max_cost is not None and estimate["cost"] > self.config.max_cost:
            raise UserError(
                f"judge {self.name}: about {estimate['requests']:.0f} requests would cost {estimate['cost']:.2f}, "
                f"more than max_cost {self.config.max_cost:.2f}. Lower n_prompts, name pairs, or raise max_cost."
            )
        tasks = [
            (comparison, order, repeat)
            for comparison in comparisons
            for order in ORDERS
            for repeat in range(self.config.repeats)
        ]
        found: list[Judgement | None] = [None] * len(tasks)
        stopped: str | None = None
        halt = threading.Event()
        with concurrent.futures.ThreadPoolExecutor(self.config.concurrency) as pool:
            running = {pool.submit(self._one, *task, halt): number for number, task in enumerate(tasks)}
            try:
                for done, future in enumerate(concurrent.futures.as_completed(running), start=1):
                    try:
                        found[running[future]] = future.result()
                    except EndpointDown as error:
                        stopped = stopped or str(error)
                    if self._refuses_everything():
                        halt.set()
                    if progress is not None:
                        progress(done, len(tasks))
            except BaseException:
                halt.set()
                raise
        if stopped is None and self.usage.refused and not self.usage.requests + self.usage.cached:
            return [], self.refusal
        return [judgement for judgement in found if judgement is not None], stopped

    def _refuses_everything(self) -> bool:
        answered = self.usage.requests + self.usage.cached
        return not answered and self.usage.refused >= MOST_REFUSED

    def _messages(self, comparison: Comparison, order: str) -> list[dict[str, str]]:
        sides = (comparison.ours, comparison.theirs)
        return self.template.messages(comparison.prompt, *(sides if order == "forward" else sides[::-1]))

    def _key(self, messages: list[dict[str, str]], repeat: int, attempt: int) -> str:
        """What a reply depends on, and nothing else: who answers, what was asked, how, and for which time."""
        temperature = self.config.temperature
        return sha256_of([self.backend.identity(), messages, self.budget, temperature, repeat, attempt])

    def _one(self, comparison: Comparison, order: str, repeat: int, halt: threading.Event) -> Judgement | None:
        messages = self._messages(comparison, order)
        preference, text, attempt, why = None, "", 0, ""
        for attempt in range(1 + self.config.reasks):
            # A greedy judge would repeat an unparseable reply: later tries sample.
            temperature = self.config.temperature if attempt == 0 else max(self.config.temperature, 0.7)
            try:
                reply = self._reply(messages, repeat, attempt, temperature, halt)
            except Refused as refused:
                with self._lock:
                    self.usage.refused += 1
                    self.refusal = self.refusal or str(refused)
                why = "refused"
                break
            if reply is None:
                return None
            text = reply.text
            preference = self._read(reply)
            why = "" if preference is not None else {"length": "cut off"}.get(reply.finish, "no verdict")
            if preference is not None:
                break
        if preference is None:
            with self._lock:
                self.usage.unparseable += why == "no verdict"
                self.usage.cut_off += why == "cut off"
        elif order == "swapped":
            preference = 1.0 - preference
        who = (self.name, comparison.policy, comparison.versus, comparison.prompt_id)
        return Judgement(*who, order, preference, text, attempt + 1, repeat, why)

    def _reply(
        self, messages: list[dict[str, str]], repeat: int, attempt: int, temperature: float, halt: threading.Event
    ) -> Reply | None:
        key = self._key(messages, repeat, attempt)
        kept = self.cache.get(key)
        if kept is not None:
            with self._lock:
                self.usage.cached += 1
            return kept
        if halt.is_set():
            return None
        try:
            reply = self.backend.ask(messages, self.budget, temperature, seed=1000 * repeat + attempt)
        except EndpointDown:
            halt.set()  # at once: no other request goes out
            raise
        self.cache.put(key, reply)
        with self._lock:
            self.usage.requests += 1
            self.usage.prompt_tokens += reply.prompt_tokens
            self.usage.completion_tokens += reply.completion_tokens
        return reply

    def _read(self, reply: Reply) -> float | None:
        hard = self.template.read(reply, self.budget)
        if hard is None or not self.config.logprobs:
            return hard
        weighted = preference_from_tokens(self.template, reply)
        # Log-probabilities must be those of the verdict that was written.
        if weighted is None or (hard != 0.5 and (weighted > 0.5) != (hard > 0.5)):
            return hard
        with self._lock:
            self.usage.weighted += 1
        return weighted


def make_backend(config: LLMJudgeConfig) -> Backend:
    """The backend that the settings name."""
    if config.local:
        return LocalBackend(config.model)
    endpoint = ChatEndpoint(
        config.model,
        config.base_url,
        config.api_key_env,
        config.timeout,
        config.retries,
        config.requests_per_minute,
    )
    return OpenAIBackend(endpoint, config.logprobs, reasoning=config.max_completion_tokens is not None)
