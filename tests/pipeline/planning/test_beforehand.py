"""What a run says it will cost before it starts, and the speed behind it."""

import gzip
import io
import json
import os
import time
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console
from transformers import AutoTokenizer, LlamaForCausalLM

from ppo_vs_dpo.artifacts.files import write_parquet
from ppo_vs_dpo.artifacts.guards.fingerprints import Made, needs_of
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.compare.sampling import completions, policies
from ppo_vs_dpo.compare.stage import CompareStage
from ppo_vs_dpo.models import devices
from ppo_vs_dpo.pipeline.composing.compose import load
from ppo_vs_dpo.pipeline.planning.cost import __main__ as afterwards
from ppo_vs_dpo.pipeline.planning.cost import beforehand, counted, measured, work
from ppo_vs_dpo.pipeline.running.graph import Job
from ppo_vs_dpo.pipeline.running.overview import Overview, clock
from ppo_vs_dpo.preferences.testbed.grammar import reviews
from ppo_vs_dpo.preferences.testbed.tokenizer import build_tokenizer
from tests.pipeline.chat_model import save_chat_model

STAGES = ("data", "sft", "pairs", "reward_model", "dpo", "ppo", "compare")


def run_of(folder, *overrides):
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(load(list(overrides))))
    return RunFolder(folder)


@pytest.fixture
def hh(tmp_path):
    """The README's own command on 200 pairs of about 30 tokens each."""
    rows = [{"prompt": "p" * 40, "chosen": "c" * 40, "rejected": "r" * 40}] * 200
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_of(tmp_path, "experiment=hh", "model.path=x", "data=files", f"data.path={tmp_path}/pairs.jsonl")


def test_responses_and_updates_are_those_of_the_configuration(hh):
    """By hand: 100 updates x 512 responses of 128 tokens, 9 evaluations of 128; 160 pairs in updates of 64."""
    ppo = work.work_of(hh, "ppo")
    assert (ppo.updates, ppo.responses, ppo.sampled) == (100, 51_200 + 9 * 128, (51_200 + 9 * 128) * 128)
    reward = work.work_of(hh, "reward_model")
    assert (reward.updates, reward.adapters) == (3, True)
    assert work.work_of(hh, "sft").updates == 0  # skip_training
    compare = work.work_of(hh, "compare")
    assert compare.responses == 256 * (4 + 20 + 2 * 1)


def test_a_value_model_costs_what_it_trains_on(tmp_path):
    """Without one (a point of a sweep, too) half the trained tokens, a pass and a checkpoint less."""
    run = run_of(tmp_path, "experiment=quickstart", "ppo.samples_per_prompt=4", "ppo.sweep={advantage:[rloo]}")
    gae, rloo = (work.work_of(run, name) for name in ("ppo", "ppo,advantage=rloo"))
    assert rloo.updates == gae.updates
    assert rloo.trained == gae.trained / 2
    # The value model read each response once; policy and value model were trained on it in every pass.
    assert gae.read - rloo.read == gae.trained / 2 / run.config.ppo.num_ppo_epochs
    speed = {"parameters": 10**9, "device": "cpu"}
    alone = run_of(tmp_path / "rloo", "experiment=quickstart", "ppo.samples_per_prompt=4", "ppo.advantage=rloo")
    disk = [float(beforehand.space(r, [w], speed).split()[2]) for r, w in ((run, gae), (alone, rloo))]
    kept = run.config.ppo.save_total_limit + 1
    # fp32 with AdamW's moments, for each checkpoint that is kept.
    assert disk[0] - disk[1] == pytest.approx(kept * 3 * 4, abs=0.2)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_a_file_of_pairs_is_counted_in_every_form(tmp_path, kind):
    """The README's promise: JSON lines, CSV, Parquet, compressed."""
    rows = [{"prompt": f"{n:04d}" * 10, "chosen": "c" * 40, "rejected": "r" * 40} for n in range(200)]
    path = tmp_path / f"pairs.{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == "parquet":
        write_parquet(path, rows)
    elif kind == "csv":
        path.write_text("prompt,chosen,rejected\n" + "".join(",".join(row.values()) + "\n" for row in rows))
    else:
        path.write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
    run = run_of(tmp_path / "run", "experiment=try", "model.path=x", f"data.path={path}")
    found, length = counted.examples(run, "dpo")
    assert found == pytest.approx(0.8 * 200, abs=1)
    assert length == 80 / counted.CHARACTERS
    assert counted.test_pairs(run) == pytest.approx(20, abs=1)
    assert len(counted.some_texts(run)) == 16
    path.write_bytes(path.read_bytes()[:50] if kind != "csv" else b"")
    counted.examples(run, "dpo")  # a torn file is the data stage's to complain of


def test_pairs_are_counted_as_the_data_step_reads_them(tmp_path):
    """HH's dialogues have no column prompt, and every side begins with it; what is too long is not trained on."""
    turn = "\n\nHuman: " + "p" * 40 + "\n\nAssistant: "
    rows = [{side: turn + answer * 20 for side, answer in (("chosen", "c"), ("rejected", "r"))} for _ in range(60)]
    rows += [{"chosen": turn + "c" * 4000, "rejected": turn + "r"}] * 40
    rows += [{"chosen": turn, "rejected": turn + "r"}, {"chosen": "no dialogue"}]  # left out, or not a pair
    path = tmp_path / "hh.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = run_of(tmp_path / "run", "experiment=try", "model.path=x", f"data.path={path}")
    number, length = counted.examples(run, "dpo")
    assert number == pytest.approx(0.8 * 60, abs=2)
    assert length == (40 + 20) / counted.CHARACTERS
    assert counted.examples(run, "ppo")[1] == 40 / counted.CHARACTERS
    assert counted.some_texts(run, 1) == [
        {
            "prompt": [{"role": "user", "content": "p" * 40}],
            "chosen": [{"role": "assistant", "content": "c" * 20}],
        }
    ]
    # At most so many pairs are taken, of those that are left.
    few = run_of(tmp_path / "few", "experiment=try", "model.path=x", f"data.path={path}", "data.max_pairs=50")
    assert counted.examples(few, "dpo")[0] == 40
    assert counted.test_pairs(few) == 5
    # Other columns, told by name.
    path.write_text(json.dumps({"q": "p" * 40, "a": "c" * 20, "b": "r"}) + "\n")
    columns = "data.columns={prompt: q, chosen: a, rejected: b}"
    run = run_of(tmp_path / "named", "experiment=try", "model.path=x", f"data.path={path}", columns)
    assert counted.examples(run, "dpo")[1] == (40 + 20) / counted.CHARACTERS


def test_once_the_pairs_are_there_they_are_counted(hh):
    write_parquet(hh.path("pairs", "train.parquet"), [{"prompt": "a" * 80, "chosen": "b" * 80, "rejected": "c"}] * 640)
    dpo = work.work_of(hh, "dpo")
    assert dpo.updates == 10
    assert dpo.trained == 10 * 64 * 2 * (160 / counted.CHARACTERS)


def test_the_testbed_s_texts_are_as_long_as_its_reviews(tmp_path):
    """Before and after its data step, by its own tokenizer: within a tenth, where the longest is many times that."""
    run = run_of(tmp_path, "experiment=quickstart")
    before = {stage: counted.examples(run, stage)[1] for stage in ("sft", "ppo", "dpo")}
    assert not any(counted.at_their_longest(run, stage) for stage in before)
    assert run.config.data.max_new_tokens + 128 > 4 * before["dpo"]
    texts, tokenizer = list(reviews(1, 500)), build_tokenizer()
    pairs = [{"prompt": prompt, "completion": answer, "chosen": answer} for prompt, answer in texts]
    for place in (("data", "sft_train.parquet"), ("data", "prompts_train.parquet"), ("pairs", "train.parquet")):
        write_parquet(run.path(*place), pairs)
    lengths = [[len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in both] for both in texts]
    mean = {"ppo": sum(p for p, _ in lengths) / 500, "sft": sum(map(sum, lengths)) / 500}
    for stage in before:
        assert before[stage] == pytest.approx(mean["ppo" if stage == "ppo" else "sft"], rel=0.1)
        assert counted.examples(run, stage)[1] == pytest.approx(before[stage], rel=0.1)


def test_what_is_a_bound_says_so(hh, tmp_path):
    """Answers at their full length, and texts that nobody has read; nothing else. A time is an estimate, no bound."""
    speed = {"train": 1e-2, "forward": 1e-4, "decode": 1e-3, "device": "cpu", "parameters": 10**9, "layers": 2}
    speed |= {"start": 5.0, "step": 0.01, "characters": {}}
    hub = run_of(tmp_path / "hub", "experiment=hh", "model.path=x", "data.path=Anthropic/hh-rlhf", "dpo.max_steps=5")
    rows = {}
    for name, run in (("file", hh), ("hub", hub)):
        works = [work.work_of(run, stage) for stage in STAGES]
        seconds = {one.name: found for one in works if (found := one.seconds(speed)) is not None}
        text = beforehand.table(run, works, seconds, speed)
        rows[name] = {line.split()[0]: line.count("<= ") for line in text.splitlines()}
        assert ("at the longest" in text) == (name == "hub")
        assert "the times follow from that" in text
        assert "the times" not in beforehand.table(run, works, seconds, None)  # these were named
    assert (rows["file"]["ppo"], rows["file"]["compare"], rows["file"]["dpo"]) == (1, 1, 0)
    assert (rows["hub"]["ppo"], rows["hub"]["compare"], rows["hub"]["dpo"]) == (1, 1, 1)


def test_a_hub_set_is_not_known_before_it_is_read(tmp_path):
    run = run_of(tmp_path, "experiment=hh", "model.path=x", "data.path=Anthropic/hh-rlhf")
    assert not work.work_of(run, "dpo").known
    speed = {"train": 1e-2, "forward": 1e-4, "decode": 1e-3, "device": "cpu", "parameters": 10**9, "layers": 2}
    speed |= {"start": 5.0, "step": 0.01, "characters": {}}
    works = [work.work_of(run, name) for name in STAGES]
    seconds = {work.name: found for work in works if (found := work.seconds(speed)) is not None}
    text = beforehand.table(run, works, seconds, speed)
    assert "52,352" in text
    assert "reward_model, dpo once the data is read" in text
    assert "d in all, measured on cpu" in text  # days, and it says so
    assert "disk: about" in text


def test_a_run_that_says_how_long_it_takes_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(beforehand, "ask", lambda *_: pytest.fail("it measured"))
    run = run_of(tmp_path, "experiment=quickstart")
    text, seconds = beforehand.say_cost(run, STAGES, {})
    assert seconds["ppo"] == run.config.launch.expected_seconds.ppo
    assert "from launch.expected_seconds" in text
    assert work.work_of(run, "ppo,kl_coef=0.0").updates == 24


def test_named_seconds_follow_what_was_overridden(tmp_path):
    """A tenth of the updates takes about a tenth of the time; where nothing was changed, what the file says."""
    run = run_of(tmp_path, "experiment=quickstart")
    usual = beforehand.say_cost(run, STAGES, {})[1]
    assert usual == dict(run.config.launch.expected_seconds)
    few = run_of(tmp_path, "experiment=quickstart", "ppo.max_steps=2", "ppo.rollout_batch_size=16", "data.pairs=600")
    found = beforehand.say_cost(few, [*STAGES, "ppo,kl_coef=0.0"], {})[1]
    assert beforehand.STARTED <= found["ppo"] < usual["ppo"] / 2
    assert found["ppo,kl_coef=0.0"] == found["ppo"]
    assert found["dpo"] < usual["dpo"] / 2
    assert found["sft"] == usual["sft"]


def test_on_a_gpu_it_is_timed_as_a_stage_computes_there(monkeypatch):
    """bfloat16 by autocast on fp32 weights, activations computed again: half the time was said without them."""
    seen, plain = [], LlamaForCausalLM.forward

    def forward(self, *args, **kwargs):
        again = self.training and self.model.layers[0].gradient_checkpointing
        seen.append((torch.is_autocast_enabled("cpu"), self.lm_head.weight.dtype, again, torch.is_grad_enabled()))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cpu"))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    monkeypatch.setattr(devices, "has_bf16", lambda: True)
    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    architecture = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    measured.measure({"architecture": {**architecture, "num_hidden_layers": 2}}, time.time())
    assert {(half, dtype) for half, dtype, *_ in seen} == {(True, torch.float32)}
    assert {(again, grad) for *_, again, grad in seen} == {(True, True), (False, False)}


def test_speed_is_measured_once_and_doubles_with_the_layers(tmp_path, monkeypatch, forked):
    architecture = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 256, "vocab_size": 128}
    architecture |= {"num_attention_heads": 4, "num_hidden_layers": 8}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    plain = OmegaConf.to_container(load(["experiment=quickstart", "sft.lora={r: 2, target_modules: [q_proj]}"]))
    sections = {name: plain[name] for name in ("sft", "reward_model", "dpo", "ppo")}
    found = measured.ask({"architecture": architecture, "sections": sections}, environment)
    assert found["layers"] == 8
    assert found["train"] > found["forward"] > 0
    assert found["step"] > 0
    assert found["decode"] > 0
    assert 0 < found["start"] < 60  # seconds; forked, as here, libraries are there already
    assert found["characters"] == {}
    assert found["parameters"] == pytest.approx(2 * 128 * 64 + 8 * (4 * 64 * 64 + 3 * 64 * 256), rel=0.02)
    assert (
        measured.ask({"path": str(tmp_path / "gone")}, environment) is None
    )  # said as "known after the first update"
    # At least weights, gradients and moments; PPO has them twice, and adapters leave most of them out.
    peaks, whole = found["memory"], 16 * found["parameters"]
    assert peaks["reward_model"] > measured.LIBRARIES + 0.8 * whole
    assert peaks["ppo"] > measured.LIBRARIES + 1.8 * whole
    assert peaks["sft"] < peaks["dpo"] - 0.7 * whole
    asked = []
    monkeypatch.setattr(beforehand, "ask", lambda question, _: asked.append(question) or found)
    run = run_of(tmp_path, "experiment=quickstart", "launch.expected_seconds={}")
    assert beforehand.speed_of(run, {}) == beforehand.speed_of(run, {}) == found
    assert len(asked) == 1
    run.cache("speed.json").write_bytes(b"\xff")  # spoilt: measured again
    assert beforehand.speed_of(run, {}) == beforehand.speed_of(run, {}) == found
    assert len(asked) == 2
    # Texts for a tokenizer to read: once; that there are others of them, and more, measures nothing again.
    pairs = [{"prompt": "p" * 40, "chosen": "c" * 40, "rejected": "r" * 40}] * 3
    write_parquet(run.path("pairs", "train.parquet"), pairs)
    found["characters"] = {"text": 4.0, "template": 0}
    assert beforehand.speed_of(run, {}) == found
    assert (len(asked), asked[-1]["texts"][0]["prompt"]) == (3, "p" * 40)
    write_parquet(run.path("pairs", "train.parquet"), [{**row, "prompt": "q" * 80} for row in pairs])
    write_parquet(run.path("data", "prompts_train.parquet"), [{"prompt": "q" * 80}])
    assert beforehand.speed_of(run, {}) == found
    assert len(asked) == 3
    text = beforehand.table(run, [work.work_of(run, "ppo")], {"ppo": 60.0}, found)
    assert f"{peaks['ppo'] / 1e9:.1f} GB" in text
    assert "the peak of a stage's process" in text


def test_other_work_is_no_part_of_the_measurement(monkeypatch):
    """One thread on a CPU: seconds of the process's own clock, so that who else computes is not extrapolated."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    own = {"process_time": time.process_time, "time": time.time}
    monkeypatch.setattr(measured, "time", SimpleNamespace(**own, perf_counter=lambda: pytest.fail("the wall's clock")))
    architecture = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "vocab_size": 32}
    architecture |= {"num_attention_heads": 2, "num_hidden_layers": 3}
    found = measured.measure({"architecture": architecture}, 0.0)
    assert 0 < found["start"] <= time.process_time()  # not the 50 years since 1970
    assert found["train"] > 0
    # Several threads wait for each other: the wall's clock.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(measured, "time", SimpleNamespace(time=time.time, perf_counter=time.perf_counter))
    assert measured.measure({"architecture": architecture}, 0.0)["train"] > 0


@pytest.mark.parametrize(("load", "device", "says"), [(5.1, "cpu", True), (0.9, "cpu", False), (5.1, "cuda", False)])
def test_that_others_use_the_machine_is_said(tmp_path, monkeypatch, load, device, says):
    run = run_of(tmp_path, "experiment=quickstart")
    monkeypatch.setattr(beforehand.os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(beforehand.os, "cpu_count", lambda: 2)
    text = beforehand.table(run, [work.work_of(run, "ppo")], {"ppo": 60.0}, {"device": device, "parameters": 1e6})
    assert ("this machine has some now (load 5.1 on 2 cores)" in text) == says


DRAWING = ["compare.n_prompts=8", "compare.baseline_draws=3", "compare.pool_size=5", "compare.best_of_n=[2,4]",
           "compare.samples=2", "compare.other_temperatures=[0,0.7]", "compare.best_of={ppo: [3]}",
           "dpo.sweep={beta: [0.1]}", "ppo.sweep=null",
           "compare.max_new_tokens=10", "compare.batch_size=16"]  # fmt: skip


def test_what_compare_draws_is_what_its_stage_plans(tmp_path):
    """Two tables of one thing: the estimate's, from the configuration alone, and that of the stage's policies."""
    run = run_of(tmp_path, "experiment=quickstart", *DRAWING)
    plain = OmegaConf.to_container(run.config.compare, resolve=True)
    settings = CompareStage(**{key: plain[key] for key in plain if key in CompareStage.__dataclass_fields__})
    theirs = [("sft", "sft", False), ("ppo", "ppo", False), ("dpo", "dpo", False), ("dpo,beta=0.1", "dpo", False)]
    theirs += [("ppo,step=4", "ppo", True), ("ppo,step=12", "ppo", True), ("dpo,step=50", "dpo", True)]
    planned = []
    for name, method, checkpoint in theirs:
        policy = policies.Policy(name, method, model="m", checkpoint=checkpoint)
        plans = completions.plan(policy, settings)
        planned.append((sum(p.draws for p in plans), sum(p.draws for p in plans if p.measure), checkpoint))
    ours = [(sum(one.batches), one.read, one.checkpoint) for one in work.drawn(run.config)]
    assert sorted(ours) == sorted(planned)


def test_compare_reads_more_than_it_draws(tmp_path):
    """By hand: 8 prompts, 2 draws of the reference, 1 of each policy; no pool, one judge that is a model."""
    run = run_of(tmp_path, "experiment=quickstart", *DRAWING, "compare.baseline_draws=2", "compare.pool_size=0",
                 "compare.best_of_n=[]", "compare.best_of={}", "compare.samples=1", "compare.checkpoints={}",
                 "compare.other_temperatures=[]", "dpo.sweep=null")  # fmt: skip
    found, new = work.work_of(run, "compare"), 10
    prompt, pair = counted.examples(run, "ppo")[1], counted.examples(run, "dpo")[1]
    responses = 8 * (2 + 1 + 1)
    assert (found.responses, found.sampled) == (responses, responses * new)
    assert found.steps == 3 * new  # each policy's rows fit into one batch
    # KL: the reference's own by itself, the others' by policy and reference; once more each other's; the judge's.
    passes = 8 * (2 * 1 + 2 * 2 + 2) + responses
    pairs = 2 * work.MEASURED * 3 + 2 * work.CHECKED
    assert found.read == passes * (prompt + new) + pairs * pair + responses * prompt
    assert found.loads == 3 + 1 + 2


def test_stages_that_stand_beside_each_other_are_not_added_up(tmp_path, monkeypatch):
    """DPO (9 s) beside the reward model (4 s) and PPO (6 s), compare behind both."""
    monkeypatch.setattr(beforehand.os, "cpu_count", lambda: 8)
    seconds = {"data": 1.0, "sft": 1.0, "pairs": 1.0, "reward_model": 4.0, "dpo": 9.0, "ppo": 6.0, "compare": 5.0}
    run = run_of(tmp_path, "experiment=hh", "model.path=x")

    def needs(name):
        return needs_of(run.config, name)

    assert beforehand.at_once(seconds, needs, workers=2) == 3 + 10 + 5
    assert beforehand.at_once(seconds, needs, workers=1) == sum(seconds.values())
    # The time left is counted so, too: half-way through the reward model, DPO beside it.
    jobs = [Job(name, name, needs=needs(name)) for name in seconds]
    left = Overview(run, jobs, Console(file=io.StringIO()), estimates=seconds)
    monkeypatch.setattr(left, "rest_of", lambda job: {"reward_model": 2.0, "dpo": 5.0}[job.name])
    left.states |= dict.fromkeys(("data", "sft", "pairs"), "done") | dict.fromkeys(("reward_model", "dpo"), "running")
    assert left.left() == clock(2 + 6 + 5)


def test_what_processes_share_is_not_counted_twice(tmp_path, monkeypatch):
    """compare forks its drawing and scoring: by hand, for two processes that take parts of 4, 3 and 2 seconds."""
    speed = {"train": 1.0, "forward": 1.0, "decode": 1.0, "step": 1.0, "start": 1.0, "parameters": 0, "device": "cpu"}
    parts = [work.Work("compare", read=seconds) for seconds in (4.0, 3.0, 2.0)]
    whole = work.Work("compare", read=9.0 + 5.0, beside=parts)
    assert whole.seconds(speed) == 1 + 14
    whole.processes = 2
    assert whole.seconds(speed) == 1 + 5 + 4.5
    assert whole.seconds({**speed, "device": "cuda"}) == 1 + 14  # no GPU survives a fork
    parts[0].read = whole.read = 20.0  # the longest one is one process's
    whole.read += 5.0 + 5.0
    assert whole.seconds(speed) == 1 + 5 + 20
    monkeypatch.setattr(work.os, "cpu_count", lambda: 8)
    run = run_of(tmp_path, "experiment=quickstart", "launch.workers=2")
    found = work.work_of(run, "compare")
    drawn = len(list(work.drawn(run.config)))
    assert (found.processes, len(found.beside)) == (2, drawn + 2)
    assert sum(one.sampled for one in found.beside) == found.sampled > 0
    assert sum(one.read for one in found.beside) < found.read
    (tmp_path / "config.yaml").unlink()
    run = run_of(tmp_path, "experiment=quickstart", "launch.workers=2", "launch.threads=2")
    assert work.work_of(run, "compare").processes == 1  # OpenMP's threads survive none


def test_seconds_are_starts_loads_tokens_and_steps():
    speed = {"train": 1e-2, "forward": 1e-3, "decode": 1e-4, "step": 0.5, "start": 3.0, "parameters": work.LOADED / 4}
    assert work.Work("data").seconds(speed) == 3.0
    one = work.Work("ppo", 2, trained=100, read=1000, sampled=5000, steps=4, loads=2)
    assert one.seconds(speed) == pytest.approx(2 * 3.0 + 2 * 1.0 + 1.0 + 1.0 + 0.5 + 2.0)
    one.ranks, one.adapters = 2, True
    assert one.seconds(speed) == pytest.approx(6.0 + 2.0 + (2 / 3 + 1.0 + 0.5) / 2 + 2.0)


def test_tokens_of_the_models_own_tokenizer_count(tmp_path, monkeypatch):
    """A template's tokens stand in every prompt: short prompts of a chat model are mostly template."""
    save_chat_model(tmp_path / "model")
    texts = [{"prompt": [{"role": "user", "content": "What is 2 plus 2?"}], "chosen": "It is 4."}] * 3
    found = measured.characters_of_a_token({"path": str(tmp_path / "model"), "texts": texts})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer.apply_chat_template(texts[0]["prompt"], add_generation_prompt=True, return_dict=False)
    answer = len(tokenizer(texts[0]["chosen"])["input_ids"])
    typical = len("What is 2 plus 2?It is 4.") / found["text"] + found["template"]
    assert typical == pytest.approx(len(ids) + answer, abs=1)
    assert 0 < found["template"] < len(ids)
    assert measured.characters_of_a_token({"path": str(tmp_path / "model"), "texts": [{"prompt": 3}]}) == {}
    rows = [{"prompt": "p" * 40, "chosen": "c" * 40, "rejected": "r" * 40}] * 100
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = run_of(tmp_path, "experiment=try", "model.path=x", f"data.path={tmp_path}/pairs.jsonl",
                 "data.conversational=true")  # fmt: skip
    (text,) = counted.some_texts(run, 1)
    assert text["prompt"] == [{"role": "user", "content": "p" * 40}]
    assert text["chosen"] == [{"role": "assistant", "content": "c" * 40}]
    assert measured.characters_of_a_token({"path": str(tmp_path / "model"), "texts": [text]})["text"] > 0
    write_parquet(run.path("pairs", "train.parquet"), rows)
    assert counted.examples(run, "dpo", {"text": 8.0, "template": 7})[1] == 80 / 8 + 7


def test_a_finished_run_says_what_was_estimated_and_what_it_took(tmp_path, monkeypatch, capsys):
    run = run_of(tmp_path, "experiment=quickstart")
    run.begin("data", Made("f", {}))
    run.finish("data", "f", 75.0, {}, {"cpu_seconds": 31.4})
    run.begin("sft", Made("f", {}))
    run.finish("sft", "f", 3.0, {})
    speed = {
        "train": 1.0,
        "forward": 1.0,
        "decode": 1.0,
        "step": 1.0,
        "start": 7.0,
        "parameters": 1.0,
        "device": "cpu",
    }
    monkeypatch.setattr(afterwards, "speed_of", lambda *_: {**speed, "characters": {}})
    assert afterwards.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].split() == ["data", "7", "s", "75", "s", "31", "s"]
    stage, guess, _, *took = said[2].split()
    assert (stage, took) == ("sft", ["3", "s"])  # of a version that did not count
    assert float(guess.replace(",", "")) > 7
    assert not [line for line in said if line.startswith(("pairs", "ppo"))]  # no stage that has not finished


@pytest.mark.parametrize(("seconds", "text"), [(45, "45 s"), (600, "10 min"), (9000, "2.5 h"), (300_000, "3.5 d")])
def test_durations_are_spelled(seconds, text):
    assert beforehand.spell(seconds) == text
