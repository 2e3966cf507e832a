"""The table of docs/scaling.md: known models on 1, 8 and 64 GPUs of 80 GB, by the formulas of `planning.memory`."""

from pathlib import Path
from typing import Any

from ppo_vs_dpo.artifacts.files import write_text
from ppo_vs_dpo.pipeline.planning.advice import advice
from ppo_vs_dpo.pipeline.planning.estimate import Job, estimate
from ppo_vs_dpo.pipeline.planning.memory import GB, GPUS, Shape, Sharding

# Sizes as published with the models: Biderman et al. 2023 (2304.01373), table 1, and the models' config.json;
# Llama 3 (2407.21783), table 3.
NEOX = {"model_type": "gpt_neox", "tie_word_embeddings": False, "max_position_embeddings": 2048}
LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192}
MODELS: dict[str, dict[str, Any]] = {
    "Pythia-1B": {**NEOX, "vocab_size": 50304, "hidden_size": 2048, "num_hidden_layers": 16,
                  "num_attention_heads": 8, "intermediate_size": 8192},
    "Pythia-2.8B": {**NEOX, "vocab_size": 50304, "hidden_size": 2560, "num_hidden_layers": 32,
                    "num_attention_heads": 32, "intermediate_size": 10240},
    "Pythia-6.9B": {**NEOX, "vocab_size": 50432, "hidden_size": 4096, "num_hidden_layers": 32,
                    "num_attention_heads": 32, "intermediate_size": 16384},
    "Llama-3-8B": {**LLAMA, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
                   "intermediate_size": 14336},
    "Llama-3-70B": {**LLAMA, "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
                    "intermediate_size": 28672},
}  # fmt: skip
# The work: TL;DR's lengths (Huang et al. 2024: 512 + 53), 512 responses an update, 4 passes, checkpointing.
PROMPT, RESPONSE, ROLLOUT, ROWS = 512, 53, 512, 8


def shape_of(name: str) -> Shape:
    """The sizes of a model of the table."""
    from transformers import AutoConfig

    settings = dict(MODELS[name])
    return Shape.of(AutoConfig.for_model(settings.pop("model_type"), **settings))


def job(stage: str) -> Job:
    """The table's work for a stage."""
    common = {"prompt": PROMPT, "response": RESPONSE, "checkpointing": True}
    if stage == "ppo":
        return Job("ppo", ROWS, ROLLOUT, epochs=4, forward_rows=64, reference=True, reward=True, **common)
    sequences = 1 if stage == "sft" else 2
    return Job(stage, sequences * ROWS, sequences * ROLLOUT, **common)


def rows() -> list[list[str]]:
    """The cells, a list a row."""
    gpu = GPUS["a100-80gb"]
    table = []
    for name in MODELS:
        shape = shape_of(name)
        for ranks in (1, 8, 64):
            sharding = Sharding(ranks, stage=3)
            cells = [name, str(ranks)]
            for stage in ("sft", "reward_model", "dpo", "ppo"):
                peak = estimate(shape, job(stage), sharding, gpu).peak
                cells.append(f"{peak / GB:,.0f}" + ("" if peak <= gpu.usable else " (no)"))
            ppo = estimate(shape, job("ppo"), sharding, gpu)
            cells.append(f"{sum(ppo.seconds.values()):,.1f}")
            cells.append("fits" if ppo.peak <= gpu.usable else advice(shape, job("ppo"), sharding, gpu))
            table.append(cells)
    return table


def markdown(table: list[list[str]]) -> str:
    """The table as Markdown."""
    head = ["model", "GPUs", "SFT", "reward model", "DPO", "PPO", "PPO, s/update at least", "PPO"]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *table)]
    return "\n".join(lines)


def write_table(path: str | Path) -> None:
    """Write the table between the marks of a Markdown file; the text around it stays."""
    path, begin, end = Path(path), "<!-- table: begin -->", "<!-- table: end -->"
    text = path.read_text(encoding="utf-8") if path.is_file() else f"{begin}\n{end}\n"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    write_text(path, f"{before}{begin}\n\n{markdown(rows())}\n\n{end}{after}")
