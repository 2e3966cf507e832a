"""The reference is the model that was given, whatever its adapters do to it; where it is not, the run stops."""

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.pretrained import load_policy
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
    # One module, so that what is looked at once a model (its masks, its cache) is looked at once.
    assert trainer.roles.reference.module is trainer.roles.reference.module
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
    with pytest.raises(UserError, match=r"its new adapters is not the model that was given: its log-probabilities"):
        make_trainer({"model": tiny_llama(0), "peft_config": lora()})


@pytest.mark.parametrize("key", ["lora_dropout"])
def test_dropout_on_adapters_is_refused(make_trainer, key):
    with pytest.raises(UserError, match=rf"peft_config\.{key} is 0\.05, and PPO trains without dropout"):
        make_trainer({"peft_config": lora(**{key: 0.05})})


def test_a_base_that_trains_is_no_reference(make_trainer, tiny_llama):
    """``bias="all"``: no switch takes the base's own biases back, and the reference would move with the policy."""
    model = tiny_llama(0, attention_bias=True)
    given = answers(model)
    trainer = make_trainer({"model": model, "peft_config": lora(bias="all")}, max_steps=2, learning_rate=1e-2)
    trainer.train()
    assert torch.equal(answers(trainer.roles.reference.module), given)
    assert abs(logs(trainer)[0]["objective/kl"]) < 1e-5
    with trainer.policy.disable_adapter():
        assert (answers(trainer.policy) - given).abs().max() > 1e-3


def test_corda_after_its_own_preparation(make_trainer, tiny_llama):
    """It rewrites the base, as PiSSA does, and needs a look at data first; without it PEFT's words come out."""
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    settings = {"init_lora_weights": "corda", "corda_config": CordaConfig(), "target_modules": ["q_proj"]}
    with pytest.raises(UserError, match=r"peft_config: .*preprocess_corda"):
        make_trainer({"model": tiny_llama(0), "peft_config": lora(**settings)})
    model, rows = tiny_llama(0), torch.randint(3, 20, (8, 1, 32), generator=torch.Generator().manual_seed(0))
    given, config = answers(model), lora(**settings)
    preprocess_corda(model, config, run_model=lambda: [model(row) for row in rows])
    trainer = make_trainer({"model": model, "peft_config": config}, **STILL)
    assert trainer.roles.reference.model is not None
    torch.testing.assert_close(answers(trainer.roles.reference.module), given, atol=1e-4, rtol=0)
    trainer.train()
    assert abs(logs(trainer)[0]["objective/kl"]) < 1e-3


@pytest.mark.parametrize("apart", [True, False])
def test_another_reference_is_said_once(make_trainer, tiny_llama, caplog, apart):
    """On purpose or by mistake: the run goes on, and its first rollout says how far the two are apart."""
    trainer = make_trainer({"ref_model": tiny_llama(1) if apart else None}, max_steps=2)
    if not apart:
        copy = tiny_llama(0)
        copy.load_state_dict(trainer.policy.state_dict())
        trainer = make_trainer({"model": trainer.policy, "ref_model": copy}, max_steps=2)
    with caplog.at_level("WARNING"):
        trainer.train()
    said = [one for one in caplog.messages if "ref_model is another model than the policy starts from" in one]
    assert len(said) == apart
    if apart:
        assert "nats a token (KL " in said[0]
        assert logs(trainer)[0]["objective/kl"] != pytest.approx(0, abs=1e-3)


def test_a_reference_in_another_precision_is_another_model(make_trainer, tiny_llama, caplog):
    with caplog.at_level("WARNING"):
        make_trainer({"model": tiny_llama(0), "ref_model": tiny_llama(0).bfloat16()}, max_steps=1).train()
    assert any("ref_model is another model" in one for one in caplog.messages)


def test_adapters_loaded_for_reading_train(make_trainer, tiny_llama, tmp_path):
    """``PeftModel.from_pretrained`` freezes them by default, and a run would train nothing."""
    trained(tiny_llama(0)).save_pretrained(tmp_path / "adapter")
    policy = PeftModel.from_pretrained(tiny_llama(0), tmp_path / "adapter")
    assert not any(parameter.requires_grad for parameter in policy.parameters())
    before = answers(policy)
    trainer = make_trainer({"model": policy}, max_steps=1)
    trainer.train()
    assert (answers(policy) - before).abs().max() > 1e-3
    assert torch.equal(answers(trainer.roles.reference.module), before)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (lambda: lora(task_type="SEQ_CLS"), r"peft_config\.task_type is SEQ_CLS.*Set it to CAUSAL_LM"),
        (lambda: AdaLoraConfig(target_modules=["q_proj"], total_step=9, tinit=1, tfinal=1), "peft_config is ADALORA"),
        (lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "peft_config is PROMPT_TUNING"),
        (lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "peft_config is PREFIX_TUNING"),
        (lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "peft_config is P_TUNING"),
        (lambda: lora(layer_replication=[[0, 2], [1, 2]]), "with its new adapters is not the model that was given"),
    ],
)
def test_adapters_that_cannot_be_carried(make_trainer, tiny_llama, config, said):
    with pytest.raises(UserError, match=said):
        make_trainer({"model": tiny_llama(0), "peft_config": config()})


def test_a_model_of_which_nothing_trains(make_trainer, tiny_llama, tiny_reward, tmp_path):
    """Loaded for reading, as `load_policy` does it: a run would go through and leave what it was given."""
    tiny_llama(0).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"no weight of the policy requires gradients.*trainable=True"):
        make_trainer({"model": load_policy(tmp_path / "model")})
    with pytest.raises(UserError, match="no weight of value_model requires gradients"):
        make_trainer({"value_model": tiny_reward(0).requires_grad_(False)})


def test_a_quantised_policy_needs_adapters(make_trainer, tiny_llama):
    """What transformers' own Trainer refuses: the little that is not quantised would train, and nothing be said."""
    policy = tiny_llama(0)
    policy.hf_quantizer, policy.quantization_method = object(), "gptq"
    with pytest.raises(UserError, match=r"the policy is quantised \(gptq\): .* Pass peft_config"):
        make_trainer({"model": policy})


@pytest.mark.parametrize("kind", ["vera", "ia3", "rslora"])
def test_other_adapters_keep_the_model_given(make_trainer, tiny_llama, kind):
    configs = {
        "vera": VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]),
        "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
        "rslora": lora(use_rslora=True, modules_to_save=["embed_tokens", "lm_head"]),
    }
    given = answers(tiny_llama(0))
    trainer = make_trainer({"model": tiny_llama(0), "peft_config": configs[kind]}, max_steps=2, learning_rate=0.05)
    trainer.train()
    assert torch.equal(answers(trainer.roles.reference.module), given)
    assert (answers(trainer.policy) - given).abs().max() > 1e-3
    assert abs(logs(trainer)[0]["objective/kl"]) < 1e-5
