"""Where an LLM judge's replies come from: an OpenAI-compatible endpoint, or a model loaded here."""

import threading
from pathlib import Path
from typing import Any, Protocol

import torch

from ppo_vs_dpo.artifacts.files import fingerprint_file
from ppo_vs_dpo.models.sampling.chat import ChatEndpoint, Reply


class Backend(Protocol):
    """Answers conversations."""

    def ask(self, messages: list[dict[str, str]], max_tokens: int, temperature: float, seed: int) -> Reply:
        """One reply.

        Raises:
            Refused: not to this conversation.
            EndpointDown: it cannot be had, now or after retries.
        """

    def identity(self) -> dict[str, Any]:
        """What its replies depend on; no secrets."""

    def dropped(self) -> list[str]:
        """Parameters that were asked for and have no effect."""


class OpenAIBackend:
    """Any endpoint that speaks OpenAI's chat-completions protocol (`models.sampling.chat.ChatEndpoint`).

    ``logprobs``: the verdict's are asked for, until the endpoint refuses them; ``reasoning``: the model thinks
    before it answers, and its budget is ``max_completion_tokens``.
    """

    def __init__(self, endpoint: ChatEndpoint, logprobs: bool = True, reasoning: bool = False):
        self.endpoint, self.logprobs, self.reasoning = endpoint, logprobs, reasoning

    def identity(self) -> dict[str, Any]:
        """Model and the endpoint's full address (port and path tell two models of one name apart)."""
        return {"model": self.endpoint.model, "endpoint": self.endpoint.address}

    def dropped(self) -> list[str]:
        """Parameters that the endpoint does not know: they were asked for, and are not sent."""
        return self.endpoint.dropped

    def ask(self, messages: list[dict[str, str]], max_tokens: int, temperature: float, seed: int) -> Reply:
        """One reply.

        Raises:
            Refused: this request is not answered, others may be.
            EndpointDown: unreachable or failing after all retries.
            UserError: the endpoint does not know the model or the key.
        """
        return self.endpoint.ask(
            messages,
            max_tokens,
            self.reasoning,
            temperature=temperature,
            seed=seed,
            logprobs=self.logprobs or None,
        )


class LocalBackend:
    """A chat model loaded in this process."""

    def __init__(self, path: str, model_config: Any = None):
        from ppo_vs_dpo.models.loading.pretrained import load_sampler

        self.path = path
        self._content = content_of(path)
        self._model, self._tokenizer, self._eos = load_sampler(path, model_config)
        self._lock = threading.Lock()

    def identity(self) -> dict[str, Any]:
        """The model's name and, of a folder, its content: another model behind the same name is another judge."""
        return {"model": self.path, "endpoint": "local", "content": self._content}

    def dropped(self) -> list[str]:
        """Nothing: whatever is asked for is done."""
        return []

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
        return Reply(text, tokens, len(prompt), len(sample.token_ids), "stop" if sample.finished else "length")


def content_of(path: str) -> str | None:
    """Hash of a model's folder; ``None`` for a name on the Hub, which stands for one revision in the local cache."""
    return fingerprint_file(path)[:16] if Path(path).is_dir() else None
