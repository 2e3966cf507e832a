"""Our DPO stage beside TRL's plain ``DPOTrainer`` on pairs of real-like lengths: pairs/s of whole runs, memory, loss.

    python -m benchmarks.dpo_vs_trl

Both train the 6 M-parameter policy of `ppo_vs_trl` for two epochs at the same settings, one thread each, in turns.
TRL's trainer has a reference model beside the policy and runs it at every step on padded rows; ours computes its
log-probabilities once, before the first step, and skips the padding. A run is everything after loading, the
reference's pass included. The last losses must agree: it is the same training.
"""

from benchmarks import pairs_vs_trl


def run_trl(roles, tokenizer, data, folder):
    """TRL's trainer as it is."""
    from trl import DPOConfig, DPOTrainer

    policy, reference, *_ = roles
    reference.load_state_dict(policy.state_dict())
    args = DPOConfig(output_dir=folder, **pairs_vs_trl.SETTINGS)
    return DPOTrainer(model=policy, ref_model=reference, args=args, train_dataset=data, processing_class=tokenizer)


def run_ours(roles, tokenizer, data, folder):
    """The stage's trainer on the stage's data set."""
    from trl import DPOConfig

    from ppo_vs_dpo.dpo.data import dpo_dataset
    from ppo_vs_dpo.dpo.train import build_trainer

    args = DPOConfig(output_dir=folder, **pairs_vs_trl.SETTINGS)
    return build_trainer(roles[0], tokenizer, dpo_dataset(data, tokenizer, args.max_length), args)


if __name__ == "__main__":
    pairs_vs_trl.compare("benchmarks.dpo_vs_trl", "DPO", 1.5, run_trl, run_ours)
