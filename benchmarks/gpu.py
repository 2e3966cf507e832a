"""PPO with a reward model, on GPUs: tokens a second and memory, the rows of docs/gpu.md. Ten minutes on one GPU.

    python -m benchmarks.gpu                     1B whole and 8B with LoRA, one GPU
    torchrun --standalone --nproc-per-node 8 -m benchmarks.gpu --size 8b --deepspeed zero3
    python -m benchmarks.gpu --size 1b --no-graphs       what CUDA graphs are worth in sampling
    python -m benchmarks.gpu --size 1b --profile         the kernels that an update's phases spend their time in
    python -m benchmarks.gpu --size tiny         seconds, on a CPU: that it runs

Weights are random and the reward model's score is what it is: times and memory do not depend on what is learnt. All
four roles are there; responses have the whole budget (no end token is sampled), so that two machines do the same work.
The first update is not counted. Of each phase: seconds an update, response tokens a second over all GPUs, peak memory.
"""

import argparse
import collections
import contextlib
import gc
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# As a stage has it (`pipeline.running.job`).
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, PreTrainedModel

from ppo_vs_dpo.models.devices import arithmetic
from ppo_vs_dpo.models.loading.config import LoraSettings, ModelConfig
from ppo_vs_dpo.models.sharding.deepspeed import settled, start_deepspeed
from ppo_vs_dpo.ppo.config import PPOConfig
from ppo_vs_dpo.ppo.rollouts.clock import Clock
from ppo_vs_dpo.ppo.trainer import PPOTrainer
from tests.conftest import build_word_tokenizer

# As Llama 3.2 1B and Llama 3 8B have them (their config.json).
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 64},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
# What is measured where nothing is said; the rest of the work is the same for all.
ROWS = {"tiny": 8, "1b": 64, "8b": 64}
PHASES = ("generate", "score", "forward", "train")
HEAD = ["GPU", "model", "ranks", *(f"{phase}, s" for phase in PHASES), "s an update", "generated tokens/s", "tokens/s",
        "peak, GB"]  # fmt: skip


def models(size: str, kind: str, given: argparse.Namespace, device: str) -> dict[str, PreTrainedModel]:
    """The roles with random weights, made where they will be: in pieces under ZeRO-3, whose settings are there by now;
    what adapters leave frozen in bfloat16 from the start (a stage's `model.dtype`)."""
    config = LlamaConfig(**SIZES[size], max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config.num_labels = 1
    sharded, made = (given.deepspeed or "").startswith("zero3"), {}
    kinds = {"model": AutoModelForCausalLM, "reward_model": AutoModelForSequenceClassification}
    if sharded:
        # Else a copy of the policy would be whole for a moment.
        kinds["ref_model"] = AutoModelForCausalLM
    for role, auto in kinds.items():
        torch.manual_seed(0)
        with contextlib.nullcontext() if sharded else torch.device(device):
            half = kind == "lora" and device != "cpu" and not given.deepspeed
            made[role] = auto.from_config(config, dtype=torch.bfloat16 if half else torch.float32)
    return made


def measure(size: str, kind: str, given: argparse.Namespace) -> list[str]:
    """One row of the table."""
    accelerator = torch.cuda.is_available()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    tokenizer = build_word_tokenizer()
    settings: dict[str, Any] = {
        "max_steps": given.updates + 1, "rollout_batch_size": given.rows or ROWS[size] * ranks, "num_ppo_epochs": 1,
        "num_mini_batches": 1, "per_device_train_batch_size": 8, "local_rollout_forward_batch_size": 16,
        "response_length": given.response, "learning_rate": 1e-6, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "diagnose": False, "seed": 1, "use_cpu": not accelerator, "missing_eos_penalty": None,
        **arithmetic(ModelConfig(), {}, accelerator),
    }  # fmt: skip
    if given.deepspeed:
        from omegaconf import OmegaConf

        file = Path(__file__).parents[1] / "configs" / "deepspeed" / f"{given.deepspeed}.yaml"
        settings["deepspeed"] = settled(OmegaConf.to_container(OmegaConf.load(file)), "adamw_torch_fused")
        start_deepspeed(use_cpu=not accelerator)
    parts: dict[str, Any] = {}
    if kind == "lora":
        parts["peft_config"] = LoraSettings(r=16, alpha=32, target_modules=["q_proj", "v_proj"]).peft_config(
            "CAUSAL_LM"
        )
    if given.no_graphs:
        settings["generation_kwargs"] = {"cuda_graphs": False}
    if accelerator:
        # Of the run before.
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    words = ["the", "film", "was", "good", "and", "the", "plot", "was", "dull"]
    prompts = [" ".join(words[number % 9 :] + words) for number in range(512)]
    prompts = [" ".join([prompt] * (given.prompt // len(prompt.split()) + 1)) for prompt in prompts]
    with tempfile.TemporaryDirectory() as folder:
        # Before the models: ZeRO-3 splits what is made while its settings are there.
        args = PPOConfig(output_dir=folder, truncate_prompts=True, max_prompt_length=given.prompt, **settings)
        parts |= models(size, kind, given, f"cuda:{local}" if accelerator else "cpu")
        trainer = PPOTrainer(
            train_dataset=Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer, args=args, **parts,
        )  # fmt: skip
        # No response ends before its budget.
        trainer.roles.engine.eos_token_ids = [SIZES[size]["vocab_size"] + 1]
        with profiled(given.updates) if given.profile else contextlib.nullcontext():
            trainer.train()
    counted = [row for row in trainer.state.log_history if "episode" in row][1:]
    seconds = {phase: sum(row[f"time/{phase}"] for row in counted) / len(counted) for phase in PHASES}
    total = sum(seconds.values())
    tokens = settings["rollout_batch_size"] * given.response
    peak = torch.cuda.max_memory_allocated() / 1e9 if accelerator else float("nan")
    name = torch.cuda.get_device_name() if accelerator else platform.processor() or platform.machine()
    figures = [f"{seconds[phase]:.2f}" for phase in PHASES]
    rates = [f"{total:.2f}", f"{tokens / seconds['generate']:,.0f}", f"{tokens / total:,.0f}"]
    label = f"{size} {kind}" + (f", {given.deepspeed}" if given.deepspeed else "")
    label += ", no graphs" if given.no_graphs else ""
    return [name, label, str(ranks), *figures, *rates, f"{peak:.1f}"]


@contextlib.contextmanager
def profiled(last: int) -> Iterator[None]:
    """Print the kernels of each phase of update ``last`` (from 0), by the time they take, which is longer for it."""
    from torch.profiler import ProfilerActivity, profile

    plain, calls = Clock.__call__, collections.Counter()
    on = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]

    @contextlib.contextmanager
    def phase(self: Clock, name: str) -> Iterator[None]:
        calls[name] += 1
        if calls[name] != last + 1:
            with plain(self, name):
                yield
            return
        with profile(activities=on) as seen:
            with plain(self, name):
                yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        by = f"self_{'cuda' if torch.cuda.is_available() else 'cpu'}_time_total"
        table = seen.key_averages().table(sort_by=by, row_limit=12, max_name_column_width=70)
        sys.stdout.write(f"\n{name}\n{table}\n")

    Clock.__call__ = phase
    try:
        yield
    finally:
        Clock.__call__ = plain


def tell(cells: list[str]) -> None:
    """One row of the table, from the first rank."""
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(f"| {' | '.join(cells)} |\n")
        sys.stdout.flush()


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), help="default: 1b whole and 8b with LoRA")
    parser.add_argument("--kind", choices=("full", "lora"), default="full")
    parser.add_argument("--updates", type=int, default=3, help="counted, after one that is not (default: %(default)s)")
    parser.add_argument("--rows", type=int, help="responses an update (default: 64 a rank)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens (default: %(default)s)")
    parser.add_argument("--response", type=int, default=512, help="tokens (default: %(default)s)")
    parser.add_argument("--no-graphs", action="store_true", help="decode a kernel at a time, not as a CUDA graph")
    parser.add_argument("--profile", action="store_true", help="print the kernels of the last update's phases")
    parser.add_argument("--deepspeed", choices=("zero2", "zero3", "zero2_offload", "zero3_offload"))
    given = parser.parse_args()
    runs = [(given.size, given.kind)] if given.size else [("1b", "full"), ("8b", "lora")]
    tell(HEAD)
    tell(["---"] * len(HEAD))
    for size, kind in runs:
        # Each as soon as it is there: what comes next may not fit.
        tell(measure(size, kind, given))


if __name__ == "__main__":
    main()
