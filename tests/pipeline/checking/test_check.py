"""Every value that a stage would refuse is refused before the first stage starts, with all the others."""

import dataclasses
import json
import re

import pytest
from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.errors import Complaint, UserError
from ppo_vs_dpo.artifacts.files import read_marker
from ppo_vs_dpo.artifacts.guards.fingerprints import Made
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.artifacts.settings.values import allows, inside, of_another_type, out_of_range
from ppo_vs_dpo.pipeline.checking import check
from ppo_vs_dpo.pipeline.checking.check import check_once, load_checked
from ppo_vs_dpo.pipeline.checking.inputs import problems, prompts_left
from ppo_vs_dpo.pipeline.checking.verify import main as verify
from ppo_vs_dpo.pipeline.composing.compose import load
from ppo_vs_dpo.pipeline.running.launch import launcher
from tests.pipeline.chat_model import save_chat_model

STAGES = ["data", "sft", "pairs", "reward_model", "dpo", "ppo", "compare"]
# Whatever is wrong with a value alone is said when the configuration is composed.
AT_ONCE = [
    ("dpo.num_train_epochs=0", "dpo.num_train_epochs is 0"),
    ("dpo.num_train_epochs=-1", "dpo.num_train_epochs is -1"),
    ("reward_model.num_train_epochs=0", "reward_model.num_train_epochs is 0"),
    ("sft.max_steps=0", "sft.max_steps is 0"),
    ("ppo.cliprange=-0.2", "ppo.cliprange is -0.2"),
    ("ppo.cliprange_value=-1", "ppo.cliprange_value is -1"),
    ("ppo.score_clip=-5", "ppo.score_clip is -5"),
    ("ppo.lam=1.5", "ppo.lam is 1.5"),
    ("ppo.kl_coef=-1", "ppo.kl_coef is -1"),
    ("ppo.kl_coef=nan", "ppo.kl_coef is nan"),
    ("ppo.validation_prompts=-3", "ppo.validation_prompts is -3"),
    ("ppo.lora={r: 0}", "ppo.lora.r is 0"),
    ("sft.learning_rate=-1e-5", "sft.learning_rate is -1e-05"),
    ("sft.per_device_train_batch_size=0", "per_device_train_batch_size is 0"),
    ("sft.gradient_accumulation_steps=-2", "gradient_accumulation_steps is -2"),
    ("sft.save_steps=0", "sft.save_steps is 0"),
    ("dpo.beta=-0.1", "dpo.beta is -0.1"),
    ("dpo.label_smoothing=0.7", "dpo.label_smoothing is 0.7"),
    ("data.temperature=0", "data.temperature is 0"),
    ("data.pairs=0", "data.pairs is 0"),
    ("data.max_new_tokens=-1", "data.max_new_tokens is -1"),
    ("compare.top_p=1.5", "compare.top_p is 1.5"),
    ("compare.batch_size=0", "compare.batch_size is 0"),
    ("compare.other_temperatures=[0.5,-1]", "compare.other_temperatures is -1"),
    ("compare.temperature=0", "compare.temperature is 0: a greedy policy has no KL"),
    ("compare.best_of={ppo: [0]}", "compare.best_of.ppo is [0]"),
    ("compare.best_of={sft: [4]}", "the reference's values of n are compare.best_of_n"),
    (
        "compare.checkpoints={pppo: [1]}",
        "compare.checkpoints.pppo: only ppo and dpo have checkpoints of a policy. Did",
    ),
    ("compare.checkpoints={dpo: [0]}", "compare.checkpoints.dpo is [0]"),
    ("reward_model.head_init=one", "head_init is 'one'"),
    ("reward_model.head=v_head", "names the head of reward_model.path, and that is not set"),
    ("sft.assistant_only_loss=true", "sft.assistant_only_loss: the loss is on the assistant's words already"),
    ("launch.processes=0", "launch.processes is 0"),
    ("seed=-1", "seed is -1"),
]
# What needs the argument classes, the model or the user's files is said by the check, all at once.
LATER = {
    "sft.learning_rate=abc": "sft.learning_rate is 'abc'; it must be a number",
    "dpo.beta=abc": "dpo.beta is 'abc'; it must be a number",
    "ppo.whiten_rewards=maybe": "ppo.whiten_rewards is 'maybe'; it must be true or false",
    "ppo.missing_eos=foo": "ppo.missing_eos is 'foo'; it must be replace or subtract",
    "dpo.sweep={beta: [0.1, -3]}": "dpo.beta is -3",
    "reward_model.lr_scheduler_type=linar": "linar is not a valid SchedulerType",
    "data.gold=nowhere:f": "data.gold=nowhere:f",
    "reward_model.path=nowhere": "reward_model.path=nowhere: there is no such folder here, and it could not be read",
    "compare.policies={a: {path: /nowhere}}": "/nowhere does not exist",
    "compare.judges=[{kind: llm, model: x, template: nope}, {kind: nun}, {kind: function, function: 'a.b:c'}]": "nope",
}


# What stages and TRL's trainers say only when they get there: (key, value, words).
ONLY_THERE = [
    ("sft.lr_scheduler_kwargs", {"num_cycle": 1}, "sft.lr_scheduler_kwargs do not fit lr_scheduler_type=linear"),
    ("sft.optim_args", "xx", "sft.optim=adamw_torch"),
    ("sft.padding_free", True, "sft.padding_free: TRL refuses it beside max_length"),
    ("sft.save_strategy", "best", "sft.save_strategy=best saves at evaluations, and there are none"),
    ("ppo.num_mini_batches", 100000, "cannot be cut into 100000 equal minibatches"),
    ("ppo.reward_weights", [1.0, 2.0], "ppo.reward_weights has 2 entries for 1 rewards"),
    ("ppo.stop_strings", [""], "stop_strings has an empty text"),
    ("ppo.debug", "underflow_overflow", "ppo.debug has no meaning in PPO"),
    ("ppo.sweep", {"kl_coef": [0.1, 0.1]}, "ppo.sweep.kl_coef has 0.1 twice"),
    ("ppo.value_path", ".", "ppo.value_path with advantage=rloo, loss=ppo: there are no values"),
    ("ppo.samples_per_prompt", 3, "cannot hold whole groups of 3"),
    ("dpo.sync_ref_model", True, "dpo.sync_ref_model moves the reference"),
    ("compare.best_of", {"nobody": [4]}, "compare.best_of.nobody: no policy of this run"),
    ("compare.policies", {"ppo": {"path": "x"}}, "compare.policies.ppo: ppo is this run's own"),
    ("compare.policies", {"a": {}}, "compare.policies.a: give path"),
    ("compare.judges", [{"kind": "function", "function": "nope"}], "it must be module:function"),
    ("compare.judges", [{"kind": "function"}], "needs function"),
    ("compare.judges", [{"kind": "reward_model", "name": "gold", "path": "x"}], "the name gold is taken"),
]


@pytest.fixture(scope="module")
def quickstart():
    return OmegaConf.to_container(load(["experiment=quickstart"]), resolve=True)


@pytest.mark.parametrize(("key", "value", "message"), ONLY_THERE, ids=[f"{k}={v}" for k, v, _ in ONLY_THERE])
def test_what_only_the_stage_would_find_out_is_said_before(quickstart, key, value, message):
    section, name = key.split(".")
    config = {**quickstart, section: {**quickstart[section], name: value}}
    if name == "sync_ref_model":
        config[section]["precompute_ref_log_probs"] = True
    if name == "value_path":
        config[section] |= {"advantage": "rloo", "samples_per_prompt": 4}
    found = problems(config, [section])
    assert any(message in one for one in found), found
    assert not any("\n" in one or "Traceback" in one for one in found)


def test_a_sweep_s_point_may_be_sampled_from(quickstart):
    config = {**quickstart, "compare": {**quickstart["compare"], "best_of": {"ppo,kl_coef=0.1": [4]}}}
    assert problems(config, ["compare"]) == []


@pytest.mark.parametrize(("override", "message"), AT_ONCE)
def test_a_value_out_of_range_is_refused_when_composed(override, message):
    with pytest.raises(UserError) as refused:
        load(["experiment=quickstart", override])
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("name=a${b}", "is not filled in here"),
        ('name="a${oc.env:HOME}"', "is not filled in here"),
        ('output_dir="o${x}"', "is not filled in here"),
        ('name="a\nb"', "control character"),
        ('name="\x1b[31m"', "control character"),
        ("name=../x", "output_dir"),
        (f"name={'x' * 300}", "at most 255 bytes"),
        ("sft.learning_rate=${nowhere}", "nowhere"),
    ],
)
def test_odd_names_are_refused_in_one_sentence_and_not_interpreted(override, message):
    with pytest.raises(UserError) as refused:
        load(["experiment=quickstart", override])
    assert message in str(refused.value)
    assert "\x1b" not in str(refused.value)


def test_a_sweep_s_jobs_have_a_folder_each_also_under_one_name():
    from ppo_vs_dpo.pipeline.composing.compose import finish

    names = set()
    for seed in (1, 2):
        config = load(["experiment=quickstart", "name=mine", f"seed={seed}"])
        names.add(finish(config, "quickstart", [f"seed={seed}"], multirun=True, emptied=[]).name)
    assert names == {"mine-seed1", "mine-seed2"}


def test_everything_else_is_said_at_once():
    config = load(["experiment=quickstart", *LATER])
    found = problems(OmegaConf.to_container(config, resolve=True), STAGES)
    for message in LATER.values():
        assert any(message in one for one in found), (message, found)
    assert len(found) >= len(LATER) + 1  # the judges' entry has three mistakes
    assert not any("Traceback" in one for one in found)


def test_nothing_is_said_of_a_value_that_was_only_left_out_of_a_trial(quickstart):
    """Three samples a prompt do not fit the batch; that there is one sample is true of no value that was given."""
    wrong = {"advantage": "rloo", "samples_per_prompt": 3}
    found = problems({**quickstart, "ppo": {**quickstart["ppo"], **wrong}}, ["ppo"])
    assert len(found) == 1
    assert "whole groups of 3 (ppo.samples_per_prompt)" in found[0]


def test_what_is_refused_later_is_said_in_the_same_round(monkeypatch):
    """Unknown keys, values out of range, and what only the stages' own classes and files show: one message."""
    wrong = {
        "sft.learning_rte=1": "sft.learning_rte: no such key. Did you mean learning_rate?",
        "unheard=1": "unheard: no such key",
        "name=../x": "a run's folder lies in output_dir",
        "sft.save_steps=0": "sft.save_steps is 0; it must be above 0.",
        "sft.lr_scheduler_type=linar": "linar is not a valid SchedulerType",
        "sft.optim=adamm": "adamm is not a valid OptimizerNames",
        "sft.weight_decay=abc": "sft.weight_decay is 'abc'; it must be a number.",
        "ppo.kl_coef=-1": "ppo.kl_coef is -1",
        "ppo.whiten_rewards=maybe": "ppo.whiten_rewards is 'maybe'",
        "compare.confidence=2": "compare.confidence is 2",
        "compare.judges=[{kind: nun}]": "compare.judges[0]: kind must be",
        "compare.policies={a: {path: /nowhere}}": "/nowhere does not exist",
        "data.source=nowhere": "data.source is 'nowhere'",
        "launch.nodes=2": "srun",
    }
    monkeypatch.setattr(
        "ppo_vs_dpo.pipeline.checking.check.problems_of", lambda config, stages, environment=None: problems(
            OmegaConf.to_container(config, resolve=True), stages
        )
    )  # fmt: skip
    with pytest.raises(Complaint) as refused:
        load_checked(["experiment=quickstart", *wrong], launcher)
    found = refused.value.problems
    for message in wrong.values():
        assert len([one for one in found if message in one]) == 1, (message, found)
    assert len(found) == len(wrong), found


def test_a_mistyped_name_costs_no_libraries(monkeypatch):
    monkeypatch.setattr(
        "ppo_vs_dpo.pipeline.checking.check.problems_of", lambda *_: pytest.fail("what loads TRL was asked")
    )
    wrong = ["ppo.kl_coeff=1", "seeed=3", "launch.worker=2"]
    with pytest.raises(Complaint) as refused:
        load_checked(["experiment=quickstart", *wrong], launcher)
    assert len(refused.value.problems) == 3  # all of them


@pytest.mark.parametrize(
    ("row", "more", "message"),
    [
        ({"prompt": "Q?", "chosen": "A", "rejected": "B"}, [], "data.conversational=true"),
        ({"prompt": "Q?", "chosen": "A", "rejected": "B"}, ["data.conversational=true"], None),
        ({"prompt": "Q?", "chosen": "A", "rejected": "B"}, ["data.rendered=true"], None),
        ({"instruction": "Q?", "better": "A", "worse": "B"}, [], "The columns are instruction, better, worse"),
    ],
)
def test_the_first_rows_are_read_before_the_first_stage(tmp_path, row, more, message):
    rows = [{name: f"{text} {number}" for name, text in row.items()} for number in range(60)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    words = [
        "experiment=try",
        f"model.path={save_chat_model(tmp_path / 'model')}",
        f"data.path={tmp_path}/pairs.jsonl",
    ]
    found = problems(OmegaConf.to_container(load([*words, *more]), resolve=True), ["data"])
    assert message in "\n".join(found) if message else found == []


@pytest.mark.parametrize(
    ("row", "more", "message"),
    [
        ({"prompt": "Q?"}, [], "data.conversational=true"),
        ({"prompt": "Q?"}, ["data.conversational=true"], None),
        ({"messages": [{"role": "user", "content": "Q?"}]}, [], None),
        ({"answer": "A"}, [], "prompts.jsonl, line 1: no prompt .*the row has answer"),
    ],
)
@pytest.mark.parametrize("experiment", ["constitution_chat", "rejection"])
def test_the_first_prompts_are_read_before_the_first_stage(tmp_path, row, more, message, experiment):
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    words = [
        f"experiment={experiment}",
        "model=pretrained",
        f"model.path={save_chat_model(tmp_path / 'model')}",
        f"data.prompts_path={tmp_path}/prompts.jsonl",
    ]
    found = problems(OmegaConf.to_container(load([*words, *more]), resolve=True), ["data"])
    assert re.search(message, "\n".join(found)) if message else found == []


def test_a_model_that_is_nowhere_and_a_function_that_is_not_there_are_named(tmp_path):
    (tmp_path / "mine.py").write_text("def polite(prompts, completions, **columns):\n    return []\n")
    config = load(["experiment=hh", "model.path=nowhere", f"ppo.reward={tmp_path}/mine.py:plite"])
    found = "\n".join(problems(OmegaConf.to_container(config, resolve=True), ["ppo"]))
    assert "model.path=nowhere: there is no such folder here, and it could not be read from the Hub" in found
    assert "mine.py has no function 'plite'; it has polite. Give it as" in found


@pytest.mark.parametrize(
    ("pairs", "more", "refused"),
    [(120, [], True), (240, [], False), (120, ["ppo.validation_prompts=16"], False), (0, [], True)],
)
def test_more_prompts_set_aside_than_there_are(tmp_path, pairs, more, refused):
    """Known from a file of pairs, or from the number that is made: not after the reward model."""
    lines = [json.dumps({"prompt": f"{n}?", "chosen": "A", "rejected": "B"}) + "\n" for n in range(pairs)]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    words = ["experiment=hh", "model.path=x", "data=files", f"data.path={tmp_path}/pairs.jsonl"]
    words = words if pairs else ["experiment=quickstart", "data.train_prompts=128"]
    found = prompts_left(OmegaConf.to_container(load([*words, *more]), resolve=True))
    of = "about 96" if pairs else "128"
    said = f"ppo.validation_prompts is 128, of {of} training prompts: none is left to train on. Lower it."
    assert found == [said] * refused


def test_adapters_name_layers_of_the_model():
    lora = "ppo.lora={r: 4, target_modules: [q_prj]}"
    config = OmegaConf.to_container(load(["experiment=quickstart", lora, "ppo.shared_base=false"]), resolve=True)
    found = problems(config, ["ppo"])
    assert found == [one for one in found if "the model has no layer q_prj; it has" in one and "q_proj" in one]
    assert len(found) == 1


def test_what_is_right_is_not_complained_of():
    config = load(
        ["experiment=quickstart", "sft.weight_decay=0", "ppo.top_k=0", "ppo.max_steps=3", "dpo.max_steps=-1"]
    )
    assert problems(OmegaConf.to_container(config, resolve=True), STAGES) == []


def test_a_wrong_value_leaves_a_finished_run_as_it_was(tmp_path, monkeypatch):
    """The check comes before anything is moved or written."""
    from ppo_vs_dpo.pipeline.running import command as running
    from ppo_vs_dpo.pipeline.running import graph

    good = load(["experiment=quickstart", f"output_dir={tmp_path}", "stages=[data,sft]"])
    (tmp_path / "quickstart").mkdir()
    OmegaConf.save(good, tmp_path / "quickstart" / "config.yaml")
    folder = RunFolder(tmp_path / "quickstart")
    # The result of data with just these settings was moved aside before: it does not come back for a refused command.
    folder.begin("data", next(job.made for job in graph.build(folder) if job.name == "data"))
    folder.finish("data", read_marker(folder.path("data", "started.json"))["fingerprint"], 1.0, {})
    for name in ("data", "sft"):
        folder.begin(name, Made("f", {}))
        (folder.stage_dir(name) / "model").mkdir(exist_ok=True)
        (folder.stage_dir(name) / "model" / "weights").write_text("three days of work")
        folder.finish(name, "f", 1.0, {})
    before = {path: path.read_bytes() for path in (tmp_path / "quickstart").rglob("*") if path.is_file()}
    monkeypatch.setattr("ppo_vs_dpo.pipeline.checking.check.problems_of", lambda *a: ["sft.x is wrong."])
    with pytest.raises(UserError, match=r"sft\.x is wrong"):
        running.run_pipeline(load(["experiment=quickstart", f"output_dir={tmp_path}", "stages=[data,sft]"]))
    after = {path: path.read_bytes() for path in (tmp_path / "quickstart").rglob("*") if path.is_file()}
    assert {path: text for path, text in after.items() if "cache" not in path.parts} == {
        path: text for path, text in before.items() if "cache" not in path.parts
    }


def test_a_refused_run_leaves_no_folder_behind(tmp_path, tmp_path_factory, monkeypatch):
    from ppo_vs_dpo.pipeline.running import command as running

    monkeypatch.setattr("ppo_vs_dpo.pipeline.checking.check.problems_of", lambda *a: ["sft.x is wrong."])
    pairs = tmp_path_factory.mktemp("own") / "pairs.jsonl"
    pairs.write_text("{}\n")
    # With files of one's own, too: their hashes are remembered once there is a run.
    for name, *own in (["quickstart"], ["try", f"model.path={pairs.parent}", f"data.path={pairs}"]):
        config = load([f"experiment={name}", *own, f"output_dir={tmp_path}/runs/all", "stages=[data]"])
        with pytest.raises(UserError, match=r"sft\.x is wrong"):
            running.run_pipeline(config)
        assert not list(tmp_path.iterdir())
    (tmp_path / "runs").mkdir()  # what was there stays
    with pytest.raises(UserError, match=r"sft\.x is wrong"):
        running.run_pipeline(load(["experiment=quickstart", f"output_dir={tmp_path}/runs", "stages=[data]"]))
    assert list(tmp_path.rglob("*")) == [tmp_path / "runs"]


@pytest.mark.parametrize("experiment", ["try", "hh"])
def test_a_model_that_is_not_named_is_said_once(experiment, monkeypatch):
    monkeypatch.setattr(
        "ppo_vs_dpo.pipeline.checking.check.problems_of", lambda config, stages, environment=None: problems(
            OmegaConf.to_container(config, resolve=True), stages
        )
    )  # fmt: skip
    with pytest.raises(Complaint) as refused:
        load_checked([f"experiment={experiment}"], launcher)
    found = refused.value.problems
    assert found.count("model.path: required, and not set.") == 1
    assert {*found} <= {"model.path: required, and not set.", "data.path: required, and not set."}


def test_what_was_found_in_order_is_not_looked_at_twice(tmp_path, monkeypatch):
    settings = {"seed": 1, "launch": {}, "output_dir": str(tmp_path.parent), "name": tmp_path.name}
    run = RunFolder(tmp_path, OmegaConf.create(settings))
    asked = []
    monkeypatch.setattr("ppo_vs_dpo.pipeline.checking.check.problems_of", lambda *a: asked.append(1) or [])
    both = {"sft": "a", "dpo": "b"}
    for stages in (both, both, {"dpo": "b"}):  # the first has been done since
        check_once(run, stages, lambda launch: None)
    assert len(asked) == 1
    run.config.stages = ["dpo"]
    check_once(run, {"dpo": "b"}, lambda launch: None)
    assert len(asked) == 1
    check_once(run, {"dpo": "another file"}, lambda launch: None)
    assert len(asked) == 2
    check_once(run, {"dpo": "another file", "ppo": "c"}, lambda launch: None)
    assert len(asked) == 3
    run.config.seed = 2
    check_once(run, {"dpo": "another file"}, lambda launch: None)
    assert len(asked) == 4
    run.cache("checked.json").write_text("[]")
    check_once(run, {"dpo": "another file"}, lambda launch: None)
    assert len(asked) == 5


def test_intervals_and_types():
    assert inside(1, "[1,)")
    assert not inside(0, "[1,)")
    assert not inside(0, "(0,)")
    assert not inside(1, "[0,1)")
    assert allows(int | None, None)
    assert not allows(int, True)
    assert not allows(float, "1")
    assert allows(list[int], [1])
    assert not allows(list[int], ["a"])
    assert out_of_range({"unheard_of": -3}, "sft") == []
    assert out_of_range({"num_train_epochs": 0, "max_steps": 5}, "sft") == []

    @dataclasses.dataclass
    class Own:
        flag: bool = False
        size: int | None = None

    assert of_another_type({"flag": None, "size": None, "other": "x"}, Own, "own") == []
    assert of_another_type({"size": "x"}, Own, "own") == ["own.size is 'x'; it must be a whole number or null."]


def test_verify_reads_every_byte_and_mend_marks_what_is_not_whole(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    run = RunFolder(tmp_path)
    run.begin("sft", Made("f", {}))
    (tmp_path / "sft" / "weights").write_text("weights")
    run.finish("sft", "f", 1.0, {})
    assert verify([str(tmp_path)]) == 0
    (tmp_path / "sft" / "weights").write_text("weighty")
    assert run.done("sft") is not None
    assert verify([str(tmp_path), "--mend"]) == 1
    assert "weights was changed after it was written" in capsys.readouterr().out
    assert run.done("sft") is None
    assert json.loads((tmp_path / "sft" / "done.json.damaged").read_text())["fingerprint"] == "f"


def test_a_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("a file")
    assert check.no_folder(tmp_path / "new" / "run") == []
    assert check.no_folder(tmp_path / "taken" / "runs" / "run")[0].startswith(
        f"output_dir: {tmp_path}/taken is a file"
    )
    monkeypatch.setattr(check.os, "access", lambda place, how: False)  # root may write everywhere
    assert check.no_folder(tmp_path / "new")[0].startswith(f"output_dir: {tmp_path} may not be written")
