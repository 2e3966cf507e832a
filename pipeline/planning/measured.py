"""How fast this machine is with a run's model: a few steps of one and of two of its layers, timed.

    python -m ppo_vs_dpo.pipeline.planning.measured < question.json

The whole model's time follows from the two: what they share (embeddings, head) is counted once, a layer as often as
the model has it. No weights are read, and the process that asks stays small.
"""

import json
import subprocess
import sys
import time
from typing import Any

from ppo_vs_dpo.artifacts.errors import say
from ppo_vs_dpo.artifacts.guards.processes import die_with_parent

# Seconds after which a measurement is given up.
PATIENCE = 120.0
# Shape of what is timed: like a training micro-batch, and like decoding.
ROWS, LENGTH = 2, 128
# Bytes of a stage's process that has imported what it needs and holds no model (docs/data.md: 480 MB).
LIBRARIES = 0.48e9


def ask(question: dict[str, Any], environment: dict[str, str]) -> dict[str, Any] | None:
    """Measure in a process of its own (a GPU's memory is then free again); ``None`` where that did not work.

    Args:
        question: ``path`` or ``architecture``, ``revision``, ``trust_remote_code``, ``dtype`` and ``batch`` (rows
            decoded at once); ``sections``, the stages to plan the memory of, and ``ranks``.
        environment: of the process: threads.

    Returns:
        Seconds a token: ``train`` (forward and backward), ``forward``, ``decode`` (a row's share of a step); and
        ``device``, ``parameters``, ``layers``, and ``memory``: the peak of each stage on a rank in bytes
        (`planning.plan`, an estimate from above).
    """
    try:
        ended = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps(question),
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            timeout=PATIENCE,
            preexec_fn=die_with_parent,
        )
        return json.loads(ended.stdout.strip().splitlines()[-1]) if ended.returncode == 0 else None
    except (subprocess.TimeoutExpired, json.JSONDecodeError, IndexError):
        return None


def measure(question: dict[str, Any]) -> dict[str, Any]:
    """Time one and two layers, and extrapolate."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if question.get("path"):
        config = AutoConfig.from_pretrained(
            question["path"],
            revision=question.get("revision"),
            trust_remote_code=bool(question.get("trust_remote_code")),
        )
    else:
        architecture = dict(question["architecture"])
        architecture.setdefault("vocab_size", 512)
        config = AutoConfig.for_model(architecture.pop("model_type"), **architecture)
    layers = config.num_hidden_layers
    memory = peaks(question, config)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    accelerator = torch.accelerator.is_available()
    device = torch.accelerator.current_accelerator() if accelerator else torch.device("cpu")
    dtype = torch.bfloat16 if accelerator else torch.float32
    found = []
    for number in (1, 2):
        config.num_hidden_layers = number
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()
        found.append(_times(model, config.vocab_size, int(question.get("batch") or 16), device))
    whole = {key: found[0][key] + max(0.0, found[1][key] - found[0][key]) * (layers - 1) for key in found[0]}
    return {**whole, "device": str(device), "parameters": parameters, "layers": layers, "memory": memory}


def peaks(question: dict[str, Any], architecture: Any) -> dict[str, float]:
    """Bytes of each stage's hungriest phase on a rank: of the GPU, or on a CPU of the process, libraries included."""
    import torch
    from omegaconf import OmegaConf

    from ppo_vs_dpo.pipeline.planning.estimate import estimate
    from ppo_vs_dpo.pipeline.planning.memory import GPUS, Shape
    from ppo_vs_dpo.pipeline.planning.plan import job_of, sharding_of

    sections, ranks = question.get("sections") or {}, int(question.get("ranks") or 1)
    if not sections:
        return {}
    on_cpu = not torch.accelerator.is_available()
    shape, found = Shape.of(architecture), {}
    for stage in ("sft", "reward_model", "dpo", "ppo"):
        section = sections.get(stage)
        if section is None or section.get("skip_training") or section.get("path"):
            continue
        if on_cpu:  # there nothing is computed twice unless somebody asks for it
            section = {"gradient_checkpointing": False} | {k: v for k, v in section.items() if v is not None}
        config = OmegaConf.create({**sections, stage: section})
        job = job_of(config, stage, ranks, int(question.get("prompt") or 512), architecture)
        sharding = sharding_of(config, ranks, half=not on_cpu)
        found[stage] = estimate(shape, job, sharding, next(iter(GPUS.values()))).peak + on_cpu * LIBRARIES
    return found


def _times(model: Any, vocabulary: int, batch: int, device: Any) -> dict[str, float]:
    import torch

    ids = torch.randint(0, vocabulary, (ROWS, LENGTH), device=device)

    def train() -> None:
        model(ids, labels=ids).loss.backward()
        model.zero_grad(set_to_none=True)

    with torch.no_grad():
        forward = _clock(lambda: model(ids)) / (ROWS * LENGTH)
        some = torch.randint(0, vocabulary, (batch, LENGTH // 2), device=device)
        cache = model(some, use_cache=True).past_key_values
        decode = _clock(lambda: model(some[:, :1], past_key_values=cache, use_cache=True)) / batch
    return {"forward": forward, "decode": decode, "train": _clock(train) / (ROWS * LENGTH)}


def _clock(action: Any) -> float:
    """Seconds of one call: the least of three after one to warm up."""
    import torch

    times = []
    for number in range(4):
        started = time.perf_counter()
        action()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        if number:
            times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    say(json.dumps(measure(json.load(sys.stdin))) + "\n")
