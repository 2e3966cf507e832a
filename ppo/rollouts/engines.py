"""Which engine samples the rollouts, and what must hold for it."""

from typing import TYPE_CHECKING

import torch

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.sampling.engine import Engine, TransformersEngine
from ppo_vs_dpo.ppo.rollouts.rollout import Rollout
from ppo_vs_dpo.ppo.watching.metrics import engine_metrics

if TYPE_CHECKING:
    from ppo_vs_dpo.ppo.trainer import PPOTrainer


def make_engine(trainer: "PPOTrainer") -> Engine:
    """The engine that ``ppo.generation_engine`` names.

    Raises:
        UserError: it cannot work with the other settings, is not installed, or cannot run the policy.
    """
    args = trainer.args
    if args.generation_engine == "transformers":
        exactly = args.logprobs_from_sampling and samples_exactly(trainer)
        return TransformersEngine(trainer.eos_ids, trainer.processing_class, with_logprobs=exactly)
    check_whole(trainer)
    longest = max(prompts.longest for prompts in (trainer.prompts, trainer.eval_prompts) if prompts is not None)
    dtype = engine_dtype(args.mixed_precision, trainer.policy.dtype)
    given = (trainer.policy, trainer.sampling, trainer.eos_ids, longest + trainer.sampling.max_new_tokens, dtype)
    # Here, so that nothing asks for vLLM unless it is chosen.
    if args.vllm_mode == "server":
        from ppo_vs_dpo.models.sampling.vllm_client import VLLMServerEngine

        return VLLMServerEngine(args.vllm_server_base_url, args.output_dir, *given)
    from ppo_vs_dpo.models.sampling.vllm_colocated import VLLMEngine

    check_colocated(trainer)
    return VLLMEngine(*given, args.vllm_gpu_memory_utilization)


def check_whole(trainer: "PPOTrainer") -> None:
    """vLLM gets whole, plain weights.

    Raises:
        UserError: they are in pieces when it samples, or quantized; names the key and the cause.
    """
    chosen, instead = "ppo.generation_engine=vllm", "use generation_engine=transformers"
    if trainer.is_fsdp_enabled:
        raise UserError(f"{chosen} does not work with ppo.fsdp: weights are in pieces. Leave it out, or {instead}.")
    if trainer.is_deepspeed_enabled and not trainer.args.ds3_gather_for_generation:
        raise UserError(f"{chosen} needs ppo.ds3_gather_for_generation: weights are sent whole. Set it, or {instead}.")
    if getattr(trainer.policy, "is_quantized", False):
        raise UserError(f"{chosen} needs a policy in plain weights, and this one is quantized; or {instead}.")


def check_colocated(trainer: "PPOTrainer") -> None:
    """vLLM shares the process of one trainer that holds all weights whole.

    Raises:
        UserError: several ranks, or DeepSpeed; names the key and the cause.
    """
    ranks = trainer.accelerator.num_processes
    chosen, instead = "ppo.generation_engine=vllm", "use vllm_mode=server or generation_engine=transformers"
    if trainer.is_deepspeed_enabled:
        raise UserError(
            f"{chosen} does not work with deepspeed: the engine takes whole weights from one process, and DeepSpeed's "
            f"are in its own partitions. Leave out deepspeed, or {instead}."
        )
    if ranks > 1:
        raise UserError(
            f"{chosen} works on one process, and there are {ranks}: each would start an engine on the same device. "
            f"Start one process, or {instead}."
        )


def samples_exactly(trainer: "PPOTrainer") -> bool:
    """Whether sampling and training compute the same probabilities up to fp32 rounding."""
    full = {parameter.dtype for parameter in trainer.policy.parameters()} == {torch.float32}
    plain = trainer.args.mixed_precision == "no" and not trainer.is_deepspeed_enabled
    same = trainer.temperature == trainer.sampling.temperature and not trainer.sampling.changes_distribution
    return full and plain and same


def check_agreement(trainer: "PPOTrainer", rollout: Rollout) -> None:
    """Stop when an engine with weights of its own samples from another policy than the one that trains.

    Rounding gives mean differences below 1e-3 nats in fp32, and of a few hundredths in bf16.

    Raises:
        UserError: it is more than rounding; the rollout is saved first.
    """
    full = engine_dtype(trainer.args.mixed_precision, trainer.policy.dtype) == torch.float32
    allowed = 1e-2 if full else 0.2
    seen = engine_metrics(rollout, None)["engine/logprob_difference_mean"]
    # Written so that NaN stops, too.
    if seen <= allowed:
        return
    where = trainer.save_rollout(rollout, "engine")
    raise UserError(
        f"the log-probabilities that the engine sampled update {trainer.state.global_step + 1} with differ from the "
        f"trainer's by {seen:.2g} nats on average (allowed {allowed:g}): more than rounding. Usual causes: weights "
        f"that did not arrive, or an architecture that the engine computes differently. The rollout is in {where}. "
        f"Use ppo.generation_engine=transformers; check_first_ratio=false goes on regardless."
    )


def engine_dtype(mixed_precision: str, weights: torch.dtype) -> torch.dtype:
    """The arithmetic of the trainer's forward pass, so that engine and trainer round as alike as they can."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, weights)
