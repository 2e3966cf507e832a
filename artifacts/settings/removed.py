"""Arguments that the PPO trainer of TRL <= 1.12 had and this one has not, each with what took its place."""

from collections.abc import Iterable

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.settings.sections import nearest

GONE = "it was the example script's own; give it to the script"
DERIVED = "it is worked out from the other settings; leave it out"
ENDS = "the EOS tokens of the tokenizer and of the generation config always end a response"
CONFIG = {
    "stop_token": f"{ENDS}; leave it out, or name more in stop_strings",
    "stop_token_id": f"{ENDS}; leave it out",
    "num_sample_generations": "evaluations show samples: eval_strategy='steps', eval_steps and num_eval_samples",
    "model_adapter_name": "give PPOTrainer(peft_config=...); the reference is the policy without its adapters",
    "ref_adapter_name": "give PPOTrainer(peft_config=...); the reference is the policy without its adapters",
    "sft_model_path": GONE,
    "reward_model_path": GONE,
    "exp_name": "use run_name",
    "dataset_num_proc": "prompts are encoded as they are read; leave it out",
    "world_size": DERIVED,
    "num_total_batches": DERIVED,
    "micro_batch_size": DERIVED,
    "local_batch_size": DERIVED,
    "batch_size": DERIVED,
    "local_mini_batch_size": DERIVED,
    "mini_batch_size": DERIVED,
    "ppo_epochs": "use num_ppo_epochs",
    "init_kl_coef": "use kl_coef",
    "target": "use kl_target, with kl_controller='adaptive'",
    "steps": "use max_steps (updates) or total_episodes (responses)",
    "model_name": "give PPOTrainer(model=...)",
    "log_with": "use report_to",
}
TRAINER = {
    "data_collator": "padding is the trainer's own affair; leave it out",
    "config": "use args",
    "tokenizer": "use processing_class",
    "dataset": "use train_dataset",
    "policy": "use model",
    "ref_policy": "use ref_model",
    "compute_metrics": "give a callback with on_evaluate, or a reward function",
    "preprocess_logits_for_metrics": "leave it out",
}


def refuse_removed(where: str, given: Iterable[str], removed: dict[str, str], valid: Iterable[str]) -> None:
    """Say what replaced each argument that is not there any more.

    ``removed``: name -> what took its place; ``valid``: names that are taken.

    Raises:
        UserError: an argument of TRL's that is gone, all of them at once.
        TypeError: any other unknown argument, with the nearest name.
    """
    valid = list(valid)
    unknown = [name for name in given if name not in valid]
    known = [f"{name}: {removed[name]}." for name in unknown if name in removed]
    if known:
        lines = "\n  ".join(known)
        raise UserError(f"{where} has not these arguments of TRL's any more (docs/migrate-from-trl.md):\n  {lines}")
    if unknown:
        raise TypeError(f"{where} has no argument {unknown[0]!r}.{nearest(unknown[0], valid)}")
