"""Which engine samples the rollouts, and what must hold for it."""

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.pretrained import eos_token_ids
from ppo_vs_dpo.models.sampling.engine import Engine, TransformersEngine
from ppo_vs_dpo.ppo.config import PPOConfig

logger = logging.get_logger(__name__)


def make_engine(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: PPOConfig,
    accelerator: Accelerator,
    longest_prompt: int,
) -> Engine:
    """The engine that ``ppo.generation_engine`` names.

    Raises:
        UserError: it cannot work with the other settings, is not installed, or cannot run the policy.
    """
    eos, sampling, kind = eos_token_ids(policy, tokenizer), args.sampling(), accelerator.distributed_type
    if sampling.changes_distribution:
        logger.warning(
            "top_k or top_p make the sampled policy another one than the model: the KL figures are then no longer "
            "estimates of KL(policy || reference)."
        )
    if args.generation_engine == "transformers":
        exactly = args.logprobs_from_sampling and samples_exactly(policy, args, kind)
        return TransformersEngine(eos, tokenizer, with_logprobs=exactly)
    check_whole(policy, args, kind)
    given = (policy, sampling, eos, longest_prompt + sampling.max_new_tokens, compute_dtype(policy, args))
    # Here, so that nothing asks for vLLM unless it is chosen.
    if args.vllm_mode == "server":
        from ppo_vs_dpo.models.sampling.vllm.client import VLLMServerEngine

        return VLLMServerEngine(args.vllm_server_base_url, args.output_dir, *given, args.vllm_weight_transfer)
    from ppo_vs_dpo.models.sampling.vllm.colocated import VLLMEngine

    return VLLMEngine(
        *given, args.vllm_gpu_memory_utilization, accelerator.num_processes, accelerator.device,
        args.vllm_enable_sleep_mode,
    )  # fmt: skip


def check_whole(policy: PreTrainedModel, args: PPOConfig, kind: DistributedType) -> None:
    """vLLM gets whole, plain weights.

    Raises:
        UserError: they are in pieces when it samples, or quantized; names the key and the cause.
    """
    chosen, instead = "ppo.generation_engine=vllm", "use generation_engine=transformers"
    if kind == DistributedType.FSDP:
        raise UserError(f"{chosen} does not work with ppo.fsdp: weights are in pieces. Leave it out, or {instead}.")
    if kind == DistributedType.DEEPSPEED and not args.ds3_gather_for_generation:
        raise UserError(f"{chosen} needs ppo.ds3_gather_for_generation: weights are sent whole. Set it, or {instead}.")
    if getattr(policy, "is_quantized", False):
        raise UserError(f"{chosen} needs a policy in plain weights, and this one is quantized; or {instead}.")


def samples_exactly(policy: PreTrainedModel, args: PPOConfig, kind: DistributedType) -> bool:
    """Whether sampling and training compute the same probabilities up to fp32 rounding."""
    full = {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    plain = args.mixed_precision == "no" and kind != DistributedType.DEEPSPEED
    same = not args.conventions.temperature_offset and not args.sampling().changes_distribution
    return full and plain and same


def compute_dtype(policy: PreTrainedModel, args: PPOConfig) -> torch.dtype:
    """The arithmetic of the trainer's forward pass, so that engine and trainer round as alike as they can."""
    return engine_dtype(args.mixed_precision, next(policy.parameters()).dtype)


def engine_dtype(mixed_precision: str, weights: torch.dtype) -> torch.dtype:
    """The arithmetic of a forward pass over weights of a dtype."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, weights)
