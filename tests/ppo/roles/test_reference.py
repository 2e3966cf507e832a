"""The reference is the model that was given, whatever its adapters do to it; where it is not, the run stops."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.passes.answers import answers
from tests.ppo.conftest import logs

STILL = {"learning_rate": 0.0, "max_steps": 1, "num_ppo_epochs": 1, "num_mini_batches": 1}


def lora(**settings) -> LoraConfig:
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "down_proj"], **settings})


def trained(model) -> PeftModel:
    """The model under adapters that do something, as SFT leaves them."""
    model = get_peft_model(model, lora())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"])
def test_every_initialisation_starts_from_the_model_given(make_trainer, tiny_llama, init):
    given = answers(tiny_llama(0))
    trainer = make_trainer(
        {"model": tiny_llama(0), "peft_config": lora(init_lora_weights=init, use_dora=init == "gaussian")}, **STILL
    )
    torch.testing.assert_close(answers(trainer.roles.reference.module), given, atol=1e-4, rtol=0)
    # Only an initialisation that rewrites the base costs a second copy of it.
    assert (trainer.roles.reference.model is None) == (init in (True, "gaussian", "orthogonal"))
    trainer.train()
    assert abs(logs(trainer)[0]["objective/kl"]) < 1e-3


def test_a_trained_adapter_is_a_part_of_the_model_given(make_trainer, tiny_llama):
    policy = trained(tiny_llama(0))
    given = answers(policy)
    with policy.disable_adapter():
        assert (answers(policy) - given).abs().max() > 0.1
    trainer = make_trainer({"model": policy}, max_steps=3)
    reference = trainer.roles.reference
    assert torch.equal(answers(reference.module), given)
    trainer.train()
    assert torch.equal(answers(reference.module), given)
    assert logs(trainer)[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert logs(trainer)[-1]["objective/kl"] != 0
    assert not any(parameter.requires_grad for parameter in reference.module.parameters())


def test_the_value_model_starts_from_what_the_policy_is(make_trainer, tiny_llama):
    policy = trained(tiny_llama(0))
    merged = trained(tiny_llama(0)).merge_and_unload()
    value = make_trainer({"model": policy}).value_model
    for name, parameter in merged.model.named_parameters():
        torch.testing.assert_close(value.model.get_parameter(name), parameter, atol=1e-6, rtol=0)


def test_adapters_that_do_not_start_at_zero_stop_the_run(make_trainer, tiny_llama, tmp_path):
    """``init_lora_weights=False`` draws both factors: the policy is not the model given, and the base is."""
    parts = {"model": tiny_llama(0), "peft_config": lora(init_lora_weights=False)}
    with pytest.raises(UserError, match=r"before the first step .* differ by .*check_first_ratio=false goes on"):
        make_trainer(parts).train()
    assert (tmp_path / "out" / "rollout-kl-update-1" / "rollout.safetensors").exists()
    parts["model"] = tiny_llama(0)
    make_trainer(parts, check_first_ratio=False, max_steps=1).train()


def test_a_reference_that_is_passed_may_be_another_model(make_trainer, tiny_llama):
    trainer = make_trainer({"ref_model": tiny_llama(1)}, max_steps=1)
    trainer.train()
    assert abs(logs(trainer)[0]["objective/kl"]) > 1e-2


def test_an_initialisation_that_changes_the_policy_is_refused(make_trainer, tiny_llama, monkeypatch):
    """As LoftQ does: the base is quantised, and the adapters make up for a part of it only."""
    import peft

    def rewriting(model, config, **kwargs):
        made = get_peft_model(model, config, **kwargs)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "base_layer.weight" in name:
                    parameter.copy_((parameter * 4).round() / 4)
        return made

    monkeypatch.setattr(peft, "get_peft_model", rewriting)
    with pytest.raises(
        UserError, match=r"its new adapters is not the model that was given \(init_lora_weights=None\)"
    ):
        make_trainer({"model": tiny_llama(0), "peft_config": lora()})


@pytest.mark.parametrize("key", ["lora_dropout"])
def test_dropout_on_adapters_is_refused(make_trainer, key):
    with pytest.raises(UserError, match=rf"peft_config\.{key} is 0\.05, and PPO trains without dropout"):
        make_trainer({"peft_config": lora(**{key: 0.05})})
