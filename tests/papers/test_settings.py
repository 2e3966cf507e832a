"""Full configurations: every number has a source, what nobody published is asked for, all else composes and fits."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.papers.paper import MODULES, papers
from ppo_vs_dpo.papers.settings import CONFIGS, MINIATURE, full_settings, heading, settings_of, unknown
from ppo_vs_dpo.pipeline.composing.compose import load
from ppo_vs_dpo.pipeline.planning.plan import main as plan

FULL = sorted(path for path in CONFIGS.rglob("*.yaml") if path.stem != MINIATURE)
BASES = [CONFIGS.parent / stage / "full.yaml" for stage in ("sft", "reward_model", "dpo", "ppo")]
# Stand-ins for what nobody published, where a plan needs a value.
STAND_INS = {
    "model.path": "EleutherAI/pythia-1.4b",
    "model.chat_template": "'{{ messages }}'",
    "data.path": "pairs.jsonl",
    "data.prompts_path": "prompts.jsonl",
    "data.constitution": "default",
    "data.gold": "module:function",
    "data.reward_model": "folder",
    "data.max_new_tokens": "128",
    "data.temperature": "1.0",
    "data.train_prompts": "1000",
    "ppo.response_length": "128",
    "ppo.max_steps": "100",
    "ppo.total_episodes": "1000",
}


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def stand_in(key: str) -> str:
    if key in STAND_INS:
        return STAND_INS[key]
    return "0.1" if key.endswith("beta") else "1" if key.endswith("num_train_epochs") else "1e-6"


def test_there_are_twelve_papers_and_no_folder_without_one():
    assert len(MODULES) >= 12
    folders = {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    assert folders <= set(MODULES)
    for one in papers():
        assert one.name in MODULES
        assert full_settings(one.name) or "never released" in one.takes or "not obtained" in one.takes


@pytest.mark.parametrize("path", FULL + BASES, ids=name_of)
def test_every_number_has_its_source(path):
    assert settings_of(path)
    bare = [one.key for one in settings_of(path) if not one.kind or (one.kind != "unknown" and not one.place.strip())]
    assert not bare, "keys without [P|C|S|ours: where] or [unknown] at the end of their comment"
    assert heading(path)
    marked = {one.key for one in settings_of(path) if one.kind == "unknown"}
    assert marked == set(unknown(path)), "[unknown] belongs to ??? and nothing else"


@pytest.mark.parametrize("path", FULL, ids=name_of)
def test_every_full_configuration_composes_and_asks_for_what_is_unknown(path):
    wanted = unknown(path)
    if not wanted:
        assert load([f"paper={name_of(path)}"]).experiment == f"paper/{name_of(path)}"
        return
    with pytest.raises(UserError) as refused:
        load([f"paper={name_of(path)}"])
    problems = str(refused.value).splitlines()[1:]
    assert sorted(problem.strip().split(":")[0] for problem in problems) == sorted(wanted)
    assert all(note in str(refused.value) for note in wanted.values())


def test_what_a_paper_leaves_open_is_not_the_testbeds():
    """OmegaConf lets an earlier file's value stand where a later one says ???."""
    path = CONFIGS / "swamy2025" / "tldr.yaml"
    assert OmegaConf.is_missing(OmegaConf.load(path).dpo, "beta")
    with pytest.raises(UserError, match=r"dpo\.beta: required, and not set"):
        load(["paper=swamy2025/tldr", "dpo.learning_rate=1e-6"])
    given = [f"{key}={stand_in(key)}" for key in unknown(path)]
    assert load(["paper=swamy2025/tldr", *given]).dpo.beta == 0.1


def test_an_experiment_and_a_paper_are_not_both_run():
    with pytest.raises(UserError, match="give one of them"):
        load(["paper=dpo2023/hh", "experiment=quickstart"])
    with pytest.raises(UserError, match="there is no such paper"):
        load(["paper=dpo2023/hhh"])


def check_plan(path: Path) -> int:
    given = [f"{key}={stand_in(key)}" for key in unknown(path)]
    return plan([f"paper={name_of(path)}", *given, "--gpu", "h100-80gb"])


@pytest.mark.parametrize("name", ["nplus2024/6.9b", "ziegler2019/sentiment", "dpo2023/tldr"])
def test_a_plan_needs_no_hub(name, capsys):
    """Neox, GPT-2 (Conv1D) and GPT-J: sizes as published."""
    assert check_plan(CONFIGS / f"{name}.yaml") == 0
    assert "its sizes are those that were published" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("path", FULL, ids=name_of)
def test_every_full_configuration_fits_the_hardware_it_names(path, capsys):
    assert check_plan(path) == 0, capsys.readouterr().out


@pytest.mark.parametrize(("name", "millions"), [("gpt2", 124.4), ("gpt2-large", 774.0), ("gptj", 6050.9)])
def test_sizes_of_older_architectures(name, millions):
    """Published: GPT-2 124M and 774M, GPT-J 6.05B parameters."""
    from transformers import AutoConfig

    from ppo_vs_dpo.pipeline.planning.known import GPT_J, published_sizes
    from ppo_vs_dpo.pipeline.planning.memory import Shape

    sizes = dict(GPT_J) if name == "gptj" else published_sizes(name)
    shape = Shape.of(AutoConfig.for_model(sizes.pop("model_type"), **sizes))
    assert shape.parameters / 1e6 == pytest.approx(millions, rel=1e-3)
    assert shape.ffn == 4 * shape.hidden
    # Twelve d^2 a layer: four of attention, eight of the feed-forward part.
    assert shape.multiplied == shape.layers * 12 * shape.hidden**2
