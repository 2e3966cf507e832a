"""docs/settings.md says what each field does, and each does it: every field of every class is set to another value."""

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.run import TRAINED
from ppo_vs_dpo.models.training import training_arguments
from ppo_vs_dpo.pipeline.composing.compose import check_section
from ppo_vs_dpo.pipeline.composing.schema import SECTIONS
from ppo_vs_dpo.pipeline.composing.settings_page import argument_classes, kinds, page

ROOT = Path(__file__).parents[3]
# Another value for fields whose type and default do not suggest a valid one; with what else it needs.
OTHER = {
    "advantage": "reinforce_pp",
    "loss_average": "responses",
    "loss": "dpo",
    "preference_labels": "bradley_terry",
    "importance_sampling": "sequence_mask",
    "reward_aggregation": "normalize_then_sum",
    "reward_ensemble": "worst",
    "reward_shaping": "par",
    "score_length_coef": 0.5,
    "value_lam": 0.7,
    "lam_alpha": 0.7,
    "whiten_advantages": False,
    "generation_engine": "vllm",
    "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 1}, "optim": "adafactor",
    "optim_args": "foreach=True", "optim_target_modules": ["q_proj"], "logging_strategy": "no", "log_level": "info",
    "log_level_replica": "info", "report_to": "none", "save_strategy": "best", "metric_for_best_model": "loss",
    "include_num_input_tokens_seen": "all", "train_sampling_strategy": "sequential", "neftune_noise_alpha": 5.0,
    "accelerator_config": {"even_batches": False}, "debug": "underflow_overflow", "label_names": ["labels"],
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "activation_checkpointing_kwargs": {"use_reentrant": False}, "eval_strategy": "steps",
    "liger_kernel_config": {"rope": False}, "hub_private_repo": True, "hub_model_id": "a/b",
    "include_for_metrics": ["loss"], "dataloader_prefetch_factor": 3, "dataloader_multiprocessing_context": "spawn",
    "warmup_steps": 3, "generation_kwargs": {"batch_size": 4}, "score_bias": 0.5, "stop_strings": ["x"],
    "reward_weights": [0.5], "parity": "trl-1.12", "kl_estimator": "k3", "kl_in": "loss",
    "kl_controller": "adaptive", "missing_eos": "subtract", "vllm_mode": "server", "vllm_weight_transfer": "files",
    "vllm_server_url": "http://127.0.0.1:1", "packing_strategy": "wrapped", "f_divergence_type": "js_divergence",
    "gamma": 0.9, "lam": 0.9, "top_p": 0.9, "ref_model_mixup_alpha": 0.5, "adam_beta1": 0.8, "adam_beta2": 0.9,
    "vllm_gpu_memory_utilization": 0.5, "max_steps": 7, "eval_delay": 2, "pad_to_multiple_of": 8, "use_cache": True,
    "save_total_limit": 3, "trackio_static_space_id": "x", "torch_empty_cache_steps": 2,
    "deepspeed": {"zero_optimization": {"stage": 2}}, "parallelism_config": {"tp_size": 2},
    "fsdp_config": {"min_num_params": 1}, "model_init_kwargs": {"dtype": "auto"},
    "dataset_kwargs": {"skip_prepare_dataset": True}, "loss_weights": [0.5], "label_smoothing_factor": 0.1,
    "resume_with": ["gamma"], "ddp_timeout": 900, "ddp_bucket_cap_mb": 10, "local_rank": 0, "max_grad_norm": 0.5,
}  # fmt: skip
WITH = {
    "dataloader_persistent_workers": {"dataloader_num_workers": 1},
    "dataloader_prefetch_factor": {"dataloader_num_workers": 1},
    "dataloader_multiprocessing_context": {"dataloader_num_workers": 1},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine"},
    "save_strategy": {"metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 1},
    "kl_in": {"kl_estimator": "k3"},
    "loss": {"samples_per_prompt": 2},
    "reward_aggregation": {"samples_per_prompt": 2},
    "eval_strategy": {"eval_steps": 1},
    "load_best_model_at_end": {
        "eval_strategy": "steps",
        "eval_steps": 500,
        "save_steps": 500,
        "save_strategy": "steps",
    },
}
# Need what a CPU, or this environment, has not: the class's or our own sentence says so.
NOT_HERE = {
    "tf32",
    "fp16",
    "activation_offloading",
    "use_liger_kernel",
    "ddp_backend",
    "fp16_full_eval",
    "log_on_each_node",
}


def other(field: dataclasses.Field, stage: str):
    """A value that is not the field's default."""
    if field.name == "loss_type":
        return {"sft": "dft", "dpo": ["ipo"]}.get(stage, "x")
    if field.name in OTHER:
        return OTHER[field.name]
    default, kind = field.default, str(field.type)
    if isinstance(default, bool) or (default is None and "bool" in kind):
        return not default
    if isinstance(default, int):
        return default + 1
    if isinstance(default, float):
        return default + 0.25
    if default is None and "int" in kind:
        return 2
    return 0.5 if default is None and "float" in kind else "x"


CLASSES = argument_classes()
CASES = [(stage, field) for stage in TRAINED for field in dataclasses.fields(CLASSES[stage]) if field.init]


def context(stage: str, folder: Path) -> SimpleNamespace:
    run = SimpleNamespace(config=OmegaConf.create({"seed": 1}))
    return SimpleNamespace(stage=stage, name=stage, dir=folder, seed=1, run=run)


@pytest.fixture(autouse=True)
def _environment():
    """Building arguments sets variables for trackers and bars."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(("stage", "field"), CASES, ids=[f"{stage}.{field.name}" for stage, field in CASES])
def test_every_field_does_what_the_page_says(stage, field, tmp_path):
    kind = kinds()[field.name][stage]
    value, name = other(field, stage), field.name
    section = {**WITH.get(name, {}), name: value}
    complaints = [
        text for text in check_section(stage, dict(section), SECTIONS[stage][0]) if f"{stage}.{name}:" in text
    ]
    if complaints:
        assert kind == "refused", complaints
        return
    refusal, args = None, None
    try:
        args = training_arguments(CLASSES[stage], context(stage, tmp_path), section)
    except UserError as error:
        refusal = str(error).strip()
    if refusal is not None:
        assert kind == "refused" or name in NOT_HERE, refusal
        assert len(refusal.splitlines()) <= len(section)  # a sentence each
        return
    assert kind in ("acts", "nothing"), f"{stage}.{name} is said to be refused, and {value!r} is not"
    held = getattr(args, name)
    shown = getattr(held, "value", held)
    if isinstance(shown, list | dict) or isinstance(value, dict):
        return  # parsed into another form
    assert shown != field.default or name in ("push_to_hub",) or name in NOT_HERE, f"{stage}.{name} kept its default"


def test_the_page_is_what_the_command_writes():
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == page()
