"""The model card that every saved model gets."""

import yaml
from huggingface_hub import ModelCard
from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.card import write_card
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.artifacts.stage import StageContext

CONFIG = {
    "seed": 3,
    "model": {"path": "org/base-1b"},
    "data": {"source": "hh", "path": "/somewhere/private/pairs.jsonl"},
    "ppo": {"kl_coef": 0.2, "hub_token": "hf_secret", "output_dir": "/somewhere", "sweep": {"kl_coef": [0, 1]}},
}
FIGURES = {
    "pair_set": {"hash": "abc", "n_train": 12},
    "train_kl": 3.21,
    "evaluation": {"eval_reward": 1.5, "eval_kl": 2.25},
    "note": "<script>|",
}


def test_data_settings_scores_and_kl(tmp_path):
    write_card(tmp_path, "ppo", CONFIG, FIGURES)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "org/base-1b"
    assert card.data.pipeline_tag == "text-generation"
    assert "ppo" in card.data.tags
    for row in (
        "| pair set hash | abc |",
        "| train_kl (estimated from samples: may fall below 0) | 3.21 |",
        "| evaluation eval_kl | 2.25 |",
        "| source | hh |",
    ):
        assert row in card.text
    settings = yaml.safe_load(card.text.split("```yaml")[1].split("```")[0])
    assert settings == {"kl_coef": 0.2, "seed": 3}
    for private in ("hf_secret", "/somewhere", "<script>"):
        assert private not in card.content


def test_a_finished_stage_has_one(tmp_path):
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(CONFIG)))
    context = StageContext(RunFolder(tmp_path), "ppo")
    (context.dir / "model").mkdir(parents=True)
    (context.dir / "model" / "config.json").write_text("{}")
    context.finish(**FIGURES)
    assert (
        "| train_kl (estimated from samples: may fall below 0) | 3.21 |"
        in (context.dir / "model" / "README.md").read_text()
    )


def test_base_licence_data_and_citation(tmp_path):
    """From the base's own card where it lies here; a local folder is told by its name only."""
    base = tmp_path / "base-135m"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: org/parent-135m\n---\n# Base\n")
    config = {**CONFIG, "model": {"path": str(base)}, "data": {"source": "hh", "path": "Anthropic/hh-rlhf"}}
    write_card(tmp_path, "dpo", config, FIGURES)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data.license, card.data.datasets) == (
        "org/parent-135m",
        "apache-2.0",
        ["Anthropic/hh-rlhf"],
    )
    assert "its licence is apache-2.0" in card.text
    assert "arXiv:2305.18290" in card.text.split("## Citation")[1]
    assert str(tmp_path) not in card.content
    # Nothing is made up where nothing is known.
    (base / "README.md").write_text("no card")
    write_card(tmp_path, "dpo", config, FIGURES)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data.license) == (None, None)
    assert "base-135m (a local folder); its licence binds this model: look there." in card.text
    write_card(tmp_path, "dpo", {**config, "model": {"architecture": {"model_type": "llama"}}}, FIGURES)
    assert "None: llama with new weights" in (tmp_path / "README.md").read_text()
