"""vLLM as an engine in a process of its own, on other GPUs or another machine (`models.sampling.vllm.server`).

Weights go over by vLLM's own transfer between GPUs (`models.sampling.vllm.transfer`), or as safetensors files in a
folder that trainer and server both see: for these the trainer needs no vLLM. Tokens come back by vLLM's token-in,
token-out endpoint. The trainer may run on any number of ranks: the first one sends the weights, each asks for the
completions of its own prompts.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests
import torch
import torch.distributed as dist
from requests.adapters import HTTPAdapter
from transformers import PreTrainedModel

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.sampling.generation import Generated, SamplingConfig
from ppo_vs_dpo.models.sampling.vllm.colocated import check_sampling
from ppo_vs_dpo.models.sampling.vllm.transfer import Transfer, transfer_for
from ppo_vs_dpo.models.sampling.weights import buckets, check_mergeable
from ppo_vs_dpo.models.sharding.collectives import is_first, of_first, several

# Requests under way at once, of all ranks; the server batches them as it can (256 sequences by default).
REQUESTS = 512
# Seconds that one completion or one set of weights may take.
TIMEOUT = 1800
KEY = "VLLM_API_KEY"
# Asked twice, these are answered as if asked once: by connections that are kept open, and anew where one broke off.
# All others are steps of a weight transfer.
REPEATABLE = ("/v1/models", "/get_world_size", "/collective_rpc", "/reset_prefix_cache", "/inference/v1/generate")
PREFIX = ".weights-"


class VLLMServerEngine:
    """Samples with a vLLM server; see `models.sampling.engine.Engine`.

    Args:
        url: of the server, as in ``http://127.0.0.1:8000``.
        folder: where the weights are put on their way; the server must see it under the same path.
        policy: whose weights will be sent.
        sampling: how completions will be drawn.
        eos_token_ids: tokens that end a completion.
        max_length: tokens of the longest prompt with its completion.
        dtype: that weights are sent in.
        transfer: ``ppo.vllm_weight_transfer``.

    Raises:
        UserError: nobody answers, or the server is not one of `models.sampling.vllm.server`; adapters or sampling
        that it
            cannot be given; its context is shorter than ``max_length``.
    """

    keeps_weights = True
    forgets = False
    streams = True

    def __init__(
        self,
        url: str,
        folder: str | Path,
        policy: PreTrainedModel,
        sampling: SamplingConfig,
        eos_token_ids: Sequence[int],
        max_length: int,
        dtype: torch.dtype,
        transfer: str = "auto",
    ):
        check_sampling(sampling)
        check_mergeable(policy)
        self.url, self.eos_token_ids, self.dtype = url.rstrip("/"), sorted(eos_token_ids), dtype
        self.kept = requests.Session()
        self.kept.mount(self.url, HTTPAdapter(pool_connections=1, pool_maxsize=REQUESTS))
        served = self._ask("/v1/models").get("data") or [{}]
        room = served[0].get("max_model_len")
        if room is not None and room < max_length:
            raise UserError(
                f"the vLLM server at {self.url} takes {room} tokens, and the longest prompt with its response has "
                f"{max_length}. Start it with --max-model-len {max_length}."
            )
        self.folder = self.transfer = None
        device = next(policy.parameters()).device
        kind, world = self._agreed(lambda: self._choose(transfer, device))
        if kind != "files":
            rank = dist.get_rank() if several() else 0
            given = (kind, self._ask, self.url, dtype, rank, world, policy)
            self.transfer = self._together(lambda: Transfer(*given))
        elif is_first():
            Path(folder).mkdir(parents=True, exist_ok=True)
            for left in Path(folder).glob(f"{PREFIX}*"):  # of a run that was killed
                shutil.rmtree(left, ignore_errors=True)
            self.folder = tempfile.TemporaryDirectory(prefix=PREFIX, dir=folder)

    def update_weights(self, model: PreTrainedModel) -> None:
        """Send the present weights, adapters merged; all ranks wait until the server has them.

        Under ZeRO-3 they are whole a bucket at a time, on no rank longer than it takes the first to write it down.
        """
        if self.transfer is not None:
            self._together(lambda: self.transfer.send(model))
        else:
            self._together(lambda: self._by_files(model))
        if is_first():
            self._ask("/reset_prefix_cache", {})

    def _by_files(self, model: PreTrainedModel) -> None:
        error, names = None, []
        for number, bucket in enumerate(buckets(model, self.dtype, keep=is_first())):
            # A rank that gave up still helps to gather what is left.
            if is_first() and error is None:
                try:
                    self._write(number, bucket)
                    names += bucket
                except OSError as raised:
                    error = UserError(f"weights for the vLLM server: {self.folder.name} cannot be written: {raised}")
        if error is not None:
            raise error
        if is_first():
            self._send(number + 1, len(names))

    def _together(self, work: Callable[[], Any]) -> Any:
        """What ``work`` gives; where it fails on the first rank, all fail."""
        error, result = None, None
        try:
            result = work()
        except UserError as raised:
            error = raised
        said = of_first(str(error) if error else None)
        if error is not None or said:
            raise error or UserError(said)
        return result

    def _agreed(self, ask: Callable[[], Any]) -> Any:
        """What the first rank is answered, on all."""
        found: list[Any] = []

        def first() -> None:
            found.append(ask() if is_first() else None)

        self._together(first)
        return of_first(found[0])

    def _choose(self, wish: str, device: torch.device) -> tuple[str, int]:
        """How weights go, and to how many GPUs."""

        def offered() -> str:
            asked = {"method": "transfer_backend", "args": [], "timeout": TIMEOUT}
            return str(self._ask("/collective_rpc", asked)["results"][0])

        kind = transfer_for(wish, device, offered)
        return kind, 0 if kind == "files" else int(self._ask("/get_world_size")["world_size"])

    def _file(self, number: int) -> Path:
        return Path(self.folder.name) / f"policy-{number}.safetensors"

    def _write(self, number: int, bucket: dict[str, torch.Tensor]) -> None:
        from safetensors.torch import save_file

        save_file({name: weight.contiguous().cpu() for name, weight in bucket.items()}, self._file(number))

    def _send(self, files: int, tensors: int) -> None:
        paths = [str(self._file(number)) for number in range(files)]
        answer = self._ask("/collective_rpc", {"method": "load_policy", "args": [paths], "timeout": TIMEOUT})
        loaded = {int(count) for count in answer["results"]}
        if loaded != {tensors}:
            raise UserError(
                f"the vLLM server at {self.url} read {loaded} tensors of {tensors} from {self.folder.name}."
            )

    def generate(
        self, prompt_ids: Sequence[list[int]], sampling: SamplingConfig, seeds: Sequence[int]
    ) -> list[Generated]:
        """See `models.sampling.engine.Engine.generate`. Each row draws from its own seed, so that order changes
        nothing.

        Raises:
            UserError: stop strings, top-k or top-p, an empty prompt; the server refuses or is gone.
        """
        check_sampling(sampling)
        for number, ids in enumerate(prompt_ids):
            if not ids:
                raise UserError(f"prompt {number} has no tokens.")
        shared = {
            "max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature, "logprobs": 0,
            "stop_token_ids": self.eos_token_ids, "ignore_eos": True, "detokenize": False,
        }  # fmt: skip

        def one(ids: list[int], seed: int) -> Generated:
            asked = {"token_ids": list(ids), "sampling_params": {**shared, "seed": seed}}
            (choice,) = self._ask("/inference/v1/generate", asked)["choices"]
            tokens = choice["token_ids"]
            logprobs = [float(at["logprob"]) for at in choice["logprobs"]["content"]]
            if len(logprobs) != len(tokens):
                raise UserError(f"the vLLM server at {self.url} sent {len(tokens)} tokens, {len(logprobs)} figures.")
            return Generated(tokens, bool(tokens) and tokens[-1] in self.eos_token_ids, logprobs)

        mine = max(1, REQUESTS // (torch.distributed.get_world_size() if several() else 1))
        with ThreadPoolExecutor(min(mine, sampling.batch_size)) as pool:
            return list(pool.map(one, prompt_ids, seeds))

    def _ask(self, path: str, body: dict | None = None) -> dict:
        """What the server answers to a question (``body``; ``None``: to a GET)."""
        answer = self._answer(path, body)
        if not answer.ok:
            hint = (
                "Start it with `python -m ppo_vs_dpo.models.sampling.vllm.server MODEL`"
                if answer.status_code == 404
                else "Its log says more"
            )
            raise UserError(
                f"the vLLM server answers {answer.status_code} to {self.url}{path}: {answer.text[:500]} {hint}."
            )
        try:
            found = answer.json() if answer.content else {}
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(
                f"{self.url} (ppo.vllm_server_base_url) is no vLLM server: it answers {path} with "
                f"{answer.content[:80]!r}."
            )
        return found

    def _answer(self, path: str, body: dict | None) -> requests.Response:
        asked = ("GET" if body is None else "POST", f"{self.url}{path}")

        def ask(way: Any) -> requests.Response:
            return way.request(*asked, json=body, auth=_signed, timeout=TIMEOUT)

        try:
            if path in REPEATABLE:
                # A server closes what was idle for long (vLLM's: for 5 s), perhaps at this moment.
                with contextlib.suppress(requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
                    return ask(self.kept)
            return ask(requests)
        except requests.RequestException as error:
            raise UserError(
                f"no vLLM server at {self.url} (ppo.vllm_server_base_url): {error}. Start one with "
                f"`python -m ppo_vs_dpo.models.sampling.vllm.server MODEL`; the run goes on from its last checkpoint."
            ) from error


def _signed(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """With the server's key, and never with what a ~/.netrc has for its machine."""
    if key := os.environ.get(KEY):
        request.headers["Authorization"] = f"Bearer {key}"
    return request
