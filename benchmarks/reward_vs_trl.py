"""Our reward-model stage beside TRL's plain ``RewardTrainer`` on pairs of real-like lengths.

    python -m benchmarks.reward_vs_trl

Both train the reward model of `ppo_vs_trl` for two epochs at the same settings, one thread each, in turns. Ours skips
the padding and reads the score at the last token alone. The last losses must agree: it is the same training.
"""

from benchmarks import pairs_vs_trl


def run_trl(roles, tokenizer, data, folder):
    """TRL's trainer as it is."""
    from trl import RewardConfig, RewardTrainer

    args = RewardConfig(output_dir=folder, **pairs_vs_trl.SETTINGS)
    return RewardTrainer(model=roles[2], args=args, train_dataset=data, processing_class=tokenizer)


def run_ours(roles, tokenizer, data, folder):
    """The stage's trainer on the stage's data set."""
    from trl import RewardConfig

    from ppo_vs_dpo.reward_model.data import reward_dataset
    from ppo_vs_dpo.reward_model.train import build_trainer

    args = RewardConfig(output_dir=folder, **pairs_vs_trl.SETTINGS)
    return build_trainer(roles[2], tokenizer, reward_dataset(data, tokenizer, args.max_length), args)


if __name__ == "__main__":
    pairs_vs_trl.compare("benchmarks.reward_vs_trl", "reward model", 1.3, run_trl, run_ours)
