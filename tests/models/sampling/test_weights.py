"""Weights in buckets: all of them, adapters added in, and under ZeRO-3 no more than a bucket whole at once."""

import contextlib
import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ppo_vs_dpo.models.sampling.weights import BUCKET, buckets, named_weights
from ppo_vs_dpo.ppo.roles.reference import WithoutAdapters
from tests.ranks import on_ranks, settings_of

LORA = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")

# Empty while what is gathered is not to be noted.
NOTING = [True]


def adapted(model):
    torch.manual_seed(1)
    policy = get_peft_model(model, copy.deepcopy(LORA))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return policy


def all_of(policy, size=BUCKET):
    found = list(buckets(policy, torch.float32, size=size))
    together = {name: weight for bucket in found for name, weight in bucket.items()}
    assert len(together) == sum(map(len, found))
    return found, together


@pytest.mark.parametrize("size", [BUCKET, 3000, 1])
def test_every_weight_once_in_buckets_of_a_size(tiny_llama, size):
    model = tiny_llama()
    found, together = all_of(model, size)
    expected = dict(model.named_parameters())
    assert together.keys() == expected.keys()
    assert all(torch.equal(together[name], expected[name]) for name in expected)
    for bucket in found:
        assert len(bucket) == 1 or sum(4 * weight.numel() for weight in bucket.values()) <= size
    assert len(found) == {BUCKET: 1, 1: len(expected)}.get(size, len(found))
    assert list(dict(named_weights(model))) == list(together)


def test_adapters_are_added_in_and_can_be_left_out(tiny_llama):
    """The merged model's weights; of the reference, the base's. Nothing of the model itself changes."""
    base, policy = tiny_llama(), adapted(tiny_llama())
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    merged = dict(copy.deepcopy(policy).merge_and_unload().named_parameters())
    _, together = all_of(policy, 2000)
    assert together.keys() == merged.keys()
    for name, weight in together.items():
        torch.testing.assert_close(weight, merged[name], atol=1e-6, rtol=1e-6)
    _, reference = all_of(WithoutAdapters(policy), 2000)
    assert all(torch.equal(reference[name], p) for name, p in base.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())


def test_those_who_do_not_want_them_get_none(tiny_llama):
    assert {len(bucket) for bucket in buckets(tiny_llama(), torch.bfloat16, keep=False, size=2000)} == {0}


def sharded(policy):
    """A ZeRO-3 engine, and a list that takes the numbers whole at once whenever some are gathered."""
    import deepspeed

    from ppo_vs_dpo.models.sharding.deepspeed import is_sharded

    settings = settings_of("zero3") | {"train_batch_size": 2, "train_micro_batch_size_per_gpu": 1}
    settings |= {"gradient_accumulation_steps": 1, "gradient_clipping": 1.0, "fp16": {"enabled": False}}
    settings["bf16"] = {"enabled": False}
    trained = [p for p in policy.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=policy, config=settings, optimizer=torch.optim.AdamW(trained, lr=1e-3))
    parameters = list(engine.module.parameters())
    assert all(is_sharded(p) for p in parameters)
    sizes, seen = {id(p): p.ds_numel for p in parameters}, []
    gathered = deepspeed.zero.GatheredParameters.__enter__

    def enter(self):
        result = gathered(self)
        if NOTING:
            seen.append(sum(sizes[id(p)] for p in parameters if p.numel()))
        return result

    deepspeed.zero.GatheredParameters.__enter__ = enter
    return engine, seen


@contextlib.contextmanager
def wholly(module):
    """All parameters whole, to be written by every rank alike; not noted by `sharded`."""
    import deepspeed

    NOTING.clear()
    try:
        with deepspeed.zero.GatheredParameters(list(module.parameters()), modifier_rank=0):
            yield
    finally:
        NOTING.append(True)


def streamed(build, lora, limit):
    """Weights that rank 0 got, and the numbers that were whole at once on this rank, bucket by bucket."""
    model = build()
    policy = adapted(model) if lora else model
    expected = {name: weight.clone() for name, weight in named_weights(policy)}
    engine, seen = sharded(policy)
    parameters = list(engine.module.parameters())
    rank = torch.distributed.get_rank()
    got = {n: w for bucket in buckets(engine.module, torch.float32, rank == 0, limit) for n, w in bucket.items()}
    after = sum(p.numel() for p in parameters)
    same = rank != 0 or (got.keys() == expected.keys() and all(torch.equal(got[n], expected[n]) for n in got))
    return max(seen), after, len(got), same, sum(p.ds_numel for p in parameters)


@pytest.mark.parametrize("lora", [False, True])
def test_under_zero3_one_bucket_is_whole_at_once(tiny_llama, lora):
    limit = 4000
    found = on_ranks(2, streamed, lambda: tiny_llama(num_hidden_layers=4), lora, limit)
    for most, after, _, same, total in found:
        assert same
        assert after == 0
        # Adapters come along with the weight that they belong to.
        assert most <= limit / 4 * (1.5 if lora else 1)
        assert total > 4 * most
    assert found[0][2] > 30
    assert found[1][2] == 0
