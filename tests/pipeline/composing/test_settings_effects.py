"""Fields that the page says act: a tiny training with another value ends, logs, saves or refuses otherwise.

What one process on a CPU cannot show (`UNSEEN`) is listed here by name; the page says so too.
"""

import copy
import hashlib
import os

import pytest
from datasets import Dataset
from omegaconf import OmegaConf
from transformers.trainer_callback import PrinterCallback

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.guards.fingerprints import COSMETIC, fingerprint_of
from ppo_vs_dpo.artifacts.run import TRAINED
from ppo_vs_dpo.dpo.config import smoothed_loss
from ppo_vs_dpo.pipeline.composing.settings_page import UNSEEN, argument_classes, kinds
from tests.conftest import build_word_tokenizer
from tests.pipeline.composing.test_settings_page import WITH, other

# Eleven: the last batch of four is not full.
PROMPTS = (["the film was", "a story", "very", "the plot was not", "the cast and", "a bad film"] * 2)[:11]
CHOSEN = ([" very good", " bright and good", " good", " dull and bad", " very very bright", " not bad"] * 2)[:11]
REJECTED = ([" dull", " bad and dull and bad", " bad", " good", " not", " the story was bad"] * 2)[:11]
BASE = {
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 1,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "learning_rate": 1e-2,
    "bf16": False,
}
OWN = {
    "sft": {"gradient_checkpointing": False},
    "reward_model": {"gradient_checkpointing": False},
    "dpo": {"gradient_checkpointing": False, "eval_strategy": "no", "precompute_ref_log_probs": True},
    "ppo": {"rollout_batch_size": 8, "num_mini_batches": 2, "num_ppo_epochs": 2, "response_length": 6, "max_steps": 2,
            "temperature": 1.0, "eval_strategy": "no", "metric_for_best_model": "eval_objective"},
}  # fmt: skip
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
BEST = {**EVALUATED, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
# Values that show it, with what else they need, where those of the other test show nothing.
VALUES = {
    ("sft", "max_length"): (4, {}),
    ("sft", "completion_only_loss"): (False, {}),
    ("sft", "packing_strategy"): ("wrapped", {"packing": True, "max_length": 12}),
    ("dpo", "max_length"): (7, {}),
    ("reward_model", "max_length"): (5, {}),
    ("dpo", "discopop_tau"): (0.3, {"loss_type": ["discopop"]}),
    ("dpo", "f_alpha_divergence_coef"): (0.75, {"f_divergence_type": "alpha_divergence"}),
    ("dpo", "loss_weights"): ([0.3, 0.7], {"loss_type": ["sigmoid", "ipo"]}),
    ("dpo", "label_smoothing"): (0.2, {}),
    ("dpo", "eval_delay"): (2, EVALUATED),
    ("dpo", "eval_steps"): (2, EVALUATED),
    ("dpo", "eval_strategy"): ("steps", {"eval_steps": 1}),
    ("dpo", "greater_is_better"): (True, BEST),
    ("dpo", "metric_for_best_model"): ("eval_rewards/margins", BEST),
    ("dpo", "load_best_model_at_end"): (True, EVALUATED),
    ("dpo", "save_strategy"): ("no", {}),
    ("dpo", "sync_ref_model"): (True, {"precompute_ref_log_probs": False, "ref_model_sync_steps": 1}),
    ("dpo", "ref_model_sync_steps"): (1, {"precompute_ref_log_probs": False, "sync_ref_model": True}),
    ("dpo", "ref_model_mixup_alpha"): (
        0.1,
        {"precompute_ref_log_probs": False, "sync_ref_model": True, "ref_model_sync_steps": 1},
    ),
    ("ppo", "advantage"): ("reinforce_pp", {}),
    ("ppo", "early_stop_kl"): (1e-9, {}),
    ("ppo", "eval_delay"): (2, EVALUATED),
    ("ppo", "eval_steps"): (2, EVALUATED),
    ("ppo", "eval_on_start"): (True, EVALUATED),
    ("ppo", "eval_strategy"): ("steps", {"eval_steps": 1}),
    ("ppo", "greater_is_better"): (False, {**BEST, "metric_for_best_model": "eval_objective"}),
    ("ppo", "metric_for_best_model"): ("eval_kl", {**BEST, "metric_for_best_model": "eval_objective"}),
    ("ppo", "load_best_model_at_end"): (True, {**EVALUATED, "max_steps": 3, "greater_is_better": False}),
    ("ppo", "grpo_divide_by_std"): (False, {"advantage": "grpo", "samples_per_prompt": 2}),
    ("ppo", "par_references"): (2, {"reward_shaping": "par"}),
    ("ppo", "preference_labels"): ("bradley_terry", {"loss": "dpo", "samples_per_prompt": 2}),
    ("ppo", "kl_horizon"): (5, {"kl_controller": "adaptive"}),
    ("ppo", "kl_target"): (1e-6, {"kl_controller": "adaptive", "kl_horizon": 5, "max_steps": 3}),
    ("ppo", "num_train_epochs"): (2, {"max_steps": -1}),
    ("ppo", "lr_scheduler_type"): ("constant", {}),
    ("ppo", "max_prompt_length"): (1, {"truncate_prompts": True}),
    ("ppo", "truncate_prompts"): (True, {"max_prompt_length": 1}),
    ("ppo", "num_mini_batches"): (4, {}),
    ("ppo", "ref_model_sync_steps"): (5, {"sync_ref_model": True}),
    ("ppo", "ref_model_mixup_alpha"): (0.1, {"sync_ref_model": True, "ref_model_sync_steps": 1}),
    ("ppo", "sync_ref_model"): (True, {"ref_model_sync_steps": 1}),
    ("ppo", "save_strategy"): ("no", {}),
    ("ppo", "save_steps"): (1, {}),
    ("ppo", "score_bias_samples"): (3, {"score_bias": "auto"}),
    ("ppo", "stop_strings"): (["good"], {}),
    ("ppo", "total_episodes"): (8, {"max_steps": -1}),
    ("ppo", "warmup_steps"): (2, {}),
    **{(stage, "save_total_limit"): (1, {"save_steps": 1}) for stage in TRAINED},
    **{(stage, "save_strategy"): ("epoch", {}) for stage in ("sft", "reward_model")},
}


def trained(stage, settings, folder):
    """What is left of a tiny training: weights, log, files and the best figure; or the refusal."""
    try:
        trainer = make(stage, {**BASE, **OWN[stage], "output_dir": str(folder), **settings})
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    except (UserError, ValueError, RuntimeError, ImportError, TypeError, AttributeError, KeyError) as error:
        return {"refused": f"{type(error).__name__}: {error}".splitlines()[0][:150]}
    model = getattr(trainer, "policy", None) or trainer.model
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}{value.dtype}".encode() + value.float().cpu().numpy().tobytes())
    times = ("time", "runtime", "per_second", "seconds")
    rows = [{k: v for k, v in row.items() if not any(t in k for t in times)} for row in trainer.state.log_history]
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    best = (trainer.state.best_metric, trainer.state.best_global_step)
    return {"weights": digest.hexdigest(), "log": rows, "files": files, "best": best, "epoch": trainer.state.epoch}


def make(stage, settings):
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, set_seed

    tokenizer = build_word_tokenizer()
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    dropout = 0.5 if settings.get("disable_dropout") is False else 0.0
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.2, bos_token_id=1,
                         eos_token_id=2, pad_token_id=0, attention_dropout=dropout, **size)  # fmt: skip
    set_seed(0)
    args = argument_classes()[stage](**(smoothed_loss(settings) if stage == "dpo" else settings))
    pairs = Dataset.from_dict({"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED})
    if stage == "sft":
        from ppo_vs_dpo.sft.data import sft_dataset
        from ppo_vs_dpo.sft.train import build_trainer

        rows = Dataset.from_dict({"prompt": PROMPTS, "completion": CHOSEN})
        data = sft_dataset(rows, tokenizer, args.completion_only_loss, args.max_length, 64)
        return build_trainer(LlamaForCausalLM(config), tokenizer, data, args)
    if stage == "reward_model":
        from ppo_vs_dpo.reward_model.data import reward_dataset
        from ppo_vs_dpo.reward_model.train import build_trainer

        config.num_labels = 1
        data = reward_dataset(pairs, tokenizer, args.max_length)
        return build_trainer(LlamaForSequenceClassification(config), tokenizer, data, args)
    if stage == "dpo":
        from ppo_vs_dpo.dpo.data import dpo_dataset
        from ppo_vs_dpo.dpo.train import build_trainer

        data = dpo_dataset(pairs, tokenizer, args.max_length)
        model = LlamaForCausalLM(config)
        reference = None if args.precompute_ref_log_probs else copy.deepcopy(model)
        test = data.select(range(4))
        return build_trainer(model, tokenizer, data, args, reference, test=test, starts_from_reference=True)
    from ppo_vs_dpo.ppo.trainer import PPOTrainer

    prompts = Dataset.from_dict({"prompt": PROMPTS})
    return PPOTrainer(
        model=LlamaForCausalLM(config),
        args=args,
        reward_funcs=lambda prompts, completions, **columns: [float(c.split().count("good")) for c in completions],
        train_dataset=prompts,
        eval_dataset=prompts.select(range(4)) if args.eval_strategy != "no" else None,
        processing_class=tokenizer,
    )


CASES = [
    (stage, name)
    for stage in TRAINED
    for name, row in kinds().items()
    if row[stage] == "acts" and not {name, f"{stage}.{name}"} & set(UNSEEN)
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    known = {}

    def of(stage, more):
        key = (stage, str(sorted(more.items())))
        if key not in known:
            known[key] = trained(stage, more, tmp_path_factory.mktemp("plain"))
            assert "refused" not in known[key] or more, known[key]
        return known[key]

    return of


def test_what_cannot_be_seen_here_is_a_field_that_acts():
    acting = {(stage, name) for name, row in kinds().items() for stage in TRAINED if row[stage] == "acts"}
    for name in UNSEEN:
        stage, _, field = name.rpartition(".")
        assert any(one == field and stage in ("", where) for where, one in acting), name


def test_whatever_acts_begins_a_stage_anew():
    """One rule for all stages: a checkpoint of another value is never gone on from, whichever field it is."""
    classes = argument_classes()
    for stage in TRAINED:
        plain = fingerprint_of(OmegaConf.create({"seed": 1, stage: {}}), stage, {})[0]
        for name, row in kinds().items():
            if row[stage] != "acts":
                continue
            value = other(classes[stage].__dataclass_fields__[name], stage)
            changed = fingerprint_of(OmegaConf.create({"seed": 1, stage: {name: value}}), stage, {})[0]
            assert (changed == plain) == (name in COSMETIC), f"{stage}.{name}"


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "name"), CASES, ids=[f"{stage}.{name}" for stage, name in CASES])
def test_it_acts(stage, name, plain, tmp_path):
    field = argument_classes()[stage].__dataclass_fields__[name]
    value, more = VALUES.get((stage, name), (other(field, stage), WITH.get(name, {})))
    before = dict(os.environ)
    try:
        base, found = plain(stage, more), trained(stage, {**more, name: value}, tmp_path)
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert found != base, f"{stage}.{name}={value!r} changed nothing"
