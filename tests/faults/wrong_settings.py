"""Wrong settings by the hundred: each must be refused before a stage starts."""

import re

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ppo_vs_dpo.artifacts.errors import Complaint, UserError
from ppo_vs_dpo.artifacts.settings.values import LIMITS
from ppo_vs_dpo.pipeline.checking.inputs import problems
from ppo_vs_dpo.pipeline.composing.compose import load
from ppo_vs_dpo.pipeline.composing.schema import SECTIONS, section_keys
from tests.faults.small import STAGES

# Sections of the quickstart in which a limit's key has a meaning of its own, and values outside of each interval.
OUTSIDE = {"[": "-1", "(": "0"}
WRONG_TYPES = {
    "sft": ("learning_rate", "max_steps", "weight_decay", "packing", "bf16", "max_length", "warmup_steps"),
    "reward_model": ("learning_rate", "samples", "use_margin", "num_train_epochs", "save_total_limit", "adam_beta1"),
    "dpo": ("beta", "label_smoothing", "use_soft_labels", "gradient_accumulation_steps", "precompute_ref_log_probs"),
    "ppo": ("kl_coef", "lam", "whiten_rewards", "cliprange", "num_mini_batches", "validation_prompts", "score_clip"),
    "compare": ("n_prompts", "temperature", "confidence", "batch_size", "length_difficulty", "pool_size"),
    "data": ("pairs", "temperature", "max_new_tokens", "sft_examples"),
}
# Choices that are none.
NONSENSE = [
    "ppo.kl_estimator=k7", "ppo.kl_in=nowhere", "ppo.kl_controller=pid", "ppo.missing_eos=ignore", "ppo.parity=trl",
    "ppo.value_from=sft", "ppo.reward=best", "ppo.generation_engine=tgi", "ppo.score_bias=often",
    "dpo.loss_type=[sigmoyd]", "dpo.f_divergence_type=odd", "dpo.reference_path=/nowhere",
    "sft.lr_scheduler_type=linar", "sft.optim=adamm", "sft.save_strategy=often", "sft.report_to=paper",
    "reward_model.head_init=one", "reward_model.label_noise=0.9", "model.dtype=float7", "data.source=nowhere",
    "data.gold=nowhere:f", "compare.judges=[{kind: nun}]", "compare.judges=[{kind: llm}]",
    "compare.judges=[{kind: function, function: 'a.b:c'}]", "compare.judges=[{kind: llm, model: x, template: nope}]",
    "compare.policies={a: {path: /nowhere}}", "compare.policies={a: {completions: /nowhere.jsonl}}",
    "compare.best_of_n=[100]", "launch.workers=0", "launch.processes=0", "launch.nodes=0", "stages=[pppo]",
    "stages=[]",
    "ppo.lora={r: 4, target_modules: [q_prj]}", "dpo.lora={r: 0}", "sft.lora={dropout: 1.5}",
    "ppo.sweep={kl_coef: [-1]}", "dpo.sweep={beta: [0]}", "ppo.sweep={kl_coeff: [1]}", "ppo.sweep={kl_coef: 1}",
    "sft.max_steps=0", "ppo.max_steps=0", "dpo.max_steps=-5", "sft.unheard_of=1", "unheard_of=1", "ppo.seed=3",
]  # fmt: skip


def cases() -> list[str]:
    """All of them, as one would type them."""
    found = []
    for section in SECTIONS:
        if section == "data":
            keys = ["sft_examples", "train_prompts", "heldout_prompts", "pairs", "test_pairs", "max_new_tokens"]
            keys += ["temperature", "generation_batch_size"]
        else:
            keys = section_keys(section)
        for key in keys:
            # Where max_steps is set, as the quickstart sets PPO's, epochs are not looked at.
            if key in LIMITS and f"{section}.{key}" != "ppo.num_train_epochs":
                found.append(f"{section}.{key}={OUTSIDE[LIMITS[key][0]] if key != 'warmup_steps' else '-3'}")
                high = LIMITS[key][1:-1].partition(",")[2]
                found += [f"{section}.{key}={float(high) + 0.5}"] if high else []
    found += [f"{section}.{key}=abc" for section, keys in WRONG_TYPES.items() for key in keys]
    return [*found, *NONSENSE]


def complaints(overrides: list[str]) -> list[str]:
    """Every sentence that refuses something, when the configuration is composed and when it is looked at."""
    found: list[str] = []
    try:
        config = load(["experiment=quickstart", *overrides])
    except Complaint as error:
        found, config = error.problems, error.config
    except UserError as error:
        return [str(error)]
    if config is None:
        return found
    try:
        settings = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException:
        return found
    sections = {one.partition(".")[0] for one in overrides}
    # What is said of one stage's section is said by looking at that stage.
    stages = [name for name in STAGES if name in sections] if sections <= set(STAGES) else list(STAGES)
    return found + problems(settings, stages)


def campaign(some: int | None = None, say=print) -> dict[str, list[str]]:
    """Try every one (or every so many-th): ``refused`` and ``taken``.

    Those that are wrong by themselves are tried together, one of a key: all of them must be named in one round. What
    is not named there, and every choice that is none, is tried alone.
    """
    chosen = cases()[:: some or 1]
    waiting, refused = [one for one in chosen if one not in NONSENSE], []
    alone = [one for one in chosen if one in NONSENSE]
    while waiting:
        together = list({one.partition("=")[0]: one for one in waiting}.values())
        waiting = [one for one in waiting if one not in together]
        found = complaints(together)
        for one in together:
            key = re.escape(one.partition("=")[0])
            (refused if any(re.search(rf"{key}\b", line) for line in found) else alone).append(one)
    for override in alone:
        try:
            if complaints([override]):
                refused.append(override)
        except Exception as error:  # the others are tried, and this one has missed its bar
            say(f"{override}: {type(error).__name__}: {error}")
    taken = [one for one in chosen if one not in refused]
    for override in taken:
        say(f"taken: {override}")
    return {"refused": refused, "taken": taken}
