"""What a GPU must show, on a machine without one: the stages run on a pretended device and are counted.

``python -m tests.device.work --record`` writes the counts anew. A change that worsens one by more than 5 % fails.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Not imported from tests.device.work: that would register the device in this process.
RECORD = Path(__file__).parent / "counts.json"
FAST = ("ppo bf16", "sft", "trl sft", "reward_model", "trl reward_model", "dpo", "trl dpo", "decode",
        "decode as a graph", "head", "checkpointing")  # fmt: skip
SLOW = ("ppo", "ppo lora", "ppo one base", "ppo engine")
WORSE = 1.05
# The plan's cases (`tests.device.planned`), and those that run with every change.
CASES = ("sft", "sft, checkpointing", "sft, lora, accumulation", "reward model", "reward model, lora, checkpointing",
         "dpo", "dpo, lora", "dpo, checkpointing, accumulation", "ppo", "ppo, checkpointing", "ppo, lora",
         "ppo, one base", "ppo, one base, checkpointing")  # fmt: skip
PLANNED = ("sft, checkpointing", "dpo, lora", "ppo, one base")


def work(*jobs: str, module: str = "work", mark: str = "COUNTS") -> dict:
    """The counts of some jobs, in a process of its own: a device is registered for good."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", f"tests.device.{module}", *jobs], cwd=ROOT, env=environment, capture_output=True,
        text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition(f"{mark} ")[2])


@pytest.fixture(scope="module")
def counted():
    return work(*FAST)


def worse(now: dict, then: dict, path: str = "") -> list[str]:
    """Counts that grew by more than 5 %."""
    found = []
    for name, value in now.items():
        if name == "products":
            continue
        if isinstance(value, dict):
            found += worse(value, then[name], f"{path}{name}: ")
        elif value > WORSE * then[name] + 1e-9:
            found.append(f"{path}{name} was {then[name]:g} and is {value:g}")
    return found


def test_nothing_has_worsened(counted):
    """Nothing mixes host and device (each job ends at the first that does), and no count has grown."""
    assert counted.keys() == set(FAST)
    assert worse(counted, json.loads(RECORD.read_text(encoding="utf-8"))) == []


@pytest.mark.slow
def test_nothing_has_worsened_with_adapters_one_base_and_other_engines():
    assert worse(work(*SLOW), json.loads(RECORD.read_text(encoding="utf-8"))) == []


def test_an_update_hardly_waits(counted):
    ppo = counted["ppo bf16"]
    assert ppo["train, a micro-batch"]["waits"] <= 4
    # Three rollouts of two batches.
    assert ppo["forward"]["waits"] / 6 <= 4


def test_decoding_waits_once_in_eight_tokens_whatever_the_layers(counted):
    two, eight = (counted["decode"][f"{layers} layers, a token"] for layers in (2, 8))
    assert two["waits"] <= 1 / 8
    assert eight["waits"] <= 1 / 8
    assert eight["operations"] < 4 * two["operations"]


def test_a_step_as_a_graph_is_one_launch(counted):
    """A capture neither waits nor uploads (`work.Launched`); launches hardly grow with layers: a few steps are not
    repeated, before a capture and where rows leave."""
    plain, graph = (counted[job]["8 layers, a token"] for job in ("decode", "decode as a graph"))
    assert graph["waits"] <= 1 / 8
    assert graph["operations"] < plain["operations"] / 3


def test_less_than_trls_ppo():
    """One update beside TRL 1.12's, as recorded by ``python -m tests.device.beside_trl --record``."""
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    ours, theirs = (recorded[f"ppo update, {side}"] for side in ("ours", "trl"))
    for figure in ("waits", "uploads", "operations", "largest", "peak"):
        assert ours[figure] < theirs[figure], figure


@pytest.mark.slow
def test_an_update_has_not_worsened():
    """Ours as in that record; TRL 1.12 itself is not installed here."""
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))["ppo update, ours"]
    assert worse(work("--side", "ours", module="beside_trl", mark="BESIDE"), recorded) == []


@pytest.mark.parametrize("what", ["train", "score", "exact kl"])
def test_no_tensor_of_all_tokens_and_the_vocabulary(counted, what):
    head = counted["head"][what]
    assert head["rows of logits"] <= 2048
    assert head["bytes a token and entry"] < 1


def test_checkpointing_keeps_a_third_at_most(counted):
    assert counted["checkpointing"]["with"] < counted["checkpointing"]["without"] / 3


def test_products_are_in_half_precision(counted):
    """But for scalar heads, and attention while decoding, which this device computes by its definition."""
    ppo = counted["ppo bf16"]
    for phase in ("score", "forward", "train"):
        products = ppo[phase]["products"]
        assert products.get("float32", 0) <= 0.04 * products["bfloat16"], phase


@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo"])
def test_less_than_trl(counted, stage):
    """Beside TRL's own trainers, on the same rows in the same process."""
    ours, theirs = counted[stage]["train"], counted[f"trl {stage}"]["train"]
    assert ours["waits"] < theirs["waits"]
    assert ours["operations"] < theirs["operations"]
    # SFT's and DPO's is a piece of logits, of TRL's head in both.
    assert ours["largest"] <= theirs["largest"]
    assert ours["peak"] < theirs["peak"]


def off_by(*names: str) -> dict[str, float]:
    """Of some stages: how far `plan`'s peak is from the counted one, as a share of that."""
    found = work(*names, module="planned", mark="PLANNED")
    assert set(found) == set(names)
    return {name: one["planned"] / one["counted"] - 1 for name, one in found.items()}


def test_the_plan_is_within_a_tenth_of_what_is_counted():
    """`plan` says what the device holds at its peak: whole models, LoRA, one base; checkpointing; accumulation."""
    assert {name: share for name, share in off_by(*PLANNED).items() if abs(share) > 0.1} == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in PLANNED])
def test_so_it_is_for_each_of_the_others(name):
    assert abs(off_by(name)[name]) <= 0.1
