"""What needs the stages' own classes and the run's own files: arguments built, functions imported, models found.

    python -m ppo_vs_dpo.pipeline.checking.inputs < question.json

prints a list of sentences as JSON. Nothing is trained, no weights are read, nothing of the run is written.
"""

import copy
import dataclasses
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_jsonl, write_text
from ppo_vs_dpo.artifacts.guards.fingerprints import FUNCTION, points_of
from ppo_vs_dpo.artifacts.guards.refusals import explain, not_found, of_a_defect
from ppo_vs_dpo.artifacts.resources import libraries
from ppo_vs_dpo.artifacts.run import TRAINED, RunFolder
from ppo_vs_dpo.artifacts.settings import key_of, split, unknown_keys
from ppo_vs_dpo.artifacts.settings.values import of_another_type, out_of_range
from ppo_vs_dpo.artifacts.stage import StageContext
from ppo_vs_dpo.pipeline.checking.late import compared, doubled, late
from ppo_vs_dpo.pipeline.composing.schema import SECTIONS, load_class
from ppo_vs_dpo.pipeline.planning.cost.counted import examples
from ppo_vs_dpo.pipeline.planning.gpus import ranks_of


def said(look: Callable[[], Any], where: str = "") -> list[str]:
    """What a look at something complains of: nothing, or the lines of its error."""
    try:
        look()
    except UserError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        return [line for line in lines if line and line != "the configuration has errors:"]
    except Exception as error:
        return [f"{where}{explain(error) or of_a_defect(error)}"]
    return []


def listed(look: Callable[[], list[str]]) -> list[str]:
    """What a look that gives sentences found; one that cannot go on says why, and the other looks are still made."""
    found: list[str] = []
    return [*said(lambda: found.extend(look())), *found]


def problems(config: dict[str, Any], stages: list[str]) -> list[str]:
    """Everything that the stages would refuse, as far as it can be known before they run."""
    found: list[str] = []
    for stage in TRAINED:
        if stage in stages:
            found += listed(lambda stage=stage: doubled(OmegaConf.create(config), stage))
            for point in [{}, *points_of(OmegaConf.create(config), stage)]:
                found += said(lambda stage=stage, point=point: arguments_of(config, stage, point), f"{stage}: ")
    model = said(lambda: architecture_of(config), "model: ")
    found += model
    for stage in TRAINED:
        section = config.get(stage) or {}
        if stage in stages and section.get("lora") and not model and not section.get("skip_training"):
            found += said(lambda stage=stage: adapted_layers(config, stage), f"{stage}.lora: ")
    found += listed(lambda: functions(config, stages))
    for stage in stages:
        found += listed(lambda stage=stage: files(config, stage))
    if "data" in stages and not model:
        found += listed(lambda: first_rows(config))
    if "ppo" in stages:
        found += listed(lambda: prompts_left(config))
    if "reward_model" in stages:
        given = config.get("reward_model") or {}
        found += listed(lambda: scores_of(given.get("path"), given.get("head"), "reward_model.path"))
    if "compare" in stages:
        for look in (judges, policies, compared):
            found += listed(lambda look=look: look(config))
    return list(dict.fromkeys(found))


def arguments_of(config: dict[str, Any], stage: str, point: dict[str, Any]) -> None:
    """Build a stage's own settings and its argument class, as the stage will, at a point of its sweep.

    Raises:
        UserError: a line for each value that is refused: what is wrong by itself is left out, and the rest is tried.
    """
    plain = copy.deepcopy(config)
    plain["deepspeed"] = {}  # starting it is the stage's
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder) / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(plain)))
        context = StageContext(RunFolder(folder), stage, point)
        own, arguments = (load_class(spec) for spec in SECTIONS[stage])
        names = {field.name for field in dataclasses.fields(own)}
        passed = {key: value for key, value in context.config.items() if key not in names}
        found = [
            *unknown_keys(context.config, own, arguments, stage),
            *of_another_type(passed, arguments, stage),
            *out_of_range(context.config, stage),
        ]
        wrong = {key_of(line, stage) for line in found}
        sound = {key: value for key, value in context.config.items() if key not in wrong}
        build = lambda values: _arguments(context, values, own, arguments)  # noqa: E731
        more = refusals(build, sound, stage)
        found += [line for line in more if not any(f"{stage}.{key}" in line for key in wrong)]
        if found:
            raise UserError("\n".join(found))


def refusals(build: Callable[[dict[str, Any]], Any], values: dict[str, Any], stage: str) -> list[str]:
    """What is refused of values that are built together; where that is more than one, each of them.

    Classes say the first thing that they do not like. So each key is tried alone, and those that are refused are
    tried beside the others. What is then said of a key that was left out is not true of the values as they are.
    """
    whole = said(lambda: build(values), f"{stage}: ")
    if not whole:
        return []
    doubtful = [key for key in values if said(lambda key=key: build({key: values[key]}))]
    others = {key: value for key, value in values.items() if key not in doubtful}
    found = said(lambda: build(others), f"{stage}: ")
    for key in doubtful:
        left_out = [re.compile(rf"\b{re.escape(other)}\b") for other in doubtful if other != key]
        lines = said(lambda key=key: build({**others, key: values[key]}), f"{stage}: ")
        found += [line for line in lines if not any(name.search(line) for name in left_out)]
    return list(dict.fromkeys(found)) or whole


def _arguments(context: StageContext, values: dict[str, Any], own: Any, arguments: Any) -> None:
    """As the stage makes them.

    Raises:
        UserError, ValueError: a value is refused.
    """
    from ppo_vs_dpo.models.training import training_arguments

    stage = context.stage
    if stage == "ppo":
        from ppo_vs_dpo.ppo.roles.judge import judge_settings
        from ppo_vs_dpo.ppo.stage.train import settings_of
        from ppo_vs_dpo.preferences.judging.template import load_template

        settings, passed = settings_of(values)
        if not settings.gold_reward and "judge" in settings.rewards:
            load_template(judge_settings(settings.judge).template)
    else:
        settings, passed = split(values, own, arguments, where=stage)
    if stage == "dpo":
        from ppo_vs_dpo.dpo.config import smoothed_loss

        passed = smoothed_loss(passed)
    made = training_arguments(arguments, context, passed)
    refuse_unknown_names(made, stage)
    ranks = ranks_of(context.run.config.get("launch"))
    wrong = list(late(made, stage, len(settings.rewards) if stage == "ppo" else 1, ranks))
    if stage == "ppo" and settings.value_path is not None and not made.has_critic:
        method = f"advantage={made.advantage}, loss={made.loss}"
        wrong.append(f"ppo.value_path with {method}: there are no values. Leave it out.")
    if wrong:
        raise UserError("\n".join(wrong))


# What `trl.DPOTrainer` compares its settings with when the first loss is computed.
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def refuse_unknown_names(made: Any, stage: str) -> None:
    """Refuse names that TRL and transformers look up only when training starts.

    Raises:
        UserError: a loss, a divergence or a tracker that there is not.
    """
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    trackers = [made.report_to] if isinstance(made.report_to, str) else list(made.report_to or [])
    for name in trackers:
        if name not in (*INTEGRATION_TO_CALLBACK, "all", "none"):
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise UserError(f"{stage}.report_to: there is no tracker {name}; there are {known}.")
    if stage != "dpo":
        return
    import inspect

    from trl.trainer import dpo_trainer

    source = inspect.getsource(dpo_trainer)
    for name in made.loss_type:
        if f'"{name}"' not in source:
            raise UserError(f"dpo.loss_type: TRL has no loss {name}.")
    if made.f_divergence_type not in DIVERGENCES:
        raise UserError(
            f"dpo.f_divergence_type is {made.f_divergence_type!r}; it must be one of {', '.join(DIVERGENCES)}."
        )


def architecture_of(config: dict[str, Any]) -> Any:
    """The configuration of the model that the run starts from; no weights are read."""
    from ppo_vs_dpo.pipeline.planning.plan import model_config

    return model_config(OmegaConf.create(config))


def adapted_layers(config: dict[str, Any], stage: str) -> None:
    """Refuse adapters on layers that the model has not."""
    import torch
    from transformers import AutoModelForCausalLM

    from ppo_vs_dpo.pipeline.planning.plan import default_targets

    architecture = architecture_of(config)
    targets = list((config[stage]["lora"] or {}).get("target_modules") or [])
    if not targets:
        default_targets(architecture.model_type)
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture)
    layers = {
        name
        for name, part in model.named_modules()
        if isinstance(part, torch.nn.Linear) or "Conv1D" in str(type(part))
    }
    missing = [
        one for one in targets if one != "all-linear" and not any(n == one or n.endswith(f".{one}") for n in layers)
    ]
    if missing:
        there = sorted({name.rpartition(".")[2] for name in layers})
        raise UserError(
            f"{stage}.lora.target_modules: the model has no layer {', '.join(missing)}; it has {', '.join(there)}."
        )


def functions(config: dict[str, Any], stages: list[str]) -> list[str]:
    """Import every function that a section names as ``module:function``."""
    from ppo_vs_dpo.preferences.recipes.named import load_gold

    found = []
    for section in dict.fromkeys(["data", *(stage for stage in stages if stage != "pairs")]):
        for key, text in texts(config.get(section) or {}, section):
            if FUNCTION.match(text) and (key.endswith(("gold", "function", "scorer")) or ".reward" in key):
                found += said(lambda key=key, text=text: load_gold(text, key), f"{key}: ")
    return found


def texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """``(dotted key, text)`` of every text in nested dicts and lists."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from texts(item, f"{key}.{name}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from texts(item, f"{key}[{number}]")
    elif isinstance(value, str):
        yield key, value


def files(config: dict[str, Any], stage: str) -> list[str]:
    """Files and folders that a section names and that are not there. A name without a place may be the Hub's."""
    section = "data" if stage == "pairs" else stage
    found = []
    for key, text in texts(config.get(section) or {}, section):
        name = key.rpartition(".")[2]
        if name.endswith(("path", "completions", "few_shot")) and _is_a_place(text) and not Path(text).exists():
            found.append(f"{key}: {text} does not exist.")
    return found


def _is_a_place(text: str) -> bool:
    return text.startswith(("/", "./", "../", "~")) or Path(text).suffix in (
        ".jsonl",
        ".json",
        ".csv",
        ".parquet",
        ".gz",
    )


def first_rows(config: dict[str, Any]) -> list[str]:
    """Read the first rows of given pairs, or of prompts: columns that are not there, text for a chat model."""
    from ppo_vs_dpo.preferences.config import GivenPairs, MadePairs, data_class, data_settings

    kind = data_class(config["data"])
    if not issubclass(kind, GivenPairs | MadePairs):
        return []
    from ppo_vs_dpo.models.loading.config import ModelConfig
    from ppo_vs_dpo.preferences.given import pairs, prompts

    look, key = (pairs.look, "path") if kind is GivenPairs else (prompts.look, "prompts_path")
    model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), config["model"]))
    return said(lambda: look(data_settings(config["data"]), model), f"data.{key}: ")


def prompts_left(config: dict[str, Any]) -> list[str]:
    """Refuse to set aside more prompts for PPO's evaluations than there are, where that can be known."""
    aside, asked = (config.get("ppo") or {}).get("validation_prompts"), (config.get("data") or {}).get("train_prompts")
    if not isinstance(aside, int) or aside <= 0:
        return []
    there = asked if isinstance(asked, int) else examples(RunFolder("nowhere", OmegaConf.create(config)), "ppo")[0]
    if there is None or there > aside:
        return []
    about = "" if there == asked else "about "
    return [
        f"ppo.validation_prompts is {aside}, of {about}{there} training prompts: none is left to train on. Lower it."
    ]


def judges(config: dict[str, Any]) -> list[str]:
    """Refuse entries of ``compare.judges`` that no judge can be made of."""
    from ppo_vs_dpo.preferences.judging.llm import LLMJudgeConfig
    from ppo_vs_dpo.preferences.judging.template import load_template

    found = []
    for number, entry in enumerate((config.get("compare") or {}).get("judges") or []):
        where = f"compare.judges[{number}]"
        if not isinstance(entry, dict) or entry.get("kind") not in ("function", "reward_model", "llm"):
            found.append(f"{where}: kind must be function, reward_model or llm.")
            continue
        if entry["kind"] == "reward_model":
            found += scores_of(entry.get("path"), entry.get("head"), f"{where}.path")
        if entry["kind"] == "llm":
            found += said(
                lambda entry=entry, where=where: split(
                    {"name": "llm", **entry}, LLMJudgeConfig, where=where, kind="judge"
                )
            )
            found += said(lambda entry=entry: load_template(entry.get("template", "hh_helpfulness")), f"{where}: ")
    return found


def scores_of(path: str | None, head: str | None, where: str) -> list[str]:
    """Refuse a reward model that is there and has no head, another one, or more labels than one."""
    from ppo_vs_dpo.models.loading.heads import check_reward

    if not path or (_is_a_place(path) and not Path(path).exists()):
        return []  # nothing, or a place where nothing is: `files` says so
    if not (Path(path) / "config.json").is_file():
        return said(lambda: of_the_hub(path, where))
    return [f"{where}: {line}" for line in said(lambda: check_reward(path, head=head))]


def of_the_hub(path: str, where: str) -> None:
    """Refuse a model's name that is neither a folder's nor to be had from the Hub; its configuration alone is read."""
    from transformers import AutoConfig

    from ppo_vs_dpo.models.loading.config import ModelConfig
    from ppo_vs_dpo.models.loading.files import wrapped

    try:
        if wrapped(path, ModelConfig()) is None:
            AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}={path}: {not_found(path, error)}") from error


def policies(config: dict[str, Any]) -> list[str]:
    """Read files of completions made elsewhere: a torn line or a missing column is known in the first second."""
    found = []
    for name, source in ((config.get("compare") or {}).get("policies") or {}).items():
        path = source.get("completions") if isinstance(source, dict) else None
        if not isinstance(path, str) or not Path(path).is_file() or not path.endswith(("jsonl", "jsonl.gz")):
            continue

        def look(path: str = path, name: str = name) -> None:
            rows = read_jsonl(path)
            lacking = [number for number, row in enumerate(rows, 1) if not isinstance(row.get("completion"), str)]
            if not rows or lacking:
                place = f"line {lacking[0]} has no text under completion" if lacking else "it is empty"
                raise UserError(f"compare.policies.{name}.completions: {path}: {place}.")

        found += said(look, f"compare.policies.{name}: ")
    return found


def _main() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    question = json.loads(sys.stdin.read())
    # What libraries print must not stand in the answer's place.
    answer, sys.stdout = sys.stdout, sys.stderr
    with libraries():  # it loads what each look needs, and little else
        found = problems(question["config"], question["stages"])
    answer.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    _main()
