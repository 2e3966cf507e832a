"""The model card: what a saved model was trained on, with which settings, and how it scored.

Written into every finished stage's ``model/`` as ``README.md``, in the Hub's format (huggingface_hub's ``ModelCard``).
It holds nothing that differs between two runs of the same configuration: no times, no paths of this machine.
"""

import re
from pathlib import Path
from typing import Any

from ppo_vs_dpo.artifacts.files import finite, write_text

TITLES = {
    "sft": "Reference policy (supervised fine-tuning)",
    "reward_model": "Reward model (Bradley-Terry)",
    "dpo": "Policy trained by DPO",
    "ppo": "Policy trained by PPO",
}
# Never published: secrets, and what says where rather than what.
PRIVATE = re.compile(r"token|api_key|secret|password|(^|_)dir$|report_to|^push_to_hub$|^hub_", re.IGNORECASE)

TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

Made by ppo-vs-dpo: one pair set, a reward model, PPO and DPO from the same reference policy.

{{ loading }}

## Data

{{ data }}

## Scores

{{ scores }}

## Settings

```yaml
{{ settings }}```
"""

LOAD = {
    "reward_model": "AutoModelForSequenceClassification",
}


def write_card(folder: Path, stage: str, config: dict[str, Any], figures: dict[str, Any]) -> None:
    """Write ``README.md`` into a model's folder.

    Args:
        folder: the saved model.
        stage: which stage made it.
        config: the run's whole configuration, resolved.
        figures: of the stage's ``done.json``; scalars and one level of nesting are shown.
    """
    import yaml
    from huggingface_hub import ModelCard, ModelCardData

    base = (config.get("model") or {}).get("path")
    # A local folder's path says nothing to others.
    base = base if base and not Path(base).exists() and base.count("/") == 1 else None
    section = {key: value for key, value in (config.get(stage) or {}).items() if not PRIVATE.search(key)}
    section = {"seed": config.get("seed"), **{key: value for key, value in section.items() if key != "sweep"}}
    data = config.get("data") or {}
    told = {key: data[key] for key in ("source", "path", "subset", "gold") if data.get(key) is not None}
    if Path(str(told.get("path", ""))).is_absolute():
        told["path"] = Path(told["path"]).name
    pair_set = figures.get("pair_set") or {}
    told |= {f"pair set {key}": value for key, value in pair_set.items()} if isinstance(pair_set, dict) else {}
    card_data = ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-classification" if stage == "reward_model" else "text-generation",
        tags=["rlhf", "ppo-vs-dpo", stage.replace("_", "-")],
    )
    loader = LOAD.get(stage, "AutoModelForCausalLM")
    card = ModelCard.from_template(
        card_data,
        template_str=TEMPLATE,
        title=TITLES.get(stage, stage),
        loading=f"It loads with `transformers.{loader}.from_pretrained`; tokenizer and chat template are here.",
        data=_table(told) or "Not stated.",
        scores=_table({key: value for key, value in figures.items() if key != "pair_set"}) or "None.",
        settings=yaml.safe_dump(finite(section), sort_keys=True, allow_unicode=True),
    )
    write_text(folder / "README.md", card.content)


def _table(figures: dict[str, Any]) -> str:
    """Scalars as a Markdown table, the others one level deep."""
    rows = []
    for key, value in figures.items():
        inner = value if isinstance(value, dict) else {"": value}
        for name, cell in inner.items():
            if isinstance(cell, bool | int | float | str):
                shown = f"{cell:.6g}" if isinstance(cell, float) else str(cell)
                rows.append(f"| {key}{' ' if name else ''}{name} | {_plain(shown)} |")
    return "\n".join(["| | |", "| --- | --- |", *rows]) if rows else ""


def _plain(text: str) -> str:
    """Text that cannot break a Markdown table or carry HTML."""
    for raw, safe in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("\n", " ")):
        text = text.replace(raw, safe)
    return text
