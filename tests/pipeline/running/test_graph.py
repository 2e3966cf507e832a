"""What is done, stale or to do follows from what each stage depends on."""

import re
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, write_json
from ppo_vs_dpo.artifacts.guards.versions import made_by
from ppo_vs_dpo.artifacts.run import STAGES, RunFolder
from ppo_vs_dpo.compare.stage import of_several_versions
from ppo_vs_dpo.pipeline.checking.inputs import arguments_of
from ppo_vs_dpo.pipeline.cli import with_config_dir
from ppo_vs_dpo.pipeline.composing.compose import load
from ppo_vs_dpo.pipeline.running import graph
from ppo_vs_dpo.pipeline.running.command import check_versions, make_whole, say_end

CONFIG = {
    "experiment": "toy",
    "seed": 1,
    "model": {"path": None},
    "data": {"source": "files", "path": None},
    "sft": {"learning_rate": 0.1},
    "reward_model": {"learning_rate": 0.1},
    "dpo": {"beta": 0.1, "sweep": {"beta": [0.1, 0.5]}},
    "ppo": {"kl_coef": 0.1, "logging_steps": 1, "sweep": {"kl_coef": [0.0, 1.0]}},
    "compare": {"draws": 4},
}


@pytest.fixture
def finished(tmp_path):
    """A run folder in which everything is done."""

    def write(config):
        (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
        return RunFolder(tmp_path)

    (tmp_path / "pairs.jsonl").write_text("one")
    config = {**CONFIG, "data": {**CONFIG["data"], "path": str(tmp_path / "pairs.jsonl")}}
    run = write(config)
    for job in graph.build(run):
        write_json(run.stage_dir(job.name) / "started.json", {"fingerprint": job.fingerprint, "parts": job.parts})
        run.finish(job.name, job.fingerprint, 1.0, {})
    return config, write


def states(run):
    return {job.name: job.state for job in graph.build(run)}


def test_jobs_and_points(finished):
    config, write = finished
    jobs = graph.build(write(config))
    names = [job.name for job in jobs]
    # beta 0.1 is the main run; it is not made twice.
    assert names == [
        "data",
        "sft",
        "pairs",
        "reward_model",
        "dpo",
        "dpo,beta=0.5",
        "ppo",
        "ppo,kl_coef=0.0",
        "ppo,kl_coef=1.0",
        "compare",
    ]
    assert {"dpo,beta=0.5", "ppo,kl_coef=0.0", "ppo,kl_coef=1.0"} < set(jobs[-1].needs)
    assert set(states(write(config)).values()) == {"done"}


def test_the_experiment_methods_trains_them_in_one_run(tmp_path):
    """As many settings of each method, by grids; every one of them can be built."""
    config = load(["experiment=methods", f"output_dir={tmp_path}"])
    points = graph.points_of(config, "ppo")
    kinds = ["", ",advantage=rloo", ",advantage=grpo", ",advantage=reinforce_pp"]
    names = [f"ppo{kind}{coef}" for kind in kinds for coef in ("", ",kl_coef=0.4")]
    names += ["ppo,loss=dpo", "ppo,kl_coef=0.4,loss=dpo"]
    assert ["ppo", *(graph.point_name("ppo", point) for point in points)] == names
    assert len(graph.points_of(config, "dpo")) == 1
    plain = OmegaConf.to_container(config, resolve=True)
    for point in [{}, *points]:
        arguments_of(plain, "ppo", point)


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        ({"seed": 2}, set(STAGES)),
        ({"sft": {"learning_rate": 0.2}}, set(STAGES) - {"data"}),
        ({"ppo": {**CONFIG["ppo"], "kl_coef": 0.2}}, {"ppo", "compare"}),
        ({"dpo": {**CONFIG["dpo"], "beta": 0.2}}, {"dpo", "compare"}),
        ({"compare": {"draws": 5}}, {"compare"}),
        ({"ppo": {**CONFIG["ppo"], "logging_steps": 7}}, set()),
    ],
)
def test_a_change_makes_what_stands_behind_it_stale(finished, change, stale):
    config, write = finished
    jobs = {job.name: job for job in graph.build(write({**config, **change}))}
    assert {name for name in STAGES if jobs[name].state == "stale"} == stale
    for name in stale:
        assert jobs[name].because


def test_a_report_of_earlier_models_is_not_shown_as_this_run_s(finished, capsys):
    """`stages=[ppo]` under another setting: the old verdict is no verdict on the new policy."""
    config, write = finished
    run = write(config)
    run.path("compare", "report.html").write_text("a report")
    other = {"ppo": {**CONFIG["ppo"], "kl_coef": 0.2}}
    for change, words in (({}, "Report: "), (other, "of earlier models or settings (stage ppo")):
        run = write({**config, **change})
        say_end(run, next(job for job in graph.build(run) if job.name == "compare"))
        said = capsys.readouterr().out
        assert words in said
        assert ("Report: " in said) != bool(change)


def test_a_changed_file_is_a_changed_input(finished, tmp_path):
    config, write = finished
    (tmp_path / "pairs.jsonl").write_text("two")
    jobs = {job.name: job for job in graph.build(write(config))}
    assert jobs["data"].state == "stale"
    assert jobs["data"].because == "the content of data.path"
    assert "stage data" in jobs["sft"].because


def test_a_new_point_is_work_and_compare_follows(finished):
    config, write = finished
    more = {**config, "ppo": {**CONFIG["ppo"], "sweep": {"kl_coef": [0.0, 1.0, 3.0]}}}
    found = states(write(more))
    assert found.pop("ppo,kl_coef=3.0") == "todo"
    assert found.pop("compare") == "stale"
    assert set(found.values()) == {"done"}


def test_a_stage_that_did_not_finish_is_resumed(finished, tmp_path):
    config, write = finished
    (tmp_path / "ppo" / "done.json").unlink()
    found = states(write(config))
    assert found["ppo"] == "part"
    assert found["compare"] == "done"  # it read the same inputs; ppo will give the same result


@pytest.mark.parametrize(
    ("ppo", "asks"),
    [
        ({}, True),
        ({"reward": ["reward_model", "a.py:f"]}, True),
        ({"reward": "a.py:f"}, False),
        ({"gold_reward": True}, False),
    ],
)
def test_no_reward_model_is_asked_for_where_nothing_reads_it(ppo, asks, tmp_path):
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create({**CONFIG, "ppo": ppo})))
    run = RunFolder(tmp_path)
    jobs = graph.build(run)
    stages = [stage for stage in STAGES if stage != "reward_model"]
    if asks:
        with pytest.raises(UserError, match="needs reward_model"):
            graph.select(run, jobs, stages)
    else:
        assert "reward_model" not in {job.stage for job in graph.select(run, jobs, stages)}


def test_chosen_stages_need_theirs_done(finished, tmp_path):
    config, write = finished
    run = write({**config, "sft": {"learning_rate": 0.3}})
    jobs = graph.build(run)
    with pytest.raises(UserError, match=r"needs sft, .* stale \(the settings of sft changed\)"):
        graph.select(run, jobs, ["pairs", "compare"])
    assert [job.name for job in graph.select(run, jobs, ["sft"])] == ["sft"]
    assert graph.select(run, graph.build(write(config)), list(STAGES)) == []


def test_a_run_of_two_versions_needs_a_word_and_names_both(finished, monkeypatch):
    config, write = finished
    there = made_by()
    here = {**there, "source": "newer", "commit": "b" * 40, "torch": "99.0"}
    for place in ("pipeline.running.command", "compare.stage"):
        monkeypatch.setattr(f"ppo_vs_dpo.{place}.made_by", lambda: here)

    def todo_of(**changes):
        run = write({**config, **changes})
        jobs = graph.build(run)
        return run, jobs, graph.select(run, jobs, list(STAGES))

    changed = {"dpo": {**CONFIG["dpo"], "beta": 0.2}}
    run, jobs, todo = todo_of(**changed, launch={})
    with pytest.raises(UserError) as refused:
        check_versions(run, jobs, todo)
    said = str(refused.value)
    assert f"source {there['source']}) there, {here['ppo-vs-dpo']} (bbbbbbbbbbbb, source newer) here" in said
    assert f"torch {there['torch']} there, 99.0 here" in said
    assert "data, sft, pairs" in said
    assert "--accept-version" in said
    # What goes on, in what it says and in the report.
    run, jobs, todo = todo_of(**changed, launch={"accept_version": True})
    check_versions(run, jobs, todo)
    notes = of_several_versions(SimpleNamespace(run=run))
    assert any(f"source {there['source']}) there" in one and "source newer) here" in one for one in notes)
    assert any(f"torch {there['torch']} there, 99.0 here" in one for one in notes)
    # A run that is made anew from its first stage on has one version, and needs no word.
    run, jobs, todo = todo_of(model={"path": "other"}, launch={})
    check_versions(run, jobs, todo)
    # The option of the command line is this key.
    assert with_config_dir(["quickstart", "--accept-version"]) == ["quickstart", "launch.accept_version=true"]
    assert load(with_config_dir(["experiment=quickstart", "--accept-version"])).launch.accept_version is True


def test_an_interrupted_stage_of_another_version_needs_a_word(finished, monkeypatch):
    """Its checkpoints are the other code's."""
    config, write = finished
    run = write({**config, "launch": {}})
    (run.stage_dir("sft") / "done.json").unlink()
    jobs = graph.build(run)
    started = read_json(run.stage_dir("sft") / "started.json")
    write_json(run.stage_dir("sft") / "started.json", {**started, "made_by": [{**made_by(), "trl": "0.1"}]})
    with pytest.raises(UserError, match=rf"sft: trl 0\.1 there, {re.escape(made_by()['trl'])} here"):
        check_versions(run, jobs, graph.select(run, jobs, ["sft"]))


def test_a_finished_run_s_lost_notes_are_written_again(finished, capsys):
    """The manifest, and what a stage began with, are no results: no stage is made again for them."""
    config, write = finished
    run = write({**config, "launch": {}})
    before = {name: read_json(run.stage_dir(name) / "started.json") for name in ("sft", "dpo")}
    (run.stage_dir("sft") / "started.json").unlink()
    (run.stage_dir("dpo") / "started.json").write_text("[")
    run.path("manifest.json").write_text("{")
    make_whole(run, graph.build(run))
    for name, started in before.items():
        again = read_json(run.stage_dir(name) / "started.json")
        assert again["parts"] == started["parts"]
        assert again["made_by"] == [made_by()]
    assert read_json(run.path("manifest.json"))["seed"] == 1
    said = capsys.readouterr().err
    assert "manifest.json was gone or could not be read" in said
    assert "dpo/started.json cannot be read" in said
    assert set(states(run).values()) == {"done"}
    make_whole(run, graph.build(run))
    assert capsys.readouterr().err == ""


def split(config, rows, accumulate, processes, **more):
    """``config`` with DPO's updates cut up so."""
    dpo = {**config["dpo"], "per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulate, **more}
    return {**config, "dpo": dpo, "launch": {"processes": processes}}


@pytest.fixture
def begun(finished):
    """DPO was begun with updates of eight rows on one rank; ``begun(finished)`` with its end or with checkpoints."""
    config, write = finished

    def begin(whole):
        run = write(split(config, 8, 1, 1))
        for job in graph.build(run):
            if job.state != "done":
                run.begin(job.name, job.made)
                (run.stage_dir(job.name) / "checkpoints" / "checkpoint-10").mkdir(parents=True)
                if whole or job.stage != "dpo":
                    run.finish(job.name, job.fingerprint, 1.0, {})
        return config, write

    return begin


@pytest.mark.parametrize(
    ("rows", "accumulate", "processes", "more"),
    [
        (4, 1, 2, {}),
        (1, 4, 2, {"micro_batch_tokens": 512, "gradient_checkpointing": True}),
        (2, 4, 1, {"dataloader_num_workers": 1}),
        (8, 1, 1, {}),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_the_cut_of_an_update_may_change_and_its_rows_may_not(begun, rows, accumulate, processes, more, whole):
    config, write = begun(whole)
    run = write(split(config, rows, accumulate, processes, **more))
    wanted = "done" if whole else "part"
    found = states(run)
    assert (found["dpo"], found["ppo"], found["dpo,beta=0.5"]) == (wanted, "done", wanted)
    # Nor is anything that stands on it stale.
    assert found["compare"] == "done"
    # It is begun again as what it was, so that the next attempt may be cut up in another way again.
    job = next(job for job in graph.build(run) if job.name == "dpo")
    if not whole:
        assert [one.name for one in graph.select(run, graph.build(run), ["dpo"])] == ["dpo", "dpo,beta=0.5"]
        run.begin("dpo", job.made)
        assert run.path("dpo", "checkpoints", "checkpoint-10").is_dir()
        assert states(write(split(config, 2, 2, 2)))["dpo"] == "part"
    other = write(split(config, rows, accumulate, processes, **more, beta=0.3))
    assert states(other)["dpo"] == "stale"


def test_more_ranks_later_make_nothing_that_is_finished_stale(begun):
    config, write = begun(whole=True)
    assert set(states(write(split(config, 8, 1, 4))).values()) == {"done"}
    assert states(write(split(config, 4, 1, 1)))["dpo"] == "stale"


def test_a_finished_run_is_done_although_its_hostfile_is_gone(begun, tmp_path):
    config, write = begun(whole=True)
    gone = {"processes": 1, "nodes": 1, "hostfile": str(tmp_path / "gone")}
    for rows, accumulate in ((8, 1), (2, 4)):
        assert set(states(write({**split(config, rows, accumulate, 1), "launch": gone})).values()) == {"done"}


def test_going_on_with_updates_of_other_rows_is_refused_before_anything_changes(begun):
    config, write = begun(whole=False)
    run = write(split(config, 8, 1, 4))
    before = read_json(run.path("dpo", "started.json"))
    with pytest.raises(UserError, match=r"of 8 rows on 1 rank; on 4 the same settings make 32\. To go on"):
        graph.select(run, graph.build(run), ["dpo"])
    assert read_json(run.path("dpo", "started.json")) == before
    # An attempt that was moved aside would be taken up again: it is the same.
    run.clear("dpo")
    with pytest.raises(UserError, match=r"\.replaced/dpo-2 whose updates were of 8 rows"):
        graph.select(run, graph.build(run), ["dpo"])
    graph.select(run, graph.build(write(split(config, 2, 1, 4))), ["dpo"])


BOUND = {
    "loss_type": {"loss_type": ["sigmoid", "aot"]},
    "dataloader_drop_last": {"dataloader_drop_last": True},
    "average_tokens_across_devices": {"average_tokens_across_devices": False},
}


@pytest.mark.parametrize("key", BOUND)
def test_where_a_result_depends_on_the_rows_of_a_pass_their_cut_is_part_of_it(begun, key):
    """A loss that sorts the rows of a pass, or leaves out one that is not full, is another one with other rows."""
    config, write = begun(whole=False)
    config = {**config, "dpo": {**config["dpo"], **BOUND[key]}}
    run = write(split(config, 8, 1, 1, gradient_checkpointing=False))
    for job in graph.build(run):
        if job.stage == "dpo":
            run.begin(job.name, job.made)
            (run.stage_dir(job.name) / "checkpoints" / "checkpoint-10").mkdir(parents=True)
    assert states(run)["dpo"] == "part"
    assert states(write(split(config, 4, 2, 1)))["dpo"] == "stale"
    assert states(write(split(config, 4, 1, 2)))["dpo"] == "stale"
    # What cuts up nothing but memory still may change.
    assert states(write(split(config, 8, 1, 1, gradient_checkpointing=True)))["dpo"] == "part"
    run = write(split(config, 8, 1, 2, gradient_checkpointing=False))
    with pytest.raises(UserError, match=rf"To go on, start it on 1 rank again \(with this dpo\.{key} a result"):
        graph.select(run, graph.build(run), ["dpo"])


def test_a_damaged_result_is_made_whole_with_updates_of_its_rows(begun):
    """It has an end and checkpoints: those of other rows would go on from them, and count as what it was."""
    config, write = begun(whole=False)
    run = write(split(config, 8, 1, 1))
    (run.path("dpo", "model")).mkdir()
    (run.path("dpo", "model", "model.safetensors")).write_text("weights")
    run.finish("dpo", next(job for job in graph.build(run) if job.name == "dpo").fingerprint, 1.0, {})
    run.path("dpo", "model", "model.safetensors").unlink()
    assert states(run)["dpo"] == "part"
    graph.select(run, graph.build(run), ["dpo"])
    run = write(split(config, 8, 1, 4))
    with pytest.raises(UserError, match=r"of 8 rows on 1 rank; on 4 the same settings make 32\. To go on"):
        graph.select(run, graph.build(run), ["dpo"])


def test_ppo_s_responses_an_update_are_its_rows(begun):
    config, write = begun(whole=True)
    ppo = {**config["ppo"], "rollout_batch_size": 64, "per_device_train_batch_size": 16}
    whole = split({**config, "ppo": ppo}, 8, 1, 1)
    run = write(whole)
    for job in graph.build(run):
        if job.state != "done":
            run.begin(job.name, job.made)
            run.finish(job.name, job.fingerprint, 1.0, {})
    smaller = {**whole, "ppo": {**ppo, "per_device_train_batch_size": 4}}
    assert set(states(write(smaller)).values()) == {"done"}
    assert states(write({**whole, "ppo": {**ppo, "rollout_batch_size": 32}}))["ppo"] == "stale"
