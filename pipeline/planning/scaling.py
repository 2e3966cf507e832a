"""The table of docs/scaling.md: known models on 1, 8 and 64 GPUs of 80 GB, by the formulas of `planning.memory`."""

from pathlib import Path
from typing import Any

from ppo_vs_dpo.artifacts import card
from ppo_vs_dpo.artifacts.files import write_text
from ppo_vs_dpo.artifacts.run import TRAINED
from ppo_vs_dpo.pipeline.planning.advice import advice
from ppo_vs_dpo.pipeline.planning.estimate import Job, estimate
from ppo_vs_dpo.pipeline.planning.known import LLAMA_3_8B, LLAMA_3_70B, PYTHIA
from ppo_vs_dpo.pipeline.planning.memory import GB, GPUS, Shape, Sharding

MODELS: dict[str, dict[str, Any]] = {
    "Pythia-1B": PYTHIA["1b"],
    "Pythia-2.8B": PYTHIA["2.8b"],
    "Pythia-6.9B": PYTHIA["6.9b"],
    "Llama-3-8B": LLAMA_3_8B,
    "Llama-3-70B": LLAMA_3_70B,
}
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
            sharding = Sharding(ranks, stage=3, sums=4)
            cells = [name, str(ranks)]
            for stage in TRAINED:
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
    return card.table(head, table)


def write_table(path: str | Path) -> None:
    """Write the table between the marks of a Markdown file; the text around it stays."""
    path, begin, end = Path(path), "<!-- table: begin -->", "<!-- table: end -->"
    text = path.read_text(encoding="utf-8") if path.is_file() else f"{begin}\n{end}\n"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    write_text(path, f"{before}{begin}\n\n{markdown(rows())}\n\n{end}{after}")
