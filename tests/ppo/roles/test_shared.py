"""One base, four roles: the numbers of four separate models, from one copy of the weights."""

import copy
import json

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.stage import StageContext
from ppo_vs_dpo.models.loading.config import LoraSettings
from ppo_vs_dpo.models.loading.pretrained import load_policy
from ppo_vs_dpo.ppo.roles.shared import reward_adapter, share_base
from ppo_vs_dpo.ppo.stage.train import run_stage
from tests.ppo.stage.test_train import run_folder  # noqa: F401 (a fixture)
from tests.ppo.whole.test_deepspeed import FIGURES, SETTINGS, history
from tests.ranks import on_ranks, settings_of

LORA = LoraSettings(r=2, alpha=4, target_modules=["q_proj", "v_proj"])


@pytest.fixture
def folders(tmp_path, tiny_llama, word_tokenizer):
    """A base, and a reward model that is an adapter on it, as the stages before leave them."""
    base, reward = tmp_path / "base", tmp_path / "reward" / "adapter"
    policy = tiny_llama(0, initializer_range=0.2)
    policy.save_pretrained(base)
    word_tokenizer.save_pretrained(base)
    save_reward_adapter(base, reward)
    return base, reward


def save_reward_adapter(base, folder):
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], task_type="SEQ_CLS"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)


def shared_roles(folders, value_from="reward_model"):
    torch.manual_seed(3)
    policy, value_model, reward = share_base(load_policy(folders[0]), LORA, folders[1], value_from)
    return {"model": policy, "value_model": value_model, "reward_model": reward}


def separate_roles(folders):
    """The same four with a copy of the base each."""
    torch.manual_seed(3)
    base = load_policy(folders[0])
    policy = get_peft_model(copy.deepcopy(base), LORA.peft_config("CAUSAL_LM"))
    value_model = AutoPeftModelForSequenceClassification.from_pretrained(folders[1], num_labels=1, is_trainable=True)
    reward = AutoPeftModelForSequenceClassification.from_pretrained(folders[1], num_labels=1)
    reward.config.score_bias = 0.0  # the mark of what this project's stage has trained, as the shared one is
    return {"model": policy, "value_model": value_model, "reward_model": reward, "ref_model": base}


@pytest.fixture
def train(make_trainer, folders, tmp_path):
    def run(name, roles, deepspeed=None, **settings):
        settings = {
            **SETTINGS,
            **settings,
            "eval_strategy": "no",
            "deepspeed": settings_of(deepspeed) if deepspeed else None,
        }
        trainer = make_trainer(roles(folders), output_dir=str(tmp_path / name), **settings)
        before = {n: p.detach().clone() for n, p in trainer.policy.named_parameters() if not p.requires_grad}
        trainer.train()
        assert trainer.model.is_gradient_checkpointing == settings.get("gradient_checkpointing", False)
        if deepspeed is None:
            after = dict(trainer.policy.named_parameters())
            assert all(torch.equal(after[n], p) for n, p in before.items()), "the base or the reward has moved"
        return trainer.roles.held_bytes()

    return run


def agree(one, other):
    assert len(one) == len(other) == 4
    for mine, theirs in zip(one, other, strict=True):
        for name in (*FIGURES, "objective/scores", "val/mean"):
            assert mine[name] == pytest.approx(theirs[name], abs=1e-5), name


def test_one_base_gives_the_numbers_of_four_models(train, tmp_path):
    held = train("shared", shared_roles)
    apart = train("separate", separate_roles)
    agree(history(tmp_path / "separate", 4), history(tmp_path / "shared", 4))
    assert sum(held.values()) < 0.4 * sum(apart.values())


def test_activations_are_computed_again_under_their_own_adapter(train, tmp_path):
    train("kept", shared_roles)
    train("again", shared_roles, gradient_checkpointing=True)
    agree(history(tmp_path / "kept", 4), history(tmp_path / "again", 4))


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", ["zero2", "zero3"])
def test_one_base_under_deepspeed(train, tmp_path, deepspeed):
    train("separate", separate_roles)
    shares = on_ranks(2, train, "shared", shared_roles, deepspeed)
    agree(history(tmp_path / "separate", 4), history(tmp_path / "shared", 4))
    if deepspeed == "zero3":
        whole = train("whole", shared_roles)
        for role in ("base", "policy", "value", "reward"):
            assert shares[0][role] == pytest.approx(whole[role] / 2, rel=0.1), role


def test_the_stage_on_one_base(run_folder, word_tokenizer):  # noqa: F811
    """From a reward model trained as an adapter to a merged policy that loads by itself."""
    lora = {"r": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    run = run_folder(lora=lora, shared_base=True)
    with pytest.raises(UserError, match=r"holds a whole reward model. Train it as an adapter \(reward_model.lora"):
        run_stage(StageContext(run, "ppo"))
    base = run.path("sft", "model")
    save_reward_adapter(base, run.path("reward_model", "adapter"))
    word_tokenizer.save_pretrained(run.path("reward_model", "adapter"))
    run_stage(StageContext(run, "ppo"))
    merged = AutoModelForCausalLM.from_pretrained(run.path("ppo", "model"))
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run.path("ppo", "adapter"))
    ids = torch.arange(4, 10)[None]
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-5, rtol=0)
    assert not torch.allclose(merged(ids).logits, AutoModelForCausalLM.from_pretrained(base)(ids).logits, atol=1e-5)
    saved = json.loads((run.path("ppo", "adapter") / "adapter_config.json").read_text())
    assert saved["r"] == 2
    assert not (run.path("ppo", "adapter") / "reward").exists()


def test_settings_that_cannot_be(run_folder, folders, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match=r"set ppo.lora, too"):
        run_stage(StageContext(run_folder(shared_base=True), "ppo"))
    with pytest.raises(UserError, match=r"belongs to .*base, and the policy starts from .*elsewhere"):
        reward_adapter(tmp_path / "reward", tmp_path / "elsewhere")
