"""Settings of PPO. Each default cites its evidence; names are TRL's where TRL had one.

Papers: Ziegler 2019 (1909.08593), Stiennon 2020 (2009.01325), InstructGPT (2203.02155), N+ = Huang et al. 2024
(2403.17031), Xu 2024 (2404.10719), Llama 2 (2307.09288), Schulman 2017 (1707.06347).
"""

import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.settings import removed, unknown_keys
from ppo_vs_dpo.artifacts.settings.removed import refuse_removed
from ppo_vs_dpo.models.sampling.generation import SamplingConfig
from ppo_vs_dpo.ppo.config.problems import problems
from ppo_vs_dpo.ppo.config.tables import CONVENTIONS, ESTIMATORS, Conventions


def _help(text: str) -> dict[str, str]:
    return {"help": text}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata=_help(text))


@dataclass
class PPOConfig(TrainingArguments):
    """Arguments of `ppo.trainer.PPOTrainer`: those of `transformers.TrainingArguments`, and PPO's own.

    Example::

        from ppo_vs_dpo import PPOConfig

        args = PPOConfig(
            output_dir="out",
            max_steps=100,  # updates
            rollout_batch_size=64,  # responses an update
            response_length=64,
            kl_coef=0.05,
        )
        print(args.num_ppo_epochs, args.learning_rate)

    One *update* is: sample a rollout, then ``num_ppo_epochs`` passes over it in ``num_mini_batches`` minibatches. All
    of the Trainer's steps (``max_steps``, ``logging_steps``, ``eval_steps``, ``save_steps``, warm-up) count updates.

    What each setting means and why its default is what it is: docs/ppo.md, or here as
    ``PPOConfig.__dataclass_fields__["kl_coef"].metadata["help"]``.
    """

    def __new__(cls, *args: Any, **given: Any) -> "PPOConfig":
        refuse_removed("PPOConfig", given, removed.CONFIG, cls.__dataclass_fields__)
        return super().__new__(cls)

    # -- from TrainingArguments, with other defaults
    learning_rate: float = _option(3e-6, "Of the policy. N+ table: 3e-6 for every stage.")
    adam_epsilon: float = _option(1e-5, "N+ (AdamW eps 1e-5); Llama 2 PPO (eps 1e-5).")
    logging_steps: float = _option(1, "In updates. An update is minutes of work; each is worth a line.")
    remove_unused_columns: bool | None = _option(False, "Columns of the data set are handed to the reward functions.")
    metric_for_best_model: str | None = _option("eval_objective", "reward - kl_coef * KL on held-out prompts.")
    greater_is_better: bool | None = _option(True, "The objective is maximised.")

    # -- the rollout
    rollout_batch_size: int | None = _option(
        None,
        "Responses per update over all ranks. Default: per_device_train_batch_size x gradient_accumulation_steps x "
        "ranks, as in TRL. N+, Stiennon, Ziegler, InstructGPT and Llama 2 use 512; Xu Table 3: larger is better.",
    )
    total_episodes: int | None = _option(None, "Responses in all; instead of max_steps or num_train_epochs (TRL).")
    response_length: int = _option(53, "Response budget in tokens, EOS included. N+ table: 53.")
    max_prompt_length: int | None = _option(
        None,
        "Longer prompts are an error unless truncate_prompts. Default: what the context leaves (N+ details 2 and 4: "
        "limits come from the data).",
    )
    truncate_prompts: bool = _option(
        False,
        "Cut over-long prompts from the left instead of stopping. Off: N+ detail 2 cuts the data, at a line break.",
    )
    temperature: float = _option(
        1.0,
        "Of sampling. InstructGPT and Xu: 1.0, so that the KL is the policy's own; N+ and TRL: 0.7, and their KL is "
        "that of the sharpened policies.",
    )
    top_k: int = _option(
        0,
        "0 samples from the policy itself (N+, InstructGPT); Xu use 200. Other values bias the KL estimate, and a "
        "warning says so.",
    )
    top_p: float = _option(1.0, "1 samples from the policy itself (N+, InstructGPT).")
    generation_kwargs: dict | str | None = field(
        default=None,
        metadata=_help(
            "More sampling settings (fields of models.generation.SamplingConfig); they win over the fields above."
        ),
    )
    stop_strings: list[str] | None = field(
        default=None,
        metadata=_help("A response also ends where one of these appears. None: at EOS only (N+ detail 3)."),
    )
    local_rollout_forward_batch_size: int = _option(64, "Rows per forward pass without gradients, per rank (TRL: 64).")
    micro_batch_tokens: int | None = _option(
        None,
        "Also at most so many real tokens per pass, forward or training: less memory, and on a CPU more speed "
        "(activations stay in the cache). The same update up to rounding, on any number of ranks.",
    )
    logprobs_from_sampling: bool = _option(
        False,
        "Take the rollout's log-probabilities and entropies from sampling where both compute the same (fp32, same "
        "temperature, no top-k or top-p, no DeepSpeed): one pass less. They then carry the rounding of decoding.",
    )
    generation_engine: Literal["transformers", "vllm"] = _option(
        "transformers",
        "What samples: the project's own loop on the model that trains, or vLLM, which gets the weights when they "
        "have changed.",
    )
    vllm_mode: Literal["colocate", "server"] = _option(
        "colocate",
        "Where vLLM runs (TRL's names): in the process of each rank (extra vllm), or as a "
        "server that `python -m ppo_vs_dpo.models.sampling.vllm.server MODEL` started; any number of ranks.",
    )
    vllm_server_base_url: str = _option("http://127.0.0.1:8000", "Of the server, with vllm_mode=server.")
    vllm_weight_transfer: Literal["auto", "nccl", "ipc", "files"] = _option(
        "auto",
        "How weights go to the server: by vLLM's own transfer over NCCL to other GPUs, or by CUDA IPC on the same "
        "ones; or as files on a disk that both see. auto: as the server was started, where the trainer is on a GPU "
        "and has vLLM, too; else files.",
    )
    vllm_enable_sleep_mode: bool | None = _option(
        None,
        "With vllm_mode=colocate: its weights and cache leave the GPU while the trainer works, and weights are sent "
        "again before each sampling (TRL's name). None: on a GPU.",
    )
    vllm_gpu_memory_utilization: float = _option(
        0.3,
        "Share of the GPU's memory (of the machine's on a CPU) for vLLM's weights and key-value cache, beside "
        "training (TRL's GRPO: 0.3).",
    )
    importance_sampling_cap: float | None = _option(
        2.0,
        "C of truncated importance sampling (Yao et al. 2025; 2.0 as there): a token's policy loss is weighted by "
        "min(exp(logprob of the trainer - logprob of the engine), C). All 1 with generation_engine=transformers. "
        "None: no correction.",
    )
    importance_sampling: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = _option(
        "token_truncate",
        "Of each token, or of whole responses (their product: unbiased without a cap, of higher variance); above C "
        "cut to C, or left out. TRL's names; its default is sequence_mask.",
    )
    cast_lm_head_to_fp32: bool = _option(
        False,
        "Compute logits of policy and reference in fp32 whatever the rest is in (TRL's name; MiniMax-M1): sampled and "
        "trained log-probabilities then differ by the layers' rounding alone. Slower at large vocabularies.",
    )
    coalesce_grad_reduction: bool = _option(
        False,
        "DeepSpeed: ranks exchange the gradients of all micro-batches of a step at once. Each rank then holds all "
        "gradients until the step, and they add up in the weights' dtype: in bfloat16 8 of them are off by 0.3 %.",
    )
    ds3_gather_for_generation: bool = _option(True, "ZeRO-3: gather the weights once per rollout (TRL).")

    # -- the reward
    reward_weights: list[float] | None = field(
        default=None,
        metadata=_help("One per reward (model first, then functions). Default: 1 each, a plain sum (TRL's GRPO)."),
    )
    reward_aggregation: Literal["sum", "normalize_then_sum"] = _option(
        "sum",
        "Of several rewards: their weighted sum, or each first normalised over a prompt's responses (GDPO: Liu et al. "
        "2026; TRL's names), so that none drowns the others.",
    )
    reward_ensemble: Literal["mean", "worst", "uncertainty"] = _option(
        "mean",
        "Of several reward models as one: mean, worst case, or mean - reward_ensemble_coef x variance (Coste et al. "
        "2023).",
    )
    reward_ensemble_coef: float = _option(0.1, "lambda of uncertainty. Coste: 0.1 for PPO, 0.5 for best-of-n.")
    reward_shaping: Literal["none", "par"] = _option(
        "none", "par: the score becomes mean sigma(score - score of a response of the reference) (Fu et al. 2025)."
    )
    par_references: int = _option(
        1, "Responses of the reference to each prompt that par compares with, drawn once. Fu et al.: 10; 1 suffices."
    )
    score_length_coef: float | str = _option(
        0.0,
        "Subtracted from the score for each token of a response. 'auto': what a token more is worth to the reward "
        "model among responses of the SFT policy, so that length alone pays nothing (its report's length_slope).",
    )
    kl_coef: float = _option(0.05, "beta. N+ table and Stiennon: 0.05.")
    kl_estimator: Literal["k1", "k2", "k3"] = _option(
        "k1", "k1 in the reward is what Ziegler, Stiennon, N+ and TRL use: unbiased, its gradient is KL(pi||ref)'s."
    )
    kl_in: Literal["reward", "loss"] = _option(
        "reward", "Where the penalty acts. In the loss, k2 has the gradient of KL(pi||ref), k3 of KL(ref||pi)."
    )
    kl_controller: Literal["fixed", "adaptive"] = _option(
        "fixed", "Fixed in Stiennon, InstructGPT, N+, Xu, Llama 2; adaptive in Ziegler and Coste."
    )
    kl_target: float = _option(6.0, "Target sequence KL of the adaptive controller, nats (Ziegler: 6).")
    kl_horizon: float = _option(10_000, "Episodes over which the coefficient may move by 20 % (Ziegler: 10,000).")
    missing_eos_penalty: float | None = _option(
        1.0, "For a response that does not end (N+ detail 23: a score of -1). None: no penalty."
    )
    missing_eos: Literal["replace", "subtract"] = _option(
        "replace", "replace: the score becomes -penalty (N+, Stiennon); subtract: score - penalty (TRL)."
    )
    score_bias: float | str = _option(
        0.0,
        "Subtracted from scores. 'auto': the mean score of the reference completions (column `completion`, else "
        "samples of the reference), so that these average 0 (N+ detail 15). 0: a reward model of this project has it "
        "built in.",
    )
    score_bias_samples: int = _option(
        256, "Prompts that 'auto' looks at: a standard error of a sixteenth of the scores' spread."
    )
    score_clip: float | None = _option(
        None, "Clip scores to +- this. Xu 20, DeepSpeed-Chat 5; off in N+ and InstructGPT, and off here."
    )
    whiten_rewards: bool = _option(False, "N+ ran its final policies without (whiten_rewards=False).")

    # -- advantages
    gamma: float = _option(1.0, "N+, Ziegler, Stiennon, Xu: 1.")
    lam: float = _option(0.95, "N+, Ziegler, Stiennon: 0.95.")
    value_lam: float | None = _option(
        None, "lambda of the values' targets. None: lam. VAPO (Yue et al. 2025) has 1.0 beside an adaptive one."
    )
    lam_alpha: float | None = _option(
        None,
        "Lambda of the advantages by length instead of lam: 1 - 1/(alpha x tokens of the response). VAPO: 0.05. None: "
        "lam for all.",
    )
    whiten_advantages: bool | None = _option(
        None,
        "Xu Table 3: APPS pass@5 18.0 -> 38.1 by this alone; N+ detail 25. Default: with gae and reinforce_pp; rloo "
        "and grpo have a scale of their own.",
    )
    advantage: Literal["gae", "rloo", "grpo", "reinforce_pp"] = _option(
        "gae",
        "gae: PPO with a value model. rloo (Ahmadian et al. 2024), grpo (Shao et al. 2024), reinforce_pp (Hu et al. "
        "2025): none is loaded or trained; the baseline is what the other responses to the prompt got.",
    )
    samples_per_prompt: int = _option(
        1, "Responses to each prompt of a rollout: k. RLOO (2 or 4 in the paper) and GRPO (64) need at least 2."
    )
    grpo_divide_by_std: bool = _option(
        True, "GRPO's division by the spread of a group's rewards; false is Dr. GRPO (Liu et al. 2025)."
    )
    loss_average: Literal["tokens", "responses", "budget"] = _option(
        "tokens",
        "What the policy loss is a mean over: all real tokens of a minibatch; responses, each the mean over its "
        "tokens (GRPO's length bias); or responses times response_length (Dr. GRPO).",
    )

    # -- the update
    loss: Literal["ppo", "dpo", "ipo"] = _option(
        "ppo",
        "dpo and ipo: online DPO (Guo et al. 2024) and IPO; the best and the worst of a prompt's samples_per_prompt "
        "responses by the reward are a pair, kl_coef is beta, and there are no values, advantages or ratios. "
        "num_mini_batches steps on one rollout: its staleness (Noukhovitch et al. 2024).",
    )
    preference_labels: Literal["certain", "bradley_terry"] = _option(
        "certain",
        "With loss=dpo or ipo: the better of a pair counts as chosen for certain, or with the probability "
        "sigma(difference of the scores), under which DPO's optimum is that of the KL-regularised reward.",
    )
    num_ppo_epochs: int = _option(4, "Passes over a rollout. Ziegler, Stiennon, N+: 4 (InstructGPT: 1).")
    num_mini_batches: int = _option(1, "Optimizer steps per pass. N+: 1; Xu: 4; InstructGPT and Llama 2: 8.")
    cliprange: float = _option(0.2, "Schulman 2017; every paper above.")
    cliprange_value: float | None = _option(0.2, "N+, Ziegler: 0.2. In units of the reward. None: no clipping.")
    vf_coef: float = _option(0.1, "N+, Ziegler: 0.1.")
    value_learning_rate: float | None = _option(
        None, "Of the value model. Default: the policy's (N+: one optimizer). InstructGPT 9e-6, Xu 5e-6 beside 1e-5."
    )
    value_warmup_updates: int = _option(0, "Updates at the start that train the value model only (OpenRLHF, verl).")
    entropy_coef: float = _option(0.0, "Entropy bonus; no RLHF paper above uses one.")
    early_stop_kl: float | None = _option(
        None, "End an update when a minibatch's approx-KL to the sampling policy exceeds this (Spinning Up: 0.015)."
    )
    ptx_coef: float = _option(0.0, "Weight of the pretraining loss (InstructGPT: 27.8); needs ptx_dataset.")
    ptx_batch_size: int | None = _option(
        None, "Pretraining texts per minibatch. Default: the minibatch size (InstructGPT: 8 times as many)."
    )
    ptx_max_length: int = _option(512, "Tokens of a pretraining text.")
    sync_ref_model: bool = _option(False, "Let the reference follow the policy (Xu: EMA reference). TRL's name.")
    ref_model_mixup_alpha: float = _option(0.001, "ref <- alpha policy + (1 - alpha) ref. ReaLHF (Xu): 0.001.")
    ref_model_sync_steps: int = _option(1, "Every so many updates; ReaLHF (Xu): each.")

    # -- watching
    num_eval_samples: int = _option(8, "Completions shown side by side with the reference's at each evaluation.")
    check_first_ratio: bool = _option(
        True,
        "Stop when the ratio is not 1 on the first pass (N+: it must be), when the KL to the reference is not 0 "
        "before the first step, or when another engine's log-probabilities are further from the trainer's than "
        "rounding.",
    )
    resume_with: list[str] | None = field(
        default=None,
        metadata=_help(
            "Settings that may differ from the checkpoint's when the run goes on, e.g. [learning_rate, max_steps]; "
            "each change is logged. Any other difference stops the run."
        ),
    )
    diagnose: bool = _option(True, "Warn in words when a run goes bad.")
    parity: Literal["trl-1.12", "summarize-from-feedback"] | None = _option(
        None, "Conventions of another implementation, for comparison: docs/ppo.md names each."
    )

    def sampling(self) -> SamplingConfig:
        """How rollouts are sampled: the fields above, then ``generation_kwargs``."""
        extra = self.generation_kwargs or {}
        if unknown := unknown_keys(extra, SamplingConfig, None, "ppo.generation_kwargs"):
            raise UserError(unknown[0])
        mine = {
            "max_new_tokens": self.response_length,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "stop_strings": list(self.stop_strings or []),
        }
        return SamplingConfig(**mine | extra)

    @property
    def conventions(self) -> Conventions:
        """Of the implementation that ``parity`` names."""
        return CONVENTIONS[self.parity]

    @property
    def logprob_temperature(self) -> float:
        """What logits are divided by where log-probabilities are taken: the temperature of sampling."""
        return self.sampling().temperature + self.conventions.temperature_offset

    def rollout_size(self, ranks: int) -> int:
        """Responses per update.

        Raises:
            UserError: they cannot be cut into equal minibatches and shares.
        """
        size = self.rollout_batch_size
        if size is None:
            size = self.per_device_train_batch_size * self.gradient_accumulation_steps * ranks
        said = f"a rollout of {size} responses (ppo.rollout_batch_size) in {self.num_mini_batches} minibatches"
        k, groups = self.samples_per_prompt, self.num_mini_batches * self.samples_per_prompt
        if k > 1 and size % groups:
            raise UserError(
                f"{said} cannot hold whole groups of {k} (ppo.samples_per_prompt). Make it a multiple of {groups}."
            )
        # A pair stays on one rank.
        if self.loss != "ppo" and size % (groups * ranks):
            raise UserError(
                f"{said} gives {ranks} ranks no equal number of pairs, one of each {k} responses. Make it a multiple "
                f"of {groups * ranks}."
            )
        if size % (self.num_mini_batches * ranks):
            raise UserError(
                f"a rollout of {size} responses (ppo.rollout_batch_size) cannot be cut into {self.num_mini_batches} "
                f"equal minibatches on {ranks} ranks. Make it a multiple of {self.num_mini_batches * ranks}."
            )
        return size

    def num_updates(self, prompts: int, size: int) -> int:
        """Updates of a run with so many training prompts and so many responses an update."""
        if self.max_steps > 0:
            return self.max_steps
        episodes = self.total_episodes or self.num_train_epochs * prompts * self.samples_per_prompt
        return max(1, math.ceil(episodes / size))

    @property
    def has_critic(self) -> bool:
        """Whether a value model is trained."""
        return self.loss == "ppo" and ESTIMATORS[self.advantage].critic

    @property
    def penalty_in_reward(self) -> bool:
        """Whether the KL penalty is a part of the rewards; DPO's loss has it in itself."""
        return self.loss == "ppo" and self.kl_in == "reward"

    @property
    def whitens_advantages(self) -> bool:
        """``whiten_advantages``, or what is usual with the estimator."""
        return ESTIMATORS[self.advantage].whitens if self.whiten_advantages is None else self.whiten_advantages

    @property
    def fixed_score_bias(self) -> float:
        """``score_bias`` where it is a number; 0 where it is measured at the start of training."""
        return 0.0 if self.score_bias == "auto" else float(self.score_bias)

    def __post_init__(self):
        if isinstance(self.generation_kwargs, str):
            self.generation_kwargs = json.loads(self.generation_kwargs)
        # The Trainer saves at fixed steps only, so it wants these to be those of the evaluations. `PPOTrainer` saves
        # whenever an evaluation is the best so far.
        wanted, self.load_best_model_at_end = self.load_best_model_at_end, False
        super().__post_init__()
        self.load_best_model_at_end = wanted
        if found := list(problems(self)):
            raise UserError("\n".join(found))
