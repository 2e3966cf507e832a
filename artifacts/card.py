"""The model card: what a saved model was trained on, with which settings, and how it scored.

Written into every finished stage's ``model/`` as ``README.md``, in the Hub's format (huggingface_hub's ``ModelCard``).
It holds nothing that differs between two runs of the same configuration: no times, no paths of this machine.
"""

import html
import re
from collections.abc import Iterable, Sequence
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

## Base model and licence

{{ base }}

## Data

{{ data }}

## Scores

{{ scores }}

## Settings

```yaml
{{ settings }}```

## Citation

{{ citation }}
"""

# What whoever uses such a model cites: the papers of the method, and this software (CITATION.cff).
PAPERS = {
    "sft": [
        "Ouyang et al., Training language models to follow instructions with human feedback, 2022, arXiv:2203.02155"
    ],
    "reward_model": ["Stiennon et al., Learning to summarize from human feedback, 2020, arXiv:2009.01325"],
    "dpo": ["Rafailov et al., Direct Preference Optimization, 2023, arXiv:2305.18290"],
    "ppo": [
        "Schulman et al., Proximal Policy Optimization Algorithms, 2017, arXiv:1707.06347",
        "Ziegler et al., Fine-Tuning Language Models from Human Preferences, 2019, arXiv:1909.08593",
        "Huang et al., The N+ Implementation Details of RLHF with PPO, 2024, arXiv:2403.17031",
    ],
}
SOFTWARE = "ppo-vs-dpo: the PPO-RLHF pipeline people can trust, and the fair comparison with DPO"
# Figures that need a word beside them.
EXPLAINED = {"train_kl": "train_kl (estimated from samples: may fall below 0)"}

LOAD = {
    "reward_model": "AutoModelForSequenceClassification",
}


def write_card(folder: Path, stage: str, config: dict[str, Any], figures: dict[str, Any]) -> None:
    """Write ``README.md`` into a model's folder.

    Of ``figures``, those of the stage's ``done.json``, scalars and one level of nesting are shown.
    """
    import yaml
    from huggingface_hub import ModelCard, ModelCardData

    base, licence, about_base = base_of(config.get("model") or {})
    section = {key: value for key, value in (config.get(stage) or {}).items() if not PRIVATE.search(key)}
    section = {"seed": config.get("seed"), **{key: value for key, value in section.items() if key != "sweep"}}
    data = config.get("data") or {}
    told = {key: data[key] for key in ("source", "path", "subset", "gold") if data.get(key) is not None}
    if Path(str(told.get("path", ""))).is_absolute():
        told["path"] = Path(told["path"]).name
    pair_set = figures.get("pair_set") or {}
    dataset = told.get("path") if _is_hub_name(told.get("path")) else None
    told |= {f"pair set {key}": value for key, value in pair_set.items()} if isinstance(pair_set, dict) else {}
    card_data = ModelCardData(
        base_model=base,
        license=licence,
        datasets=[dataset] if dataset else None,
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
        base=about_base,
        data=_table(told) or "Not stated.",
        scores=_table({EXPLAINED.get(key, key): value for key, value in figures.items() if key != "pair_set"})
        or "None.",
        citation="\n".join(f"- {one}" for one in [*PAPERS.get(stage, []), SOFTWARE]),
        settings=yaml.safe_dump(finite(section), sort_keys=True, allow_unicode=True),
    )
    write_text(folder / "README.md", card.content)


def base_of(model: dict[str, Any]) -> tuple[str | None, str | None, str]:
    """The base model's name on the Hub, its licence, and a sentence about both.

    Args:
        model: the section ``model`` of a run. Of a local folder only its name is told, and what its own card says.
    """
    path = model.get("path")
    if not path:
        kind = (model.get("architecture") or {}).get("model_type", "a model")
        return None, None, f"None: {kind} with new weights. The licence is for whoever publishes it to choose."
    card = card_of(str(path), model.get("revision"))
    name = path if _is_hub_name(path) else None
    if name is None and _is_hub_name(card.get("base_model")):
        name = card["base_model"]
    licence = card.get("license") if isinstance(card.get("license"), str) else None
    shown = name or f"{Path(path).name} (a local folder)"
    terms = (
        f"its licence is {licence}, and binds this model" if licence else "its licence binds this model: look there"
    )
    return name, licence, f"{cell(shown)}; {cell(terms)}."


def card_of(path: str, revision: str | None = None) -> dict[str, Any]:
    """What a base model's own card says, from its folder or the Hub's cache; nothing where it is not here."""
    from huggingface_hub import metadata_load, try_to_load_from_cache
    from yaml import YAMLError

    file: Any = Path(path) / "README.md"
    if not Path(path).is_dir():
        file = try_to_load_from_cache(path, "README.md", revision=revision) if _is_hub_name(path) else None
    if not isinstance(file, str | Path) or not Path(file).is_file():
        return {}
    try:
        return metadata_load(Path(file)) or {}
    except (YAMLError, ValueError):
        return {}


def _is_hub_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", value) is not None and not Path(value).exists()


def _table(figures: dict[str, Any]) -> str:
    """Scalars as a Markdown table, the others one level deep."""
    rows = []
    for key, value in figures.items():
        inner = value if isinstance(value, dict) else {"": value}
        for name, shown in inner.items():
            if isinstance(shown, bool | int | float | str):
                text = f"{shown:.6g}" if isinstance(shown, float) else str(shown)
                rows.append([f"{key}{' ' if name else ''}{name}", cell(text)])
    return table(("", ""), rows) if rows else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def cell(text: str) -> str:
    """A text that stays in its cell of a Markdown table and is no markup there."""
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")
