"""What TRL, transformers and the stages find out only once they are there, hours later: looked at beforehand."""

from collections.abc import Iterator
from typing import Any

import torch
from omegaconf import OmegaConf
from transformers import Trainer, TrainingArguments
from transformers.optimization import get_scheduler

from ppo_vs_dpo.artifacts.errors import first_sentence
from ppo_vs_dpo.artifacts.guards.fingerprints import points_of
from ppo_vs_dpo.artifacts.settings import nearest


def late(made: TrainingArguments, stage: str, rewards: int = 1, ranks: int = 1) -> Iterator[str]:
    """A sentence for each setting that makes a stage fail, or do nothing, after it has begun."""
    yield from _schedule(made, stage)
    if made.save_strategy == "best" and made.eval_strategy == "no":
        yield f"{stage}.save_strategy=best saves at evaluations, and there are none: use steps, epoch or no."
    if stage == "sft" and made.padding_free and not made.packing and made.max_length is not None:
        yield (
            "sft.padding_free: TRL refuses it beside max_length. Padding is skipped already where the model allows "
            "it: remove it."
        )
    if stage == "dpo" and made.precompute_ref_log_probs and made.sync_ref_model:
        yield "dpo.sync_ref_model moves the reference, and precompute_ref_log_probs takes it once: set one to false."
    if stage == "ppo":
        yield from _ppo(made, rewards, ranks)


def _schedule(made: TrainingArguments, stage: str) -> Iterator[str]:
    """Optimizer and schedule, made for one weight as the trainer will make them for all."""
    weight = torch.nn.Parameter(torch.zeros(1))
    try:
        Trainer.get_optimizer_cls_and_kwargs(made)
    except (ValueError, ImportError, TypeError) as error:
        yield f"{stage}.optim={getattr(made.optim, 'value', made.optim)}: {first_sentence(error)}"
    try:
        get_scheduler(
            made.lr_scheduler_type,
            torch.optim.SGD([weight], lr=1.0),
            num_warmup_steps=0,
            num_training_steps=10,
            scheduler_specific_kwargs=made.lr_scheduler_kwargs or None,
        )
    except (ValueError, TypeError, KeyError) as error:
        said = first_sentence(error)
        yield f"{stage}.lr_scheduler_kwargs do not fit lr_scheduler_type={made.lr_scheduler_type.value}: {said}"


def _ppo(made: Any, rewards: int, ranks: int) -> Iterator[str]:
    weights = made.reward_weights
    if weights is not None and len(weights) != rewards:
        yield f"ppo.reward_weights has {len(weights)} entries for {rewards} rewards; give one each."
    made.rollout_size(ranks)  # raises a UserError of its own


def compared(config: dict[str, Any]) -> Iterator[str]:
    """A sentence for each name in ``compare`` that stands for nothing, or for two things."""
    compare = config.get("compare") or {}
    own = ["sft", "ppo", "dpo"]
    given = compare.get("policies") or {}
    for name, source in given.items():
        where = f"compare.policies.{name}"
        if name in own:
            yield f"{where}: {name} is this run's own; give it another name."
        elif not isinstance(source, dict) or not {"path", "completions"} & {k for k, v in source.items() if v}:
            yield f"{where}: give path (a model) or completions (a file)."
    models = [
        "ppo",
        "dpo",
        *(name for name, source in given.items() if isinstance(source, dict) and source.get("path")),
    ]
    for name in compare.get("best_of") or {}:
        if name.split(",")[0] not in [*models, "sft"]:  # a sweep's point is ppo,kl_coef=0.1
            yield f"compare.best_of.{name}: no policy of this run that can be sampled.{nearest(name, models)}"
    names: set[str] = set()
    for number, entry in enumerate(compare.get("judges") or []):
        if not isinstance(entry, dict):
            continue  # `inputs.judges` says so
        where, kind = f"compare.judges[{number}]", entry.get("kind")
        needed = {"function": "function", "reward_model": "path"}.get(str(kind))
        if needed and not entry.get(needed):
            yield f"{where}: a judge of the kind {kind} needs {needed}."
        if kind == "function" and entry.get("function") and ":" not in str(entry["function"]):
            yield f"{where}.function is {entry['function']!r}; it must be module:function or file.py:function."
        name = entry.get("name") or kind
        if name in names or name in ("gold", "reward_model"):
            yield f"{where}: the name {name} is taken; judges need names of their own."
        names.add(name)
    yield from selected(config, compare.get("select") or {}, names)


def selected(config: dict[str, Any], select: dict[str, Any], judges: set[str]) -> Iterator[str]:
    """A sentence for each reason why `compare.select` could choose nothing: judge, settings, validation prompts."""
    by = select.get("by")
    if not isinstance(by, str):
        return  # not asked for, or refused with its own section
    data, compare = config.get("data") or {}, config.get("compare") or {}
    known = [*(["gold"] if data.get("gold") else []), "reward_model", *sorted(judges)]
    reward = (config.get("ppo") or {}).get("reward") or []
    known += [one.rpartition(":")[2] for one in ([reward] if isinstance(reward, str) else reward) if ":" in one]
    if by not in known:
        yield f"compare.select.by is {by}; it must be one of {', '.join(known)}.{nearest(by, known)}"
    points = [point for stage in ("ppo", "dpo") for point in points_of(OmegaConf.create(config), stage)]
    if not points and not compare.get("checkpoints"):
        yield (
            "compare.select: no method has more than one setting, so there is nothing to choose. Give ppo.sweep, "
            "dpo.sweep or compare.checkpoints, or leave compare.select out."
        )
    held, reported, wanted = data.get("heldout_prompts"), compare.get("n_prompts"), select.get("prompts", 2)
    if all(type(one) is int for one in (held, reported, wanted)) and held < reported + wanted:
        left = f"{held - reported} for validation" if held > reported else "no validation prompts"
        yield (
            f"compare.select: of data.heldout_prompts={held} compare.n_prompts={reported} are reported on, which "
            f"leaves {left}, and compare.select.prompts is {wanted}. Lower the one or raise the other."
        )


def doubled(config: Any, stage: str) -> Iterator[str]:
    """A sentence for each value that a sweep has twice: both would be one job in one folder."""
    points = points_of(config, stage)
    for number, point in enumerate(points):
        if point in points[:number]:
            what = ", ".join(f"{stage}.sweep.{key} has {value}" for key, value in point.items())
            yield f"{what} twice."
