"""PPO sharded by DeepSpeed, on real gloo processes: one process's trajectory, shards of 1/N, exact resumption.

Responses are of uneven length and ``stage3_param_persistence_threshold`` is 0: small models hide no fault.
"""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.sharding.deepspeed import no_cpu_adam
from ppo_vs_dpo.pipeline.planning.memory import Sharding, held
from tests.ppo.conftest import count_good
from tests.ranks import on_ranks, settings_of

SETTINGS = {
    "max_steps": 4,
    "num_mini_batches": 2,
    "num_ppo_epochs": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "per_device_train_batch_size": 3,  # uneven micro-batches, so gradients accumulate
    "local_rollout_forward_batch_size": 3,
    "learning_rate": 3e-3,
    "value_learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "response_length": 8,
    "score_bias": "auto",  # found on all ranks, and put into the value model's head after it has been sharded
    "score_bias_samples": 7,
}
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
# Whether a role is trained.
ROLES = {"policy": True, "value": True, "reference": False, "reward": False}
LOSSES = ("loss/policy_avg", "loss/value_avg", "policy/approxkl_avg")
# Sums over a response, over all gradients.
SUMS = ("objective/kl", "loss/grad_norm")
FIGURES = (*LOSSES, *SUMS)


def history(folder: Path, step: int) -> list[dict]:
    rows = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]
    return [row for row in rows if "objective/kl" in row]


@pytest.fixture
def train(make_trainer, prompts, tiny_reward, tmp_path):
    """``train(name, deepspeed=None, **settings)``: run a trainer to its end in ``tmp_path/name``."""

    def run(
        name: str,
        deepspeed: str | dict | None = None,
        resume: bool = False,
        settings: dict | None = None,
        more: dict | None = None,
    ) -> dict:
        parts = {"eval_dataset": prompts.select(range(5)), "reward_model": tiny_reward(1), **(more or {})}
        sharding = settings_of(deepspeed) if isinstance(deepspeed, str) else deepspeed
        settings = {**SETTINGS, **(settings or {}), "deepspeed": sharding}
        trainer = make_trainer(parts, output_dir=str(tmp_path / name), **settings)
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer.roles.held_bytes()

    return run


def agree(one: list[dict], other: list[dict], updates: int) -> None:
    """Losses at most 1e-4 apart in any update, and an order less on average; sums five times that."""
    assert len(one) == len(other) == updates
    for name in FIGURES:
        mine, theirs = (torch.tensor([row[name] for row in rows]) for rows in (one, other))
        residual, scale = (mine - theirs).abs(), 1 if name in LOSSES else 5
        print(f"{name} (up to {mine.abs().max():.2g}): max {residual.max():.1e}, mean {residual.mean():.1e}")
        assert residual.max() <= 1e-4 * scale, (name, residual)
        assert residual.mean() <= 1e-5 * scale, (name, residual)


def reductions(train, name: str, at_once: bool, tmp_path) -> tuple[list[dict], int]:
    """A run's figures, and how often gradients went over."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Zero3

    count, reduce = [], Zero3.reduce_independent_p_g_buckets_and_remove_grads

    def counted(self, param):
        count.append(1)
        return reduce(self, param)

    Zero3.reduce_independent_p_g_buckets_and_remove_grads = counted
    try:
        train(name, "zero3", settings={"max_steps": 2, "save_steps": 2, "coalesce_grad_reduction": at_once})
    finally:
        Zero3.reduce_independent_p_g_buckets_and_remove_grads = reduce
    return history(tmp_path / name, 2), len(count)


def test_without_deepspeed_there_is_nothing_to_coalesce(make_trainer):
    with pytest.raises(UserError, match=r"coalesce_grad_reduction is of DeepSpeed"):
        make_trainer(coalesce_grad_reduction=True)


@pytest.mark.slow
def test_gradients_of_a_step_in_one_reduction(train, tmp_path):
    """The same run, and each gradient goes over once a step, not once a micro-batch."""
    (each, many), _ = on_ranks(2, reductions, train, "each", False, tmp_path)
    (once, few), _ = on_ranks(2, reductions, train, "once", True, tmp_path)
    agree(each, once, 2)
    # Several micro-batches of up to three rows for each rank's share of a minibatch.
    assert many > few > 0
    assert many % few == 0


@pytest.mark.parametrize("deepspeed", ["zero3", slow("zero2"), slow("zero2_offload"), slow("zero3_offload")])
def test_two_ranks_give_the_run_of_one(train, tmp_path, deepspeed):
    """One process's trajectory, half of every role's weights on each rank, a model that loads by itself.

    Under ZeRO-3 with a budget of tokens, which cuts each rank's rows otherwise: all make the same number of passes.
    """
    (alone,) = on_ranks(1, train, "one")
    settings = {"micro_batch_tokens": 40} if deepspeed == "zero3" else {}
    shares = on_ranks(2, train, "two", deepspeed, False, settings)
    agree(history(tmp_path / "one", 4), history(tmp_path / "two", 4), 4)
    for share in shares:
        for role in ROLES:
            expected = alone[role] / (2 if "zero3" in deepspeed else 1)
            # A tensor of odd size is rounded up on each rank.
            assert expected <= share[role] <= expected + 4 * 40, role
        # The plan's formulas, against what is there.
        zero = settings_of(deepspeed)["zero_optimization"]
        sharding = Sharding(2, stage=zero["stage"], half=False)
        parts = [held(role, alone[role] // 4, alone[role] // 4 * trained, sharding) for role, trained in ROLES.items()]
        for part in parts:
            assert part.weights == pytest.approx(share[part.role], rel=0.1), part.role
        assert sum(part.optimizer for part in parts) == pytest.approx(share["master"] + share["optimizer"], rel=0.1)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "checkpoint-4") for name in ("one", "two")]
    for mine, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "two" / "checkpoint-4").eos_token == "</s>"


def with_cpu_adam(train, name: str, deepspeed: str, resume: bool) -> int:
    """A run whose offloaded optimizer is DeepSpeed's; how often that one stepped."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    steps, step = [], DeepSpeedCPUAdam.step

    def counted(self, *args, **kwargs):
        steps.append(1)
        return step(self, *args, **kwargs)

    DeepSpeedCPUAdam.step = counted
    train(name, settings_of(deepspeed) | {"zero_force_ds_cpu_optimizer": True}, resume)
    return len(steps)


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", ["zero2_offload", "zero3_offload"])
def test_deepspeeds_cpu_adam(train, tmp_path, deepspeed):
    """Where it compiles: the run of torch's AdamW up to rounding, and to the last bit its own once interrupted."""
    if why := no_cpu_adam():
        pytest.skip(why)
    on_ranks(1, train, "one")
    assert min(on_ranks(2, with_cpu_adam, train, "two", deepspeed, False)) > 0
    agree(history(tmp_path / "one", 4), history(tmp_path / "two", 4), 4)
    shutil.copytree(tmp_path / "two", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-4")
    assert min(on_ranks(2, with_cpu_adam, train, "again", deepspeed, True)) > 0
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "checkpoint-4") for name in ("two", "again")]
    for mine, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tied", "resized", "tied, adapters", "biases", "pissa"])
def test_kinds_of_policies_under_zero3(train, tiny_llama, tmp_path, kind):
    """Tied embeddings, an enlarged vocabulary, adapters: the reference is the model given, in pieces as whole."""
    policy = tiny_llama(0, initializer_range=0.2, tie_word_embeddings="tied" in kind, attention_bias=kind == "biases")
    if kind == "resized":
        policy.resize_token_embeddings(27, mean_resizing=False)
    more = {"model": policy}
    if kind == "resized":
        more |= {"reward_model": None, "reward_funcs": count_good}  # the reward model has 20 tokens
    if kind in ("tied, adapters", "biases", "pissa"):
        settings = {"bias": "all"} if kind == "biases" else {"init_lora_weights": "pissa"} if kind == "pissa" else {}
        more["peft_config"] = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **settings)
    on_ranks(1, train, "one", None, False, {}, more)
    on_ranks(2, train, "two", "zero3", False, {}, more)
    one, two = (history(tmp_path / name, 4) for name in ("one", "two"))
    assert abs(two[0]["objective/kl"]) < 1e-4 < abs(two[-1]["objective/kl"])
    agree(one, two, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "deepspeed"), [(2, None), (4, None), (2, "zero2"), (4, "zero2"), (2, "zero3"), (4, "zero3")]
)
def test_twenty_updates_on_any_number_of_ranks(train, tmp_path, ranks, deepspeed):
    """Data order, sampling, whitening, losses: twenty updates do not know how many ranks made them."""
    # Rates at which it learns for twenty updates without the chaos that amplifies rounding.
    settings = {"max_steps": 20, "save_steps": 20, "eval_strategy": "no"}
    settings |= {"learning_rate": 1e-3, "value_learning_rate": 3e-3}
    # As many rows on each rank at once as there are: gradients accumulate on one rank and not on four.
    on_ranks(1, train, "one", None, False, settings)
    on_ranks(ranks, train, "many", deepspeed, False, settings)
    agree(history(tmp_path / "one", 20), history(tmp_path / "many", 20), 20)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "deepspeed"), [(2, "zero2"), (2, "zero3"), (4, "zero3")])
@pytest.mark.parametrize("method", ["rloo", "grpo", "reinforce_pp", "dpo"])
def test_without_a_value_model(train, tmp_path, method, ranks, deepspeed):
    """Groups over ranks and shards: one process's trajectory, and no bytes of a value model on any rank."""
    settings = {"samples_per_prompt": 4, "rollout_batch_size": 32, "score_bias": 0.0}
    settings |= {"advantage": method} if method != "dpo" else {"loss": "dpo"}
    on_ranks(1, train, "one", None, False, settings)
    for share in on_ranks(ranks, train, "many", deepspeed, False, settings):
        assert share.keys() == {"policy", "reference", "reward", "master", "optimizer"}
    one, many = history(tmp_path / "one", 4), history(tmp_path / "many", 4)
    for name in ("loss/policy_avg", "policy/approxkl_avg", "objective/kl", "objective/scores"):
        assert [row[name] for row in many] == pytest.approx([row[name] for row in one], abs=5e-4), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, "zero3"), (1, "zero3")),
        ((2, "zero3"), (4, "zero2")),
        ((2, "zero2"), (4, "zero3")),
        ((2, "zero2"), (1, "zero2")),
    ],
)
def test_going_on_with_another_number_of_ranks(train, tmp_path, before, after):
    """A state written on two ranks goes on with one or four, under the other stage too: the same trajectory."""
    on_ranks(before[0], train, "whole", before[1])
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "on" / "checkpoint-2")
    on_ranks(after[0], train, "on", after[1], True)
    agree(history(tmp_path / "whole", 4), history(tmp_path / "on", 4), 4)


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", ["zero2", "zero3"])
@pytest.mark.parametrize("settings", [{}, {"bf16": True, "sync_ref_model": True}], ids=["fp32", "bf16"])
def test_resuming_on_the_same_ranks_is_exact(train, tmp_path, deepspeed, settings):
    on_ranks(2, train, "whole", deepspeed, False, settings)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    on_ranks(2, train, "again", deepspeed, True, settings)
    ends = [tmp_path / name / "checkpoint-4" for name in ("whole", "again")]
    assert weights_of(ends[0]) == weights_of(ends[1])
    for rank in (0, 1):
        states = [(end / f"trained-{rank}.safetensors").read_bytes() for end in ends]
        assert states[0] == states[1]
    whole, again = history(tmp_path / "whole", 4), history(tmp_path / "again", 4)
    for mine, theirs in zip(whole, again, strict=True):
        assert {k: v for k, v in mine.items() if not k.startswith("time/")} == {
            k: v for k, v in theirs.items() if not k.startswith("time/")
        }
