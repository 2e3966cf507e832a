"""How fast this machine is with a run's model: a few steps of one and of two of its layers, timed.

    python -m ppo_vs_dpo.pipeline.planning.cost.measured SECONDS_SINCE_1970 < question.json

The clock begins when the process was started: what it imports is what a stage imports. The whole model's time follows
from the two layers: what they share (embeddings, head) is counted once, a layer as often as the model has it. No
weights are read, and the process that asks stays small.

On a CPU with one thread (``launch.threads``, the default) a second is one of the process's own clock. By the clock on
the wall other work lay in the difference of the two layers, and that counts as often as the model has layers: 40 hours
were said of one. Several threads wait for each other, and a GPU is waited for: there the wall's clock counts.
"""

import functools
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from ppo_vs_dpo.artifacts.errors import say
from ppo_vs_dpo.artifacts.guards.processes import die_with_parent
from ppo_vs_dpo.artifacts.resources import libraries
from ppo_vs_dpo.pipeline.planning.cost.counted import characters

# Seconds after which a measurement is given up.
PATIENCE = 120.0
# Shape of what is timed, like a micro-batch: more rows for a model so small that a pass of few is mostly overhead.
ROWS, MOST_ROWS, LENGTH = 2, 16, 128
# Seconds that a pass through one layer may take to be timed with more rows.
SHORT = 0.05
# Seconds of timing one thing after which four calls of it are enough.
ENOUGH = 0.5
# Rows decoded at once: the time of a step is a part for the step and a part for each row.
FEW, MANY = 4, 64
# Bytes of a stage's process that has imported what it needs and holds no model (docs/data.md: 480 MB).
LIBRARIES = 0.48e9


def ask(question: dict[str, Any], environment: dict[str, str]) -> dict[str, Any] | None:
    """Measure in a process of its own (a GPU's memory is then free again); ``None`` where that did not work.

    Args:
        question: ``path`` or ``architecture``, ``revision`` and ``trust_remote_code``; ``sections``, the stages to
            plan the memory of, and ``ranks``; ``texts``, a few prompts with an answer.
        environment: of the process: threads.

    Returns:
        Seconds a token, beside no other work: ``train`` (forward and backward), ``forward``, ``decode``; of a
        decoding step beside its tokens: ``step``; of a process until a stage's libraries are there: ``start``. And
        ``device``, ``parameters``, ``layers``, ``memory``: the peak of each stage on a rank in bytes
        (`planning.plan`, an estimate from above), and ``characters``: of a token of ``text``, and tokens of the
        ``template`` around a prompt, where there are texts and a tokenizer.
    """
    try:
        ended = subprocess.run(
            [sys.executable, "-m", __name__, str(time.time())],
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


def measure(question: dict[str, Any], began: float) -> dict[str, Any]:
    """Time one and two layers, and extrapolate.

    Args:
        question: see `ask`.
        began: when this process was started, in seconds since 1970.
    """
    with libraries():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from ppo_vs_dpo.models.devices import has_bf16

    accelerator = torch.accelerator.is_available()
    alone = not accelerator and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    start = time.process_time() if alone else time.time() - began
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
    before = clock()
    # What a stage imports: its Trainer brings datasets, PEFT and accelerate.
    importlib.import_module("ppo_vs_dpo.dpo.train")
    start += clock() - before
    layers = config.num_hidden_layers
    memory = peaks(question, config)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    device = torch.accelerator.current_accelerator() if accelerator else torch.device("cpu")
    half = accelerator and has_bf16()
    found: list[dict[str, float]] = []
    rows = ROWS
    for number in (1, 2):
        config.num_hidden_layers = number
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device).eval()
        timed = functools.partial(_times, model, config.vocab_size, device, clock, half, accelerator)
        if number == 1 and timed(ROWS)["train"] * ROWS * LENGTH < SHORT:
            rows = MOST_ROWS
        found.append(timed(rows))
    whole = {key: found[0][key] + max(0.0, found[1][key] - found[0][key]) * (layers - 1) for key in found[0]}
    few, many = whole.pop("few"), whole.pop("many")
    token = max(0.0, many - few) / (MANY - FEW)
    return {
        **whole,
        "start": start,
        "decode": token,
        "step": max(0.0, few - FEW * token),
        "device": str(device),
        "parameters": parameters,
        "layers": layers,
        "memory": memory,
        "characters": characters_of_a_token(question),
    }


def characters_of_a_token(question: dict[str, Any]) -> dict[str, float]:
    """Characters of a token in the run's texts, and what the template puts around a prompt: by the tokenizer."""
    from ppo_vs_dpo.models.loading.config import ModelConfig
    from ppo_vs_dpo.models.loading.pretrained import load_tokenizer
    from ppo_vs_dpo.models.text.encoding import encode_prompts
    from ppo_vs_dpo.models.text.prompts import encode_completion

    texts = question.get("texts")
    if not texts or not question.get("path"):
        return {}
    try:
        config = ModelConfig(trust_remote_code=bool(question.get("trust_remote_code")))
        tokenizer = load_tokenizer(question["path"], config)
        asked = [row["prompt"] for row in texts]
        prompts = sum(map(len, encode_prompts(tokenizer, asked)))
        answers = sum(len(encode_completion(tokenizer, row["chosen"])) for row in texts)
        short = "a" if isinstance(asked[0], str) else [{"role": "user", "content": "a"}]
        template = len(encode_prompts(tokenizer, [short])[0]) - 1
    except Exception:  # of texts that the data stage will refuse, or mend: the usual length of a token will do
        return {}
    read = sum(characters(row["prompt"]) + characters(row["chosen"]) for row in texts)
    # An answer's last token ends it.
    return {"text": read / max(prompts + answers - len(texts) * (template + 1), 1), "template": template}


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


def _times(
    model: Any, vocabulary: int, device: Any, clock: Callable[[], float], half: bool, again: bool, rows: int
) -> dict[str, float]:
    import torch

    ids = torch.randint(0, vocabulary, (rows, LENGTH), device=device)

    def train() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    found = {}
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
        # What is read without gradients is asked for the logits of its answers alone, about so many.
        found["forward"] = _seconds(clock, lambda: model(ids, logits_to_keep=LENGTH // 4)) / ids.numel()
        for name, batch in (("few", FEW), ("many", MANY)):
            cache = model(ids[:1, : LENGTH // 2], use_cache=True).past_key_values
            cache.batch_repeat_interleave(batch)
            tokens = ids[:1, :1].repeat(batch, 1)
            found[name] = _seconds(clock, lambda: model(tokens, past_key_values=cache, use_cache=True))  # noqa: B023
    # Activations are computed again, as a stage has it where nobody says otherwise (`models.devices.arithmetic`).
    if again and model.supports_gradient_checkpointing:
        model.train().gradient_checkpointing_enable()
    found["train"] = _seconds(clock, train) / ids.numel()
    model.eval()
    return found


def _seconds(clock: Callable[[], float], action: Callable[[], Any]) -> float:
    """Seconds of one call: the least of three after one to warm up, of ten where they are short.

    Whoever computes beside this process slows it down, by shared caches and cores, and never makes it faster.
    """
    import torch

    times: list[float] = []
    while len(times) < 4 or (len(times) < 11 and sum(times) < ENOUGH):
        started = clock()
        action()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        times.append(clock() - started)
    return min(times[1:])


if __name__ == "__main__":
    say(json.dumps(measure(json.load(sys.stdin), float(sys.argv[1]))) + "\n")
