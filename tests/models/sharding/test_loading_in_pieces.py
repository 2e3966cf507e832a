"""Models under ZeRO-3 from the moment they are read: no rank holds one whole, and each is what its folder says."""

import copy
import ctypes
import gc
import threading
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, write_json
from ppo_vs_dpo.models.loading.heads import load_reward
from ppo_vs_dpo.models.loading.pretrained import load_policy, load_value_or_reward
from ppo_vs_dpo.models.sharding.deepspeed import is_sharded, whole_state
from ppo_vs_dpo.ppo.roles.given import value_model_from
from ppo_vs_dpo.ppo.roles.reference import Reference
from tests.ranks import on_ranks, settings_of


def zero3() -> HfDeepSpeedConfig:
    """While it lives, what is loaded is split as it is read."""
    batch = {"train_batch_size": 2, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    return HfDeepSpeedConfig(settings_of("zero3") | batch | {"bf16": {"enabled": False}, "fp16": {"enabled": False}})


def whole_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Of a model that is in pieces."""
    assert all(is_sharded(parameter) for parameter in model.parameters())
    return whole_state(model, keep=True)


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------------ what it is


def roles(folder: Path) -> dict[str, bool]:
    """Role -> whether it is what it should be."""
    kept, found = zero3(), {}
    policy, reward = load_policy(folder / "policy", trainable=True), load_reward(folder / "reward")
    weights, scores = whole_weights(policy), whole_weights(reward)
    found["policy"] = same(weights, load_file(folder / "policy" / "model.safetensors"))
    found["reward"] = same(scores, load_file(folder / "reward" / "model.safetensors"))
    reference, before = Reference(None, policy).model, torch.get_rng_state()
    found["reference"] = same(whole_weights(reference), weights) and not any(
        mine is theirs for mine, theirs in zip(reference.parameters(), policy.parameters(), strict=True)
    )
    found["value from reward"] = same(whole_weights(value_model_from(reward, policy)), scores)
    values = whole_weights(value_model_from(None, policy))
    found["head of zeros"] = not values.pop("score.weight").any()
    found["value from policy"] = same(values, {k: v for k, v in weights.items() if k.startswith("model.")})
    found["nothing drawn"] = torch.equal(before, torch.get_rng_state())
    # Its bias is new, and whole until an engine is made.
    named = whole_state(load_reward(folder / "named"), keep=True)
    std, mean = 2.0, 3.0
    head = load_file(folder / "named" / "model.safetensors")["value_head.weight"]
    found["named head"] = torch.equal(named["score.weight"], head / std) and float(named["score.bias"]) == -mean / std
    fresh = whole_weights(load_value_or_reward(folder / "wide"))["score.weight"]
    # N(0, 1 / (d + 1)) with d = 16: transformers draws with 0.02.
    found["drawn head"] = 0.1 < float(fresh.std()) < 0.5
    merged = load_policy(folder / "adapter").state_dict()
    found["adapter"] = all(torch.equal(merged[k], v) for k, v in load_file(folder / "merged").items())
    try:
        load_policy(folder / "deep")
    except UserError as error:
        found["layers"] = "weights that the model of its config.json has no place for" in str(error)
    del kept
    return found


def test_each_role_is_what_its_folder_says(tiny_llama, tmp_path):
    policy = tiny_llama(0)
    torch.manual_seed(1)
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    reward = LlamaForSequenceClassification(config)
    policy.save_pretrained(tmp_path / "policy")
    reward.save_pretrained(tmp_path / "reward")
    tiny_llama(2, hidden_size=16).save_pretrained(tmp_path / "wide")
    # A head of another project's name, to be normalised (OpenRLHF's way).
    reward.save_pretrained(tmp_path / "named")
    state = load_file(tmp_path / "named" / "model.safetensors")
    state["value_head.weight"] = state.pop("score.weight")
    save_file(state, tmp_path / "named" / "model.safetensors", {"format": "pt"})
    config = read_json(tmp_path / "named" / "config.json")
    more = {"score_head": "value_head", "normalize_reward": True, "mean": 3.0, "std": 2.0}
    write_json(tmp_path / "named" / "config.json", config | more)
    # An adapter alone.
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(load_policy(tmp_path / "policy"), lora)
    adapted.save_pretrained(tmp_path / "adapter")
    save_file(load_policy(tmp_path / "adapter").state_dict(), tmp_path / "merged")
    # More layers than its configuration counts.
    tiny_llama(3, num_hidden_layers=3).save_pretrained(tmp_path / "deep")
    config = read_json(tmp_path / "deep" / "config.json")
    write_json(tmp_path / "deep" / "config.json", config | {"num_hidden_layers": 2})
    for found in on_ranks(2, roles, tmp_path):
        assert {role for role, right in found.items() if not right} == set()
        assert len(found) == 11


# -------------------------------------------------------------------------------------------------- what it takes


class Anonymous:
    """The most memory of this process that belongs to no file, above what it had, in MB, while the block runs."""

    def __enter__(self):
        gc.collect()
        self.before, self.most, self.looking = self.now(), 0.0, True
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        return self

    def __exit__(self, *raised):
        self.looking = False
        self.thread.join()

    def look(self):
        while self.looking:
            self.most = max(self.most, self.now() - self.before)
            time.sleep(0.002)

    @staticmethod
    def now() -> float:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


def memory(folder: Path) -> dict[str, float]:
    # What is freed goes back at once (M_MMAP_THRESHOLD of mallopt): else one would count the allocator's holes.
    ctypes.CDLL(None).mallopt(-3, 65536)
    found: dict[str, float] = {}

    def measured(role, load, *args):
        with Anonymous() as taken:
            model = load(*args)
        found[role] = taken.most
        return model

    measured("plain", load_policy, folder / "policy", None, True)
    kept = zero3()
    policy = measured("policy", load_policy, folder / "policy", None, True)
    reward = measured("reward", load_reward, folder / "reward")
    reference = measured("reference", Reference, None, policy)
    values = measured("value from reward", value_model_from, reward, policy)
    others = measured("value from policy", value_model_from, None, policy)
    assert all(is_sharded(p) for model in (reference.model, values, others) for p in model.parameters())
    del kept
    return found


@pytest.mark.slow
def test_a_rank_holds_its_piece_and_little_more(tmp_path):
    """190 MB of weights on two ranks: 95 MB each, and for a moment a layer of 12 MB. Without ZeRO-3 nothing is copied:
    the weights are pages of the file, which all ranks of a machine share."""
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 13, "num_attention_heads": 8}
    sizes |= {"vocab_size": 4000, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "policy")
    model = LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=1))
    model.save_pretrained(tmp_path / "reward")
    size = sum(parameter.numel() for parameter in model.parameters()) * 4 / 2**20
    del model
    for found in on_ranks(2, memory, tmp_path):
        print({role: round(most) for role, most in found.items()}, "of", round(size))
        assert found.pop("plain") < 0.1 * size
        assert {role: most for role, most in found.items() if most > 0.5 * size + 45} == {}
