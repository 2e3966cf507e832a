"""``ppo-vs-dpo plan``: will it fit, how fast can it be at best, and what to change if it does not.

Answers from the configuration alone, before a cluster is asked for: formulas and their sources are in
`planning.memory`. Weights and optimizer states are exact (tests hold them against measured bytes); activations, logits
and caches are estimates from above; the time is a floor that no run goes below.
"""

import argparse
import math
import sys
from typing import Any

from ppo_vs_dpo.artifacts.errors import UserError, in_help, say
from ppo_vs_dpo.artifacts.guards.refusals import not_found
from ppo_vs_dpo.artifacts.run import TRAINED
from ppo_vs_dpo.pipeline.planning import memory
from ppo_vs_dpo.pipeline.planning.advice import advice
from ppo_vs_dpo.pipeline.planning.estimate import Frozen, Job, estimate, frozen_role
from ppo_vs_dpo.pipeline.planning.gpus import ranks_of
from ppo_vs_dpo.pipeline.planning.known import published_sizes
from ppo_vs_dpo.pipeline.planning.memory import GB, GPUS, Gpu, Shape, Sharding
from ppo_vs_dpo.pipeline.planning.scaling import write_table
from ppo_vs_dpo.ppo.stage.config import reward_models, trained_share, trains_values

# TRL's defaults where the configuration says nothing: trl.SFTConfig, RewardConfig, DPOConfig (max_length).
MAX_LENGTH = 1024
BATCH = 8  # transformers.TrainingArguments.per_device_train_batch_size


# ------------------------------------------------------------------------------------- what a configuration asks for


def job_of(config: Any, stage: str, ranks: int, prompt: int, architecture: Any) -> Job:
    """A stage of a resolved configuration.

    Args:
        prompt: tokens of a prompt, where the configuration does not bound them.
    """
    section = config.get(stage) or {}

    def key(name: str, otherwise: Any) -> Any:
        value = section.get(name)
        return otherwise if value is None else value

    adapters = None
    if section.get("lora"):
        lora = section["lora"]
        adapters = (lora.get("r", 16), tuple(lora.get("target_modules") or default_targets(architecture.model_type)))
    rows, accumulate = key("per_device_train_batch_size", BATCH), key("gradient_accumulation_steps", 1)
    context = getattr(architecture, "max_position_embeddings", None) or sys.maxsize
    model = (config.get("model") or {}).get("gradient_checkpointing")
    common = {"checkpointing": bool(_first(key("gradient_checkpointing", None), model, True)), "adapters": adapters}
    common["quantized"] = bool(adapters and section["lora"].get("load_in_4bit"))
    if stage == "ppo":
        response = key("response_length", 53)
        rollout = key("rollout_batch_size", rows * accumulate * ranks)
        vllm = key("vllm_mode", "colocate") if key("generation_engine", "transformers") == "vllm" else None
        return Job(
            stage,
            min(rows, math.ceil(rollout / key("num_mini_batches", 1) / ranks)),
            rollout,
            min(key("max_prompt_length", prompt), context - response),
            response,
            epochs=key("num_ppo_epochs", 4),
            passes=math.ceil(rollout / key("num_mini_batches", 1) / ranks / rows),
            forward_rows=key("local_rollout_forward_batch_size", 64),
            reference=adapters is None,
            reward=reward_models(config),
            shared=adapters is not None and bool(key("shared_base", False)),
            server=vllm == "server",
            colocated=float(key("vllm_gpu_memory_utilization", 0.3)) if vllm == "colocate" else 0.0,
            critic=trains_values(section),
            trained=trained_share(section),
            **common,
        )
    sequences = 1 if stage == "sft" else 2
    length = min(key("max_length", MAX_LENGTH), context)
    return Job(
        stage,
        sequences * rows,
        sequences * rows * accumulate * ranks,
        min(prompt, length // 2),
        length - min(prompt, length // 2),
        # DPO takes the reference's log-probabilities beforehand unless another model is named.
        reference=stage == "dpo" and bool(section.get("reference_path")),
        passes=accumulate,
        **common,
    )


def _first(*values: Any) -> Any:
    """The first that is said."""
    return next(value for value in values if value is not None)


def default_targets(model_type: str) -> list[str]:
    """The layers peft adapts where none are named."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as MAPPING

    if model_type not in MAPPING:
        raise UserError(f"lora.target_modules is empty and peft knows no default for {model_type}: name the layers.")
    return sorted(MAPPING[model_type])


def sharding_of(config: Any, ranks: int, half: bool) -> Sharding:
    """The ``deepspeed`` section of a configuration."""
    section = config.get("deepspeed") or {}
    zero = section.get("zero_optimization") or None
    if zero is None:
        return Sharding(ranks, half=half)

    def offloads(what: str) -> bool:
        return (zero.get(f"offload_{what}") or {}).get("device", "none") != "none"

    return Sharding(
        ranks,
        stage=zero["stage"],
        offload_optimizer=offloads("optimizer"),
        offload_weights=offloads("param"),
        live=int(zero.get("stage3_max_live_parameters", 1e9)),
        bucket=int(zero.get("reduce_bucket_size", 5e8)),
        half=half,
        sums=4 if (section.get("data_types") or {}).get("grad_accum_dtype") == "fp32" else None,
    )


# ------------------------------------------------------------------------------------------------------ what it says


def report(shape: Shape, jobs: list[Job], sharding: Sharding, gpu: Gpu) -> tuple[str, bool]:
    """The plan as text, and whether every stage fits."""
    lines, all_fit = [], True
    spread = "every rank holds all (no deepspeed)" if sharding.stage is None else f"ZeRO-{sharding.stage}"
    if sharding.offload_optimizer:
        spread += ", optimizer in CPU memory"
    if sharding.offload_weights:
        spread += ", weights in CPU memory"
    lines.append(f"{shape.parameters:,} parameters on {sharding.ranks} x {gpu.name}; {spread}; GB per GPU")
    for job in jobs:
        figures = estimate(shape, job, sharding, gpu)
        fits = figures.peak <= gpu.usable
        all_fit = all_fit and fits
        lines.append("")
        lines.append(
            f"{job.stage}: {job.rows} sequences of {job.prompt} + {job.response} tokens per pass, "
            f"{job.updates_rows} per update"
        )
        lines.append(f"  {'':12}{'weights':>10}{'gradients':>11}{'optimizer':>11}{'GPU':>9}{'CPU':>9}")
        for part in figures.parts:
            cells = (part.weights, part.gradients, part.optimizer, part.gpu, part.cpu)
            widths = (10, 11, 11, 9, 9)
            numbers = "".join(f"{value / GB:>{w}.2f}" for value, w in zip(cells, widths, strict=True))
            lines.append(f"  {part.role:12}{numbers}")
        for phase, extra in figures.phases.items():
            what = ", ".join(f"{name} {size / GB:.2f}" for name, size in extra.items() if size)
            lines.append(f"  {phase + ':':10} + {sum(extra.values()) / GB:.2f} ({what})")
        answer = "fits" if fits else "DOES NOT FIT"
        lines.append(
            f"  peak {figures.peak / GB:.2f} of {gpu.usable / GB:.1f} usable ({gpu.memory / GB:.0f} less "
            f"{memory.RESERVED:.0%} kept free): {answer}"
        )
        if not fits:
            lines.append(f"  -> {advice(shape, job, sharding, gpu)}")
        floor = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in figures.seconds.items())
        lines.append(
            f"  at least {sum(figures.seconds.values()):.3g} s per update ({floor}); "
            f"{sum(figures.flops.values()):.3g} FLOPs"
        )
        if job.stage == "ppo" and not job.shared and sharding.stage == 3 and sharding.ranks > 1:
            lines.append(frozen_line(frozen_role(shape, job, sharding)))
    return "\n".join(lines) + "\n", all_fit


def frozen_line(role: Frozen) -> str:
    """How a frozen role is split, beside the other way to do it."""
    (held, sent), (other_held, other_sent) = role.zero3, role.parallel
    line = (
        f"  a frozen role, by ZeRO-3: {held / GB:.2f} held, {sent / GB:.0f} got for a pass of {role.tokens:,} tokens; "
        f"tensor parallel over {role.group} it would be {other_held / GB:.2f} and {other_sent / GB:.0f}"
    )
    if other_sent < sent:
        line += f": take {role.rows} rows a pass or more (ppo.local_rollout_forward_batch_size, rollout_batch_size)"
    return line


def model_config(config: Any) -> Any:
    """The transformers configuration of a run's model.

    Raises:
        UserError: it cannot be found.
    """
    from omegaconf import OmegaConf
    from transformers import AutoConfig

    section = config.model
    if section.get("path"):
        try:
            return AutoConfig.from_pretrained(section.path, revision=section.get("revision"))
        except (OSError, ValueError) as error:
            sizes = published_sizes(section.path)
            if sizes is not None:
                say(f"{section.path} was not reached; its sizes are those that were published.\n")
                return AutoConfig.for_model(sizes.pop("model_type"), **sizes)
            raise UserError(f"model.path={section.path}: {not_found(section.path, error)}") from error
    architecture = OmegaConf.to_container(section.get("architecture") or OmegaConf.create({}), resolve=True)
    if "model_type" not in architecture:
        raise UserError("model.path: required, and not set.")
    if "vocab_size" not in architecture:
        from ppo_vs_dpo.preferences.testbed.tokenizer import build_tokenizer

        architecture["vocab_size"] = len(build_tokenizer())
    return AutoConfig.for_model(architecture.pop("model_type"), **architecture)


def main(arguments: list[str]) -> int:
    """``ppo-vs-dpo plan [--gpus N] [--gpu NAME] [key=value ...]``; 0 where all fits, 1 where it does not."""
    parser = argparse.ArgumentParser(prog="ppo-vs-dpo plan", description=in_help(__doc__.splitlines()[0]))
    parser.add_argument("overrides", nargs="*", help="a configuration, as for a run: experiment=NAME key=value ...")
    parser.add_argument("--gpus", type=int, help="how many (default: launch.processes x launch.nodes)")
    parser.add_argument("--gpu", default="a100-80gb", choices=sorted(GPUS), help="which (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="longest prompt (default: %(default)s)")
    parser.add_argument("--table", metavar="FILE", help="write the table of known models into FILE instead")
    given = parser.parse_intermixed_args(arguments)
    if given.table:
        write_table(given.table)
        return 0
    from ppo_vs_dpo.pipeline.composing.compose import load

    config = load(given.overrides)
    if given.gpus is None and config.launch.processes == "auto" and not config.launch.hostfile:
        raise UserError("launch.processes=auto counts the GPUs of the machine that it runs on: say --gpus N here.")
    ranks = given.gpus if given.gpus is not None else ranks_of(config.launch)
    if ranks < 1:
        raise UserError(f"--gpus {ranks}: at least 1.")
    architecture = model_config(config)
    shape = Shape.of(architecture)
    stages = [stage for stage in config.stages if stage in TRAINED]
    # On a GPU the stages compute in bfloat16 unless told otherwise (models.devices.arithmetic).
    chosen = [_first((config.get(stage) or {}).get("bf16"), config.model.get("bf16"), True) for stage in stages]
    half = all(chosen)
    sharding = sharding_of(config, ranks, half)
    jobs = [job_of(config, s, ranks, given.prompt_tokens, architecture) for s in stages]
    jobs = [job for job in jobs if not (config.get(job.stage) or {}).get("skip_training")]
    text, fits = report(shape, jobs, sharding, GPUS[given.gpu])
    say(text)
    return 0 if fits else 1
