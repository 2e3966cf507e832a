"""What PPO's settings choose from: advantage estimators, conventions of other implementations, what is not read."""

from typing import NamedTuple


class Estimator(NamedTuple):
    """What an advantage estimator needs.

    Attributes:
        critic: a value model.
        group: responses of a prompt, at least.
        whitens: by default its advantages are whitened over the rollout.
    """

    critic: bool
    group: int
    whitens: bool


# `ppo.rollouts.advantages` has the equations. Whitening: N+ detail 25; Hu et al. 2025 (REINFORCE++), eq. 4; the two
# others have a scale of their own.
ESTIMATORS = {
    "gae": Estimator(critic=True, group=1, whitens=True),
    "rloo": Estimator(critic=False, group=2, whitens=False),
    "grpo": Estimator(critic=False, group=2, whitens=False),
    "reinforce_pp": Estimator(critic=False, group=1, whitens=True),
}


class Conventions(NamedTuple):
    """What implementations do differently.

    Attributes:
        score_after_last: the score lands one position after the last token, and values count one longer.
        unbiased: Bessel's correction in whitening.
        temperature_offset: added to the temperature of log-probabilities.
        missing_eos: what a missing EOS does, whatever ``missing_eos`` says.
    """

    score_after_last: bool = False
    unbiased: bool = False
    temperature_offset: float = 0.0
    missing_eos: str | None = None


# TRL 1.12, trl/experimental/ppo/ppo_trainer.py; summarize_from_feedback_details/ppo.py (vwxyzjn).
CONVENTIONS = {
    None: Conventions(),
    "trl-1.12": Conventions(True, True, 1e-7, "subtract"),
    "summarize-from-feedback": Conventions(True, False, 1e-7, "replace"),
}


# Settings of TrainingArguments that transformers' own loop reads and PPO's does not: refused, not ignored.
UNUSED = {
    "torch_compile": "passes without padding have another shape each time, and compiling them did not pay "
    "(docs/performance.md)",
    "use_liger_kernel": "its kernels are not put into PPO's four models",
    "neftune_noise_alpha": "noise on embeddings would make the policy that trains another than the one that samples",
    "label_smoothing_factor": "there are no labels",
    "auto_find_batch_size": "set per_device_train_batch_size or micro_batch_tokens",
    "torch_empty_cache_steps": "the cache is not emptied between steps",
    "train_sampling_strategy": "prompts are drawn at random, without replacement",
    **dict.fromkeys(
        (
            "dataloader_num_workers",
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
            "dataloader_multiprocessing_context",
        ),
        "prompts are tokenised before training",
    ),
    "dataloader_drop_last": "prompts are drawn, not cut into batches",
    "ignore_data_skip": "a resumed run goes on with the next prompts, at no cost",
    "eval_accumulation_steps": "evaluation is PPO's own",
    "bf16_full_eval": "evaluation has the arithmetic of training (bf16)",
    "fp16_full_eval": "evaluation has the arithmetic of training (fp16)",
    "batch_eval_metrics": "evaluation is PPO's own",
    "include_for_metrics": "evaluation is PPO's own",
    "prediction_loss_only": "evaluation is PPO's own",
    "label_names": "there are no labels",
    "debug": "transformers' own loop reads it",
}
