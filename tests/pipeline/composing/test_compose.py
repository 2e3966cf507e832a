"""Configuration: composition, everything that is wrong at once, names, comments."""

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.settings import field_names
from ppo_vs_dpo.papers.settings import commented
from ppo_vs_dpo.pipeline.cli import COMMANDS, dispatch, with_config_dir
from ppo_vs_dpo.pipeline.composing.compose import experiments, load, prepare_overrides, run_name
from ppo_vs_dpo.pipeline.composing.schema import CONFIGS, SECTIONS, fields_from_source, load_class, section_keys
from ppo_vs_dpo.pipeline.composing.show import list_experiments, show
from ppo_vs_dpo.pipeline.composing.words import with_experiment
from ppo_vs_dpo.pipeline.sweep import RECORD, last_word
from tests.pipeline import mini


def test_every_experiment_composes_and_has_a_line():
    listed = list_experiments()
    for name in experiments():
        line = next(line for line in listed.splitlines() if line.split()[0] == name)
        assert len(line.split()) > 4
        given = [f"experiment={name}"]
        config = load(given, check_missing=False)
        assert config.experiment == name
        assert config.name


@pytest.mark.parametrize(
    ("experiment", "key", "hint"),
    [
        ("quickstart", "path=my_pairs.jsonl", "data=files data.path="),
        ("quickstart", "max_pairs=10", ""),
        ("hh", "sft_examples=10", ""),
        ("constitution", "inline={}", "data=inline"),
    ],
)
def test_a_data_key_that_the_source_does_not_read_is_refused(experiment, key, hint):
    """`quickstart data.path=my_pairs.jsonl` would train on the written world, and say nothing."""
    with pytest.raises(UserError, match=rf"data\.{key.split('=')[0]}: the source \w+ has no such key") as refused:
        load([f"experiment={experiment}", f"data.{key}"], check_missing=False)
    assert hint in str(refused.value)


def test_overrides_reach_their_places():
    config = load(["experiment=quickstart", "ppo.kl_coef=0.7", "sft.warmup_steps=3", "seed=4", "model.dtype=bfloat16"])
    assert config.ppo.kl_coef == 0.7
    assert config.sft.warmup_steps == 3  # a field of TRL's class that no YAML file names
    assert config.model.dtype == "bfloat16"
    assert config.name == "quickstart-seed4"
    assert config.ppo.response_length == config.data.max_new_tokens  # interpolations are resolved


def test_deepspeed_is_a_group_with_settings_of_its_own():
    config = load(["experiment=quickstart", "deepspeed=zero2", "deepspeed.zero_optimization.reduce_bucket_size=7"])
    assert config.deepspeed.zero_optimization.stage == 2
    assert config.deepspeed.zero_optimization.reduce_bucket_size == 7
    assert not load(["experiment=quickstart"]).deepspeed


def test_all_problems_at_once_with_the_nearest_name():
    with pytest.raises(UserError) as error:
        load(["experiment=quickstart", "ppo.klcoef=1", "sft.learning_rat=1", "seeed=2", "dpo.bta=3"])
    text = str(error.value)
    for hint in (
        "ppo.klcoef: no such key. Did you mean kl_coef?",
        "Did you mean learning_rate?",
        "seeed: no such key. Did you mean seed?",
        "dpo.bta: no such key. Did you mean beta?",
    ):
        assert hint in text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], r"which experiment\? Give experiment=NAME, one of: .*quickstart"),
        (["experiment=quickstrat"], r"no such experiment\. Did you mean quickstart\? There are: .*hh.*rejection"),
        (["experiment=quickstart", "ppo=defaut"], r"ppo=defaut: there is no such ppo\. Did you mean default\?"),
        (
            ["experiment=quickstart", "seed=1,2"],
            r"is several runs: ppo-vs-dpo -m experiment=quickstart seed=1,2",
        ),
        (["experiment=quickstart", "launch.workers=0"], r"launch\.workers is 0; it must be at least 1"),
        (["experiment=quickstart", "report_to=neptune"], r"ppo\.report_to=neptune: neptune is not installed"),
        (["experiment=quickstart", "seed=many"], "seed|many"),
        (["experiment=quickstart", "data.pairs=few"], r"data\.pairs.*few"),
        (["experiment=quickstart", "stages=[]"], r"stages is empty; it must name some of data, sft"),
        (["experiment=quickstart", "stages=[sft,pppo]"], "there is no stage pppo. Did you mean ppo"),
        (
            ["experiment=quickstart", "ppo.sweep={klcoef:[0,1]}"],
            r"ppo\.sweep\.klcoef: no such key\. Did you mean kl_coef",
        ),
        (["experiment=quickstart", "ppo.sweep={kl_coef:1}"], "a list of values is needed"),
        (
            ["experiment=quickstart", "ppo.sweep=[{klcoef:[1]}]"],
            r"ppo\.sweep\[0\]\.klcoef: no such key\. Did you mean",
        ),
        (
            ["experiment=quickstart", "dpo.sweep={loss_type: [[sigmoid, sft]]}"],
            r"dpo\.sweep\.loss_type: \['sigmoid', 'sft'\] cannot be part of a point's name",
        ),
        (["experiment=quickstart", "ppo.sweep={lora: [{r: 4, alpha: 8}]}"], r"ppo\.sweep\.lora: .* cannot be part"),
        (["experiment=quickstart", "ppo.sweep=[3]"], r"ppo\.sweep\[0\] is 3; a grid is a mapping"),
        (["experiment=methods", "ppo.sweep={kl_coef: [1]}"], "a list of grids: give a list"),
        (["experiment=quickstart", "sft.output_dir=x"], r"sft\.output_dir: set by the stage itself"),
        (["experiment=hh"], r"model\.path: required, and not set"),
        (["experiment=quickstart", "model.dtype=fp32"], r"dtype"),
        (["experiment=quickstart", "compare.resamples=50"], r"compare\.resamples is 50; it must be at least 100"),
        (["experiment=quickstart", "compare.pool_size=4"], r"compare\.best_of_n: .* is not in 1\.\.pool_size \(4\)"),
        (["experiment=quickstart", "what is this"], "cannot read the command line"),
        (["experiment=quickstart", "stages=ppo"], r"stages=ppo: it is a list: stages=\[ppo\]"),
    ],
)
def test_bad_configurations_are_explained(overrides, words):
    with pytest.raises(UserError, match=f"(?s){words}"):
        load(overrides)


@pytest.mark.parametrize("section", [name for name, (_, arguments) in SECTIONS.items() if arguments])
def test_field_names_read_from_source_are_those_of_the_class(section):
    """Reading the source instead of importing must give the same names, or valid keys would be refused."""
    import dataclasses

    module, name = SECTIONS[section][1].split(":")
    imported = {field.name for field in dataclasses.fields(load_class(SECTIONS[section][1])) if field.init}
    assert fields_from_source(module, name) == imported
    assert "per_device_train_batch_size" in section_keys(section)


def test_an_experiment_is_named_by_its_bare_word(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\n# Mine.\n")
    assert with_experiment(["quickstart", "seed=2"]) == ["experiment=quickstart", "seed=2"]
    assert with_experiment(["seed=2", "experiment=hh"]) == ["seed=2", "experiment=hh"]
    own = with_config_dir(["mine", "--config-dir", str(tmp_path)])
    assert with_experiment(own)[0] == "experiment=mine"
    with pytest.raises(
        UserError, match=r"(?s)no such command or experiment\. Did you mean list\?.*hh.*commands: list"
    ):
        with_experiment(["lits"], COMMANDS)


@pytest.mark.parametrize("command", [*COMMANDS, "data inspect", "run", "quickstart", "-m"])
def test_help_is_given_wherever_it_is_asked_for(command, capsys):
    """By each command in words of its own, and without the marks of docstrings."""
    for flag in ("--help", "-h"):
        try:
            code = dispatch([*command.split(), flag])
        except SystemExit as ended:
            code = ended.code
        assert code == 0
        said = capsys.readouterr().out
        own = {"-m": "ppo-vs-dpo NAME", "quickstart": "ppo-vs-dpo run NAME"}.get(command, f"ppo-vs-dpo {command}")
        assert own in said.splitlines()[0] or own in said.split("\n\n")[1], said[:200]
        assert "``" not in said


def test_a_key_of_all_stages_and_an_emptied_mapping():
    config = load(["experiment=quickstart", "report_to=none", "compare.best_of={}", "compare.checkpoints={}"])
    assert {config[stage].report_to for stage in ("sft", "reward_model", "dpo", "ppo")} == {"none"}
    assert (config.compare.best_of, config.compare.checkpoints) == ({}, {})
    assert load(["experiment=quickstart"]).compare.best_of  # or the above shows nothing


def test_own_experiments_from_another_folder(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n# Mine.\ndefaults:\n  - override /model: tiny\nppo:\n  kl_coef: 0.9\n"
    )
    config = load(["experiment=mine", f"hydra.searchpath=[file://{tmp_path}]"])
    assert (config.experiment, config.ppo.kl_coef) == ("mine", 0.9)


def test_prepared_overrides_keep_groups_and_deletions():
    assert prepare_overrides(["model=tiny", "ppo.kl_coef=1", "~ppo.sweep", "seed=1,2"]) == [
        "model=tiny",
        "++ppo.kl_coef=1",
        "~ppo.sweep",
        "seed=1,2",
    ]


def settings_in(config, prefix=""):
    """Dotted names of all settings; what stands in a commented mapping of data (pairs, weights) is not one."""
    for key, value in config.items():
        mappings = (
            "inline",
            "lora",
            "sweep",
            "expected_seconds",
            "on_problem",
            "answers",
            "hydra",
            "checkpoints",
            "best_of",
            "select",
        )
        if isinstance(value, dict) and value and key not in mappings:
            yield from settings_in(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


YAML_FILES = sorted(CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("path", YAML_FILES, ids=[str(p.relative_to(CONFIGS)) for p in YAML_FILES])
def test_every_key_has_a_comment(path: Path):
    known = {key for key, _, comment in commented(path) if comment}
    config = OmegaConf.to_container(OmegaConf.load(path))
    group = path.relative_to(CONFIGS).parts[0]
    if group in ("constitution",):
        pytest.skip("a constitution is data, not settings")
    missing = [key for key in settings_in(config) if key not in known and key.split(".")[0] != "defaults"]
    assert not missing, f"keys without a comment above them: {missing}"


@pytest.mark.parametrize("section", SECTIONS)
def test_every_own_key_of_a_stage_has_its_comment(section):
    files = (CONFIGS / section).glob("*.yaml")
    said = {key for path in files for key, _, comment in commented(path) if comment}
    assert set(field_names(load_class(SECTIONS[section][0]))) <= said


def test_show_prints_every_key_with_its_comment_and_can_be_read_back():
    text = show(["experiment=quickstart", "ppo.kl_coef=0.33"])
    assert "kl_coef: 0.33" in text
    assert "# Passes over a rollout." in text
    lines = text.splitlines()
    place = next(i for i, line in enumerate(lines) if line.strip() == "kl_coef: 0.33")
    assert "KL penalty" in lines[place - 1]
    assert OmegaConf.create(text) == load(["experiment=quickstart", "ppo.kl_coef=0.33"])


def test_runs_of_a_sweep_are_named_after_what_differs(tmp_path, forked):
    small = ["data.sft_examples=40", "data.train_prompts=20", "data.heldout_prompts=8", "data.pairs=16"]
    words = ["-m", "experiment=quickstart", "seed=1,2", "ppo.kl_coef=0.1,0.2", "stages=[data]", *small]
    line = [sys.executable, "-m", "ppo_vs_dpo.pipeline.cli", *words, f"output_dir={tmp_path}", "data.test_pairs=8"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=300, env=mini.environment())
    assert done.returncode == 0, done.stderr
    assert f"run 4 of 4: {tmp_path}/quickstart-seed2-ppo.kl_coef=0.2" in done.stdout
    assert {one.name for one in tmp_path.iterdir()} - {"sweeps"} == {
        f"quickstart-seed{seed}-ppo.kl_coef={coef}" for seed in (1, 2) for coef in (0.1, 0.2)
    }


def test_a_value_that_is_swept_twice(tmp_path):
    from ppo_vs_dpo.pipeline.sweep import sweep

    with pytest.raises(UserError, match="seed=1 stands twice among the swept values"):
        sweep(["experiment=quickstart", "seed=1,2,1", f"output_dir={tmp_path}"])
    with pytest.raises(UserError, match=r"^the configuration cannot be composed: .*seed="):  # nothing is swept
        sweep(["experiment=quickstart", "seed=", f"output_dir={tmp_path}"])


def test_a_long_name_is_cut_and_stays_unique():
    names = {run_name("quickstart", [f"data.path={'x' * 300}{end}"], multirun=True) for end in "ab"}
    assert len(names) == 2
    assert all(len(name) < 150 for name in names)


def test_a_sweep_is_checked_before_its_first_run(tmp_path, forked):
    words = ["-m", "experiment=quickstart", "seed=1,2", "compare.resamples=200,50", f"output_dir={tmp_path}"]
    line = [sys.executable, "-m", "ppo_vs_dpo.pipeline.cli", *words]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=300, env=mini.environment())
    assert done.returncode == 2
    assert "with seed=1 compare.resamples=50" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_sweep_ends_with_its_runs_and_how_to_pool_them(tmp_path):
    rows = ['{"run": "runs/a b"}', '{"run": "runs/c"}']
    assert last_word(tmp_path) == last_word(None) == ""
    (tmp_path / RECORD).write_text("\n".join(rows) + "\n")
    assert last_word(tmp_path).endswith("ppo-vs-dpo compare 'runs/a b' runs/c\n")


def test_a_sweep_that_is_taken_out_is_none():
    """A section without the key would let points of an earlier one into the report."""
    assert load(["experiment=quickstart", "~dpo.sweep"]).dpo.sweep is None
    assert load(["experiment=quickstart", "ppo.sweep={cliprange_value: [null, 0.1]}"]).ppo.sweep.cliprange_value == [
        None,
        0.1,
    ]
