"""The plan against published sizes and figures, a counter of FLOPs, and peft's own count."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from ppo_vs_dpo.pipeline.cli import dispatch
from ppo_vs_dpo.pipeline.composing import compose
from ppo_vs_dpo.pipeline.planning import memory
from ppo_vs_dpo.pipeline.planning.advice import changed, fitting
from ppo_vs_dpo.pipeline.planning.estimate import estimate, frozen_role
from ppo_vs_dpo.pipeline.planning.memory import GB, GPUS, Shape, Sharding
from ppo_vs_dpo.pipeline.planning.plan import frozen_line, job_of
from ppo_vs_dpo.pipeline.planning.scaling import MODELS, job, markdown, rows, shape_of, write_table
from ppo_vs_dpo.ppo.config import PPOConfig

# As their model cards state them (total parameters).
PUBLISHED = {
    "Pythia-1B": 1_011_781_632,
    "Pythia-2.8B": 2_775_208_960,
    "Pythia-6.9B": 6_857_302_016,
    "Llama-3-8B": 8_030_261_248,
    "Llama-3-70B": 70_553_706_496,
}
TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize("name", MODELS)
def test_sizes_of_known_models(name):
    assert shape_of(name).parameters == PUBLISHED[name]


def test_states_by_stage_are_those_of_the_zero_paper():
    """Figure 1: 7.5 B parameters on 64 GPUs: 120, 31.4, 16.6 and 1.9 GB."""
    expected = {0: 120.0, 1: 31.4, 2: 16.6, 3: 1.9}
    for stage, size in expected.items():
        part = memory.held("model", 7_500_000_000, 7_500_000_000, Sharding(64, stage=stage))
        assert part.gpu / GB == pytest.approx(size, abs=0.05)


def test_key_value_cache_of_llama_3():
    """2 x 32 layers x 8 heads x 128 x 2 bytes = 128 KiB a token."""
    assert memory.cache_bytes(shape_of("Llama-3-8B"), rows=3, length=5) == 15 * 128 * 1024


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_flops_are_those_that_torch_counts(model_type):
    config = AutoConfig.for_model(model_type, **TINY, tie_word_embeddings=False)
    shape, rows_, length = Shape.of(config), 4, 24
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        with FlopCounterMode(display=False) as counter:
            model(input_ids=torch.zeros(rows_, length, dtype=torch.long))
    # The counter takes all scores of a row; a causal pass needs half of them.
    expected = memory.forward_flops(shape, rows_, length, rows_ * length)
    expected += memory.attention_flops(shape, rows_, length)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6)


def test_adapters_are_those_that_peft_makes():
    from peft import LoraConfig, get_peft_model

    config = AutoConfig.for_model("llama", **TINY)
    model = get_peft_model(
        AutoModelForCausalLM.from_config(config), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    assert Shape.of(config).adapters(4, ["q_proj", "v_proj"]) == model.get_nb_trainable_parameters()[0]


def test_what_it_advises_makes_it_fit():
    gpu, shape = GPUS["a100-80gb"], shape_of("Pythia-6.9B")
    work, sharding = job("ppo"), Sharding(8, stage=None)
    assert estimate(shape, work, sharding, gpu).peak > gpu.usable
    taken = fitting(shape, work, sharding, gpu)
    assert any(change.text.startswith("deepspeed=zero") for change in taken)
    assert estimate(shape, *changed(work, sharding, taken), gpu).peak <= gpu.usable
    for change in taken:
        without = [other for other in taken if other is not change]
        assert estimate(shape, *changed(work, sharding, without), gpu).peak > gpu.usable, change.text


def test_70b_trains_beside_a_server():
    """With the weights streamed to a server nothing is whole on a trainer's GPU, and 64 of 80 GB are enough."""
    shape, sharding, gpu = shape_of("Llama-3-70B"), Sharding(64, stage=3, sums=4), GPUS["a100-80gb"]
    own, served = (dataclasses.replace(job("ppo"), server=server) for server in (False, True))
    assert estimate(shape, own, sharding, gpu).phases["generate"]["gathered weights"] == 2 * shape.parameters
    assert estimate(shape, own, sharding, gpu).peak > gpu.usable
    plan = estimate(shape, served, sharding, gpu)
    # One bucket, and vLLM's two messages.
    assert sum(plan.phases["generate"].values()) == plan.phases["generate"]["gathered weights"] == 1.5e9
    assert plan.peak < gpu.usable
    assert [change.text for change in fitting(shape, own, sharding, gpu)] == [
        "ppo.generation_engine=vllm ppo.vllm_mode=server"
    ]


def test_frozen_roles_by_zero3_beside_tensor_parallelism():
    """70B on 64 GPUs, 8 responses a rank: weights come in once, 141 GB less this rank's; the hidden states of eight
    ranks' rows are added up twice in each of 80 layers, and eight times as much of the model is held."""
    shape, work = shape_of("Llama-3-70B"), job("ppo")
    found = frozen_role(shape, work, Sharding(64, stage=3))
    assert (found.tokens, found.group) == (8 * 565, 8)
    assert found.zero3 == pytest.approx((2 * 70.55e9 / 64, 2 * 70.55e9 * 63 / 64), rel=1e-3)
    assert found.parallel == pytest.approx((2 * 70.55e9 / 8, 80 * 2 * 2 * (8 * 4520 * 8192 * 2) * 7 / 8), rel=1e-3)
    # Few tokens a pass: then activations are less than weights.
    few = frozen_role(shape, dataclasses.replace(work, forward_rows=1), Sharding(64, stage=3))
    assert few.parallel[1] < few.zero3[1] < found.parallel[1]
    assert "take 7 rows a pass or more (ppo.local_rollout_forward_batch_size" in frozen_line(few)
    enough, short = (
        frozen_role(shape, dataclasses.replace(work, forward_rows=rows), Sharding(64, stage=3)) for rows in (7, 6)
    )
    assert enough.zero3[1] < enough.parallel[1]
    assert short.zero3[1] > short.parallel[1]
    assert frozen_line(found) == (
        "  a frozen role, by ZeRO-3: 2.20 held, 139 got for a pass of 4,520 tokens; tensor parallel over 8 it would "
        "be 17.64 and 166"
    )


def test_what_comes_and_goes_is_counted():
    """Buckets, gradients that add up in fp32, pieces of logits, and as many rows as there is memory for."""
    shape, gpu = shape_of("Llama-3-8B"), GPUS["h200-141gb"]
    # Gradients of one pass lie in DDP's buckets, of several they add up beside them.
    assert memory.message_bytes(shape.parameters, Sharding(8, stage=None), passes=1) == 0
    assert memory.message_bytes(shape.parameters, Sharding(8, stage=None), passes=4) == 4 * shape.parameters
    assert memory.message_bytes(shape.parameters, Sharding(1, stage=None), passes=4) == 0
    assert memory.message_bytes(shape.parameters, Sharding(8, stage=3)) == 2 * 2 * 50_000_000
    assert memory.held("model", 800, 800, Sharding(8, stage=2, sums=4)).gradients == 400
    # 1,024 rows of logits, in bfloat16 twice and in fp32; of more only the head's gradient in fp32 is added.
    piece = 1024 * shape.vocabulary * 8
    assert memory.logits_bytes(shape, 1024) == piece
    assert memory.logits_bytes(shape, 100_000) == piece + 4 * shape.vocabulary * shape.hidden
    long = dataclasses.replace(job("ppo"), response=4096)
    plan = estimate(shape, long, Sharding(8, stage=3, sums=4), gpu)
    assert plan.phases["generate"]["KV cache"] < memory.cache_bytes(shape, 64, 512 + 4096)
    assert plan.held + sum(plan.phases["generate"].values()) <= gpu.usable


def test_a_base_in_4_bits_is_counted_at_that_width():
    """4 bits and a scale of 8 for each 64 weights, and of these one of 32 for each 256: 4.127 bits a linear weight."""
    work = dataclasses.replace(job("dpo"), adapters=(16, ("q_proj", "v_proj")), quantized=True)
    shape = shape_of("Llama-3-8B")
    adapter = shape.adapters(16, ["q_proj", "v_proj"])
    (part,) = estimate(shape, work, Sharding(1), GPUS["a100-80gb"]).parts
    rest = shape.parameters - shape.multiplied + adapter
    assert part.weights == pytest.approx(shape.multiplied * 4.126953125 / 8 + 4 * rest, rel=1e-9)
    on_base = dataclasses.replace(
        job("ppo"), adapters=(16, ("q_proj", "v_proj")), reference=False, shared=True, quantized=True
    )
    base = estimate(shape, on_base, Sharding(1), GPUS["a100-80gb"]).parts[0]
    # PPO's base has its head in 16-bit; so is all that is linear where nothing is in 4 bits.
    head = shape.vocabulary * shape.hidden
    assert base.weights == pytest.approx(part.weights - 4 * adapter - 2 * head, rel=1e-9)
    plain = estimate(shape, dataclasses.replace(on_base, quantized=False), Sharding(1), GPUS["a100-80gb"])
    assert plain.parts[0].weights == 4 * shape.parameters - 2 * (shape.multiplied + head)
    assert plain.phases["generate"]["casts"] == 0
    config = compose.load(["experiment=quickstart", "dpo.lora={r: 16, load_in_4bit: true}"])
    assert job_of(config, "dpo", 1, 512, AutoConfig.for_model("llama", **TINY)).quantized


def test_vllm_beside_the_trainer_takes_its_share_while_it_samples():
    work = dataclasses.replace(job("ppo"), colocated=0.3)
    plan = estimate(shape_of("Llama-3-8B"), work, Sharding(8, stage=3, sums=4), GPUS["h100-80gb"])
    assert plan.phases["generate"]["vLLM"] == 0.3 * 80e9
    assert plan.phases["generate"]["gathered weights"] == 1e9
    assert "vLLM" not in plan.phases["update"]


def test_one_base_is_planned_once():
    work = dataclasses.replace(job("ppo"), adapters=(16, ("q_proj", "v_proj")), reference=False, shared=True)
    shape = shape_of("Llama-3-8B")
    parts = {part.role: part for part in estimate(shape, work, Sharding(1, stage=2), GPUS["a100-80gb"]).parts}
    assert parts["base"].gpu == 2 * shape.parameters
    adapter = shape.adapters(16, ["q_proj", "v_proj"])
    assert parts["policy"].gpu == (2 + 2 + 12) * adapter
    assert parts["reward"].gpu == 2 * (adapter + shape.hidden)
    assert "reference" not in parts


def test_without_a_value_model_none_is_planned():
    """Neither its weights nor its states, nor its part of the arithmetic; on one base neither."""
    shape, sharding, gpu = shape_of("Llama-3-8B"), Sharding(8, stage=3), GPUS["h100-80gb"]
    whole = estimate(shape, job("ppo"), sharding, gpu)
    without = estimate(shape, dataclasses.replace(job("ppo"), critic=False), sharding, gpu)
    value = next(part for part in whole.parts if part.role == "value")
    assert [part.role for part in without.parts] == ["policy", "reference", "reward"]
    assert whole.held - without.held == pytest.approx(value.gpu)
    scalar = memory.forward_flops(shape, job("ppo").updates_rows, job("ppo").length)
    assert whole.flops["forward"] - without.flops["forward"] == pytest.approx(scalar)
    assert whole.phases["update"]["activations"] == 2 * without.phases["update"]["activations"]
    one_base = {"adapters": (16, ("q_proj",)), "reference": False, "shared": True, "critic": False}
    parts = estimate(shape, dataclasses.replace(job("ppo"), **one_base), sharding, gpu).parts
    assert [part.role for part in parts] == ["base", "policy", "reward"]


@pytest.mark.parametrize("setting", ["advantage=rloo", "advantage=grpo", "advantage=reinforce_pp", "advantage=gae"])
def test_the_command_knows_who_trains_values(setting, capsys):
    """As `PPOConfig.has_critic` says, which the planner cannot import."""
    assert dispatch(["plan", "experiment=quickstart", f"ppo.{setting}", "ppo.samples_per_prompt=4"]) == 0
    has_values = PPOConfig(report_to="none", samples_per_prompt=4, **dict([setting.split("=")])).has_critic
    text = capsys.readouterr().out
    assert ("value" in text[text.index("ppo:") :]) == has_values


def test_the_command(capsys):
    # Options between settings.
    assert dispatch(["plan", "experiment=quickstart", "--gpus", "1", "seed=2"]) == 0
    said = capsys.readouterr().out
    for stage in ("sft", "reward_model", "dpo", "ppo"):
        assert f"\n{stage}: " in said
    for role in ("policy", "value", "reference", "reward"):
        assert f"\n  {role} " in said
    assert "fits" in said


def test_a_model_too_large_is_told_what_to_change(capsys):
    big = ["hidden_size=8192", "num_hidden_layers=16", "intermediate_size=28672", "num_attention_heads=64"]
    code = dispatch(["plan", "experiment=quickstart", *(f"model.architecture.{key}" for key in big)])
    said = capsys.readouterr().out
    assert code == 1
    assert "DOES NOT FIT" in said
    assert "  -> " in said


def test_the_table_in_the_docs_is_the_one_it_writes(tmp_path):
    from pathlib import Path

    docs = Path(__file__).parents[3] / "docs" / "scaling.md"
    copy = tmp_path / "scaling.md"
    copy.write_text(docs.read_text())
    write_table(copy)
    assert copy.read_text() == docs.read_text()
    assert markdown(rows()) in docs.read_text()
