"""TRL 1.16's RLOOTrainer and GRPOTrainer on the samples of our trainer: the same advantages, the same weights after.

What differs by convention, and is named here:

* TRL's RLOO clips the ratio of whole sequences and takes the mean over responses of sums over tokens; ours clips each
  token's ratio. On the first step both ratios are 1, and ``loss_average=budget`` is that mean divided by the budget.
* TRL's RLOO has its KL penalty (k1) in the reward, its GRPO (k3) in the loss: ours has both (``kl_in``).
* TRL's GRPO multiplies the KL by the ratio (``use_bias_correction_kl``); ours, as Shao et al. 2024, eq. 3, does not.
* ``loss_type=grpo`` is ``loss_average=responses``; ``dr_grpo`` is ``budget`` and no division by the spread.
"""

import copy

import pytest
import torch
from datasets import Dataset
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer, add_fused_lm_head

K, ROWS, BUDGET, RATE = 4, 16, 8, 0.1
OURS = {
    "rloo": {"advantage": "rloo", "loss_average": "budget"},
    "grpo": {"advantage": "grpo", "loss_average": "responses", "kl_in": "loss", "kl_estimator": "k3"},
    "dr_grpo": {
        "advantage": "grpo", "grpo_divide_by_std": False, "loss_average": "budget", "kl_in": "loss",
        "kl_estimator": "k3",
    },
}  # fmt: skip
THEIRS = {
    "rloo": {},
    "grpo": {"loss_type": "grpo", "scale_rewards": "group", "use_bias_correction_kl": False},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none", "use_bias_correction_kl": False},
}


def trl_update(kind, policy, reference, rollout, tokenizer, folder):
    """TRL's advantages of a rollout of ours, and its weights after one step of SGD on them."""
    lists = [ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.mask, strict=True)]
    prompts = [ids[mask].tolist() for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    texts = tokenizer.batch_decode(lists)

    def given(prompts, completions, **columns):
        return rollout.final_scores.tolist()

    base, config = (RLOOTrainer, RLOOConfig) if kind == "rloo" else (GRPOTrainer, GRPOConfig)

    class OnOurSamples(base):
        def _generate(self, asked):
            if kind == "rloo":
                return prompts, lists, texts
            return prompts, lists, None, texts, None, {}, None, None

    trainer = OnOurSamples(
        model=policy,
        reward_funcs=given,
        args=config(
            output_dir=str(folder / "trl"), beta=0.0, num_generations=K, per_device_train_batch_size=ROWS,
            max_completion_length=BUDGET, report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
            **THEIRS[kind],
        ),
        train_dataset=Dataset.from_dict({"prompt": ["the film"] * ROWS}),
        processing_class=tokenizer,
    )  # fmt: skip
    # With a beta it would load a reference by the policy's name, which it has not.
    add_fused_lm_head(reference, temperature=1.0)
    trainer.beta, trainer.ref_model = 0.05, reference
    # What its training loop sets.
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    inputs = trainer._generate_and_score_completions([{"prompt": "the film"} for _ in range(ROWS)])
    trainer._compute_loss(trainer.model, inputs).backward()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter -= RATE * parameter.grad
    return inputs["advantages"], dict(trainer.model.named_parameters())


@pytest.mark.parametrize("kind", list(OURS))
def test_one_update_is_trls(kind, make_trainer, tiny_llama, word_tokenizer, tmp_path):
    reference = tiny_llama(3, initializer_range=0.2)
    settings = {"optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    if kind == "rloo":
        settings["learning_rate"] = RATE * BUDGET
    trainer = make_trainer(
        {"ref_model": copy.deepcopy(reference)}, samples_per_prompt=K, response_length=BUDGET, num_mini_batches=1,
        num_ppo_epochs=1, max_steps=1, missing_eos_penalty=None, **settings, **OURS[kind],
    )  # fmt: skip
    policy = copy.deepcopy(trainer.policy)
    trainer.prepare()
    rollout = trainer.collect(0)
    advantages, theirs = trl_update(kind, policy, reference, rollout, word_tokenizer, tmp_path)
    assert advantages.abs().max() > 0.1
    mine = rollout.advantages.gather(1, torch.zeros(ROWS, 1, dtype=torch.long))[:, 0]
    torch.testing.assert_close(mine, advantages, atol=1e-5, rtol=0)
    before = {name: tensor.clone() for name, tensor in trainer.policy.named_parameters()}
    trainer.update(rollout, 0)
    moved = 0.0
    for name, tensor in trainer.policy.named_parameters():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=0)
        moved = max(moved, float((tensor - before[name]).detach().abs().max()))
    assert moved > 1e-3
