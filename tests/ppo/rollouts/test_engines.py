"""Generation engines: the interface, the correction of another engine's rounding, and what is refused."""

import copy
import math
import sys

import pytest
import torch
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.passes.logprobs import pad_batch, response_logprobs
from ppo_vs_dpo.models.sampling.engine import TransformersEngine
from ppo_vs_dpo.models.sampling.generation import SamplingConfig
from ppo_vs_dpo.models.sampling.vllm.colocated import VLLMEngine
from ppo_vs_dpo.models.sampling.weights import named_weights
from ppo_vs_dpo.ppo.algorithm import importance_weights, policy_loss
from ppo_vs_dpo.ppo.config import PPOConfig
from ppo_vs_dpo.ppo.rollouts import collect
from ppo_vs_dpo.ppo.rollouts.engines import check_whole, engine_dtype
from ppo_vs_dpo.ppo.rollouts.rollout import Rollout
from ppo_vs_dpo.ppo.watching.metrics import engine_metrics
from tests.ppo.conftest import GAPS, T, logs, same, untimed


class FakeEngine:
    """The own loop's tokens, and log-probabilities that are off by a known amount a token: ``shifts``, over again."""

    keeps_weights = True

    def __init__(self, trainer, shifts):
        self.inner = TransformersEngine(trainer.roles.eos_ids, trainer.processing_class)
        self.shifts, self.model, self.updates = shifts, None, 0

    def update_weights(self, model):
        self.model, self.updates = copy.deepcopy(model), self.updates + 1
        self.inner.update_weights(self.model)

    def generate(self, prompt_ids, sampling, seeds):
        drawn = self.inner.generate(prompt_ids, sampling, seeds)
        for prompt, one in zip(prompt_ids, drawn, strict=True):
            exact = response_logprobs(self.model, pad_batch([prompt], [one.token_ids], 0), sampling.temperature)[0]
            one.logprobs = [
                value - self.shifts[place % len(self.shifts)] for place, value in enumerate(exact[0].tolist())
            ]
        return drawn


def test_weights_by_hand():
    old = torch.log(torch.tensor([[0.5, 0.2, 0.3, 0.1]], dtype=torch.float64))
    engine = torch.log(torch.tensor([[0.5, 0.4, 0.1, 0.1]], dtype=torch.float64))
    engine[0, 3] = float("nan")
    mask = torch.tensor([[True, True, True, False]])
    expected = torch.tensor([[1.0, 0.5, 2.0, 1.0]], dtype=torch.float64)  # 0.3 / 0.1 = 3 is cut
    torch.testing.assert_close(
        importance_weights(old, engine, mask, 2.0, "token_truncate"), expected, atol=1e-12, rtol=0
    )
    uncut = importance_weights(old, engine, mask, 10.0, "token_truncate")
    assert uncut[0, 2].item() == pytest.approx(3, abs=1e-12)
    assert torch.equal(importance_weights(old, engine, mask, None, "token_truncate"), torch.ones_like(old))
    assert torch.equal(importance_weights(old, old, mask, 2.0, "sequence_mask"), torch.ones_like(old))


def test_weights_of_responses_and_what_is_left_out():
    """Ratios 2, 1/2 and 3 of tokens are 3 of the response; above the cap cut to it, or left out."""
    engine = torch.log(torch.tensor([[0.2, 0.4, 0.1, 0.9], [0.3, 0.3, 0.3, 0.3]], dtype=torch.float64))
    old = torch.log(torch.tensor([[0.4, 0.2, 0.3, 0.1], [0.3, 0.3, 0.3, 0.3]], dtype=torch.float64))
    mask = torch.tensor([[True, True, True, False], [True] * 4])

    def weights(kind, cap):
        return importance_weights(old, engine, mask, cap, kind)[0].tolist()

    assert weights("token_mask", 2.5) == pytest.approx([2, 0.5, 0, 1])
    assert weights("sequence_truncate", 10.0) == pytest.approx([3] * 4)
    assert weights("sequence_truncate", 2.5) == pytest.approx([2.5] * 4)
    assert weights("sequence_mask", 2.5) == [0] * 4
    assert (importance_weights(old, engine, mask, 2.5, "sequence_mask")[1] == 1).all()


@pytest.mark.parametrize("k", [1, 2])
def test_weights_of_responses_are_unbiased(k):
    """Summed over all responses of ``k`` tokens: E_engine[w r] = E_trainer[r]; with tokens' weights not for k = 2."""
    trainer, engine = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.2, 0.5, 0.3]).double()
    responses = torch.cartesian_prod(*[torch.arange(3)] * k).view(-1, k)
    reward = torch.randn(len(responses), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, q = trainer[responses], engine[responses]
    exact = (p.prod(1) * reward).sum()
    found = {}
    for kind in ("token_truncate", "sequence_truncate"):
        weights = importance_weights(p.log(), q.log(), torch.ones_like(p), 1e9, kind)
        found[kind] = (q.prod(1) * weights[:, 0] * reward).sum()
    assert abs(found["sequence_truncate"] - exact) < 1e-12
    assert (abs(found["token_truncate"] - exact) < 1e-12) == (k == 1)


def test_the_figures_are_from_before_the_correction():
    rollout = Rollout.empty([[1], [1]], [[2, 3], [2]], [True, True], 0)
    rollout.engine_logprobs = torch.tensor([[-1.0, -2.0], [-1.0, 0.0]])
    rollout.logprobs = torch.tensor([[-0.5, -1.5], [-1.5, 7.0]])
    found = {kind: engine_metrics(rollout, 1.5, kind) for kind in ("token_mask", "sequence_mask")}
    for figures in found.values():
        assert figures["engine/importance_ratio_max"] == pytest.approx(math.exp(0.5))
        assert figures["engine/sequence_ratio_max"] == pytest.approx(math.exp(1.0))
        assert figures["engine/sequence_ratio_mean"] == pytest.approx((math.exp(1.0) + math.exp(-0.5)) / 2)
        assert figures["engine/kl"] == pytest.approx(-0.5 / 3)
    assert found["token_mask"]["engine/importance_ratio_capped"] == pytest.approx(2 / 3)
    assert found["sequence_mask"]["engine/importance_ratio_capped"] == pytest.approx(1 / 2)


def test_weighted_loss_by_hand():
    """-mean w min(rho A, clip(rho) A): ratios 1, 1.5 (cut at 1.2) and 0.5 with A = 2, 1, -1 (cut at 0.8)."""
    logprobs = torch.tensor([[1.0, 1.5, 0.5]], dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor([[2.0, 1.0, -1.0]], dtype=torch.float64)
    weights, zeros = torch.tensor([[0.5, 2.0, 1.0]], dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    loss, _ = policy_loss(logprobs, zeros, advantages, torch.ones(1, 3), 0.2, weights=weights)
    assert loss.item() == pytest.approx(-(0.5 * 2 + 2 * 1.2 - 1 * 0.8) / 3, abs=1e-12)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(gradient, torch.tensor([[-0.5 * 2 / 3, 0, 0]], dtype=torch.float64), atol=1e-12, rtol=0)


def test_weights_of_one_change_no_bit(draw):
    logprobs, old, advantages = draw(5, T).requires_grad_(), draw(5, T), draw(5, T)
    plain, stats = policy_loss(logprobs, old, advantages, GAPS, 0.2)
    ones = importance_weights(old, old, GAPS, 2.0, "token_truncate")
    ones[~GAPS] = float("nan")  # garbage where nothing is real reaches neither loss nor gradient
    weighted, weighted_stats = policy_loss(logprobs, old, advantages, GAPS, 0.2, weights=ones)
    assert torch.equal(plain, weighted)
    assert all(torch.equal(stats[name], weighted_stats[name]) for name in stats)
    gradients = [torch.autograd.grad(loss, logprobs)[0] for loss in (plain, weighted)]
    assert torch.equal(*gradients)


def run(make_trainer, shifts=None, **settings):
    """A trainer after its updates, its engine replaced where shifts are given, and its rollouts."""
    trainer = make_trainer(**settings)
    if shifts is not None:
        trainer.roles.engine = FakeEngine(trainer, shifts)
    collect, rollouts = trainer.collect, []

    def kept(*args):
        rollouts.append(collect(*args))
        return rollouts[-1]

    trainer.collect = kept
    trainer.train()
    return trainer, rollouts


def test_without_mismatch_the_run_is_the_same(make_trainer, weights, monkeypatch):
    """An engine that gives the trainer's log-probabilities trains to the very weights of the own loop."""
    plain, rollouts = run(make_trainer)
    assert all(torch.equal(rollout.logprobs, rollout.engine_logprobs) for rollout in rollouts)
    assert not any(name.startswith("engine/") for name in logs(plain)[0])

    other = make_trainer()
    other.roles.engine, forward = FakeEngine(other, [0.0]), collect.forward

    def agree(roles, rollout, *others):
        forward(roles, rollout, *others)
        rollout.engine_logprobs = rollout.logprobs.clone()

    monkeypatch.setattr(collect, "forward", agree)
    other.train()
    assert same(weights(plain), weights(other))
    nothing = ("logprob_difference_mean", "logprob_difference_max", "importance_ratio_capped", "kl")
    expected = dict.fromkeys(nothing, 0) | dict.fromkeys(
        ("importance_ratio_mean", "importance_ratio_max", "sequence_ratio_mean", "sequence_ratio_max"), 1
    )
    for row in logs(other):
        seen = {name.removeprefix("engine/"): value for name, value in row.items() if name.startswith("engine/")}
        assert seen == expected
    rows = [{k: v for k, v in row.items() if not k.startswith("engine/")} for row in untimed(logs(other))]
    assert rows == untimed(logs(plain))


def test_mismatch_is_measured_and_corrected(make_trainer):
    """Log-probabilities 0.5 too low, 1 too low, 0.25 too high: weights e^0.5, e^1 cut to 2, e^-0.25."""
    shifts = [0.5, 1.0, -0.25]
    settings = {"num_ppo_epochs": 1, "num_mini_batches": 1, "check_first_ratio": False}
    trainer, rollouts = run(make_trainer, shifts, max_steps=2, **settings)
    assert trainer.roles.engine.updates == 2
    for rollout, row in zip(rollouts, logs(trainer), strict=True):
        place = torch.arange(rollout.mask.shape[1]) % 3
        shift = torch.tensor(shifts)[place].expand_as(rollout.mask)[rollout.mask]
        got = (rollout.logprobs - rollout.engine_logprobs)[rollout.mask]
        torch.testing.assert_close(got, shift, atol=1e-5, rtol=0)
        assert row["engine/logprob_difference_mean"] == pytest.approx(shift.abs().mean().item(), abs=1e-5)
        assert row["engine/logprob_difference_max"] == pytest.approx(1.0, abs=1e-5)
        assert row["engine/importance_ratio_mean"] == pytest.approx(shift.exp().mean().item(), abs=1e-5)
        assert row["engine/importance_ratio_max"] == pytest.approx(torch.e, abs=1e-4)
        assert row["engine/importance_ratio_capped"] == pytest.approx((shift.exp() > 2).float().mean().item())
        # One minibatch and one pass: the ratio is 1, so the loss is the weighted mean of the advantages.
        by_hand = -(shift.exp().clamp_max(2) * rollout.advantages[rollout.mask]).mean().item()
        assert row["loss/policy_avg"] == pytest.approx(by_hand, abs=1e-5)
        # The ratio and the KL are between the trainer's own log-probabilities.
        assert row["val/first_ratio_deviation"] < 1e-5


def test_no_cap_no_correction(make_trainer, weights):
    shifts = {"shifts": [0.5, 1.0, -0.25], "check_first_ratio": False}
    uncorrected, _ = run(make_trainer, **shifts, importance_sampling_cap=None)
    exact, _ = run(make_trainer, [0.0], importance_sampling_cap=None)
    corrected, _ = run(make_trainer, **shifts)
    assert same(weights(uncorrected), weights(exact))
    assert not same(weights(uncorrected), weights(corrected))
    assert logs(uncorrected)[0]["engine/importance_ratio_capped"] == 0


def test_weights_are_new_whenever_they_have_changed(make_trainer, prompts):
    """Rollouts and evaluations sample from the policy as it is, and it is sent no more often than it changes."""
    trainer = make_trainer({"eval_dataset": prompts.select(range(8))}, eval_strategy="steps", eval_steps=1)
    trainer.roles.engine = FakeEngine(trainer, [0.0])
    trainer.train()
    # At first, and after each of two updates: the second rollout has what the first evaluation was given.
    assert trainer.roles.engine.updates == 3
    assert max(row["engine/logprob_difference_max"] for row in logs(trainer)) < 1e-5
    trainer.evaluate()
    assert same(dict(trainer.roles.engine.model.named_parameters()), dict(trainer.policy.named_parameters()))


@pytest.mark.parametrize("shift", [0.02, float("nan")])
def test_an_engine_with_other_weights_stops_the_run(make_trainer, shift):
    with pytest.raises(UserError, match=r"update 1 with differ from the trainer's by .* more than rounding"):
        run(make_trainer, [shift])
    run(make_trainer, [1e-3])


# ------------------------------------------------------------------------------------------------ vLLM's settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"generation_engine": "vlm"}, "generation_engine is 'vlm'; it must be transformers or vllm"),
        ({"vllm_mode": "remote"}, "vllm_mode is 'remote'; it must be colocate or server"),
        ({"importance_sampling_cap": 0.5}, "importance_sampling_cap is 0.5; below 1"),
        ({"vllm_gpu_memory_utilization": 1.5}, "vllm_gpu_memory_utilization is 1.5"),
        ({"generation_engine": "vllm", "logprobs_from_sampling": True}, "logprobs_from_sampling with generation_eng"),
        ({"generation_engine": "vllm", "stop_strings": ["good"]}, "ppo.stop_strings: vLLM is given tokens"),
        ({"generation_engine": "vllm", "top_k": 5}, "ppo.top_k and ppo.top_p: vLLM's log-probabilities"),
        ({"generation_engine": "vllm", "generation_kwargs": {"top_p": 0.9}}, "ppo.top_k and ppo.top_p"),
    ],
)
def test_what_cannot_work_is_refused(make_trainer, settings, words):
    with pytest.raises(UserError, match=words):
        make_trainer(**settings)


def test_a_missing_vllm_names_the_extra(make_trainer, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"pip install ppo-vs-dpo\[vllm\]"):
        make_trainer(generation_engine="vllm")


def test_sharded_and_quantized_weights_are_refused(tiny_llama, tmp_path):
    policy = tiny_llama(0)
    args = PPOConfig(output_dir=str(tmp_path), use_cpu=True, ds3_gather_for_generation=False)
    for kind, words in (
        (DistributedType.DEEPSPEED, "needs ppo.ds3_gather_for_generation"),
        (DistributedType.FSDP, r"does not work with ppo\.fsdp"),
    ):
        with pytest.raises(UserError, match=words):
            check_whole(policy, args, kind)
    policy.is_quantized = True
    with pytest.raises(UserError, match="plain weights, and this one is quantized"):
        check_whole(policy, args, DistributedType.NO)


def test_arithmetic_is_the_trainers():
    assert engine_dtype("bf16", torch.float32) == torch.bfloat16
    assert engine_dtype("fp16", torch.float32) == torch.float16
    assert engine_dtype("no", torch.float32) == torch.float32
    assert engine_dtype("no", torch.bfloat16) == torch.bfloat16


# ------------------------------------------------------------------------------------------------ what is sent


def adapted(model, **settings):
    """The model under LoRA adapters that do something."""
    model = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], **settings)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    return model


def test_adapters_are_sent_merged(tiny_llama):
    """As PEFT's own merging gives them, under the names of a checkpoint, and the model stays bit for bit as it is."""
    model = adapted(tiny_llama(0))
    model.add_adapter("value", LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sent = dict(named_weights(model))
    assert same(before, model.state_dict())
    merged = dict(model.merge_and_unload(adapter_names=["default"]).named_parameters())
    plain = tiny_llama(0)
    assert sent.keys() == merged.keys() == dict(plain.named_parameters()).keys()
    for name, tensor in sent.items():
        torch.testing.assert_close(tensor, merged[name].detach(), atol=1e-6, rtol=0)
    moved = {name for name in sent if not torch.equal(sent[name], plain.get_parameter(name))}
    assert {name.split(".")[-2] for name in moved} == {"q_proj", "down_proj"}


def test_a_plain_model_is_sent_as_it_is(tiny_llama):
    model = tiny_llama(0, tie_word_embeddings=True)
    assert same(dict(named_weights(model)), dict(model.named_parameters()))


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"use_dora": True}, "LORA with use_dora"), ({"modules_to_save": ["lm_head"]}, "LORA with modules_to_save")],
)
def test_other_adapters_are_refused(tiny_llama, settings, words):
    model = adapted(tiny_llama(0), **settings)
    with pytest.raises(UserError, match=words):
        list(named_weights(model))
    with pytest.raises(UserError, match=words):
        VLLMEngine(model, SamplingConfig(), [2], 16, torch.float32, 0.3)
