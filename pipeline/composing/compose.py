"""From the command line to one resolved, checked configuration; all that is wrong is said at once."""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from ppo_vs_dpo.artifacts.errors import Complaint, UserError, first_sentence, printable
from ppo_vs_dpo.artifacts.run import STAGES
from ppo_vs_dpo.artifacts.settings import key_of, nearest, refused_keys
from ppo_vs_dpo.artifacts.settings.values import out_of_range
from ppo_vs_dpo.models.loading.config import ModelConfig
from ppo_vs_dpo.papers.settings import all_settings, unknown
from ppo_vs_dpo.pipeline.composing.schema import (
    CONFIGS,
    SECTIONS,
    load_class,
    root_keys,
    section_keys,
    sweep_problems,
)
from ppo_vs_dpo.pipeline.composing.words import everywhere, experiments, no_such_choice, tracker_problems
from ppo_vs_dpo.preferences.config import data_class

GROUPS = ("experiment", "paper", "model", "data", "sft", "reward_model", "dpo", "ppo", "compare", "judge", "deepspeed")
# Bytes of a run's default name before it is cut; most file systems end at 255, and folders stand beside it.
LONGEST_NAME = 120
# Bytes of one name in a path, on nearly every file system.
LONGEST_PART = 255
# Mappings whose keys are somebody else's: any name is taken.
OPEN_SECTIONS = ("model.architecture.", "launch.expected_seconds.", "deepspeed.")


def prepare_overrides(overrides: list[str]) -> list[str]:
    """Check the keys of command-line overrides and mark those that may be new in their section for Hydra.

    A stage's section takes every field of its argument class without a ``+``: ``sft.warmup_steps=10``.

    Raises:
        UserError: something that is not an override, or unknown keys, each with the nearest valid one.
    """
    prepared, problems = sort_overrides(overrides)
    if problems:
        raise Complaint(problems)
    return prepared


def sort_overrides(overrides: list[str]) -> tuple[list[str], list[str]]:
    """Command-line overrides as Hydra takes them, and a sentence for each that has an unknown key and is left out.

    Raises:
        UserError: something that is not an override.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(everywhere(overrides))
    except HydraException as error:
        raise UserError(
            f"cannot read the command line: {first_sentence(error)}. After the experiment's name, which stands "
            f"first, all is key=value."
        ) from None
    problems, prepared = [], []
    keys: dict[str, list[str]] = {}
    for override in parsed:
        key = override.key_or_group
        section, _, rest = key.partition(".")
        text = override.input_line
        # Its keys (hydra.sweep.dir) and its groups (hydra/launcher).
        hydras = section == "hydra" or key.startswith("hydra/")
        if key == "stages" and not override.is_sweep_override() and not isinstance(override.value(), list):
            problems.append(f"{text}: it is a list: stages=[{override.value()}]")
            continue
        if (key in GROUPS and _names_a_group(override)) or hydras or override.is_add():
            prepared.append(text)
        elif section in SECTIONS and rest:
            valid = keys.setdefault(section, section_keys(section))
            name = rest.split(".")[0]
            if name not in valid:
                problems.append(f"{key}: no such key.{nearest(name, valid)}")
                continue
            if name == "sweep" and isinstance(override.value(), list):
                prepared.append(f"++{key}=null")  # grids in place of a mapping: the two cannot be merged
            prepared.append(text if override.is_delete() else f"++{text}")
        else:
            valid = [*root_keys(), *SECTIONS, "experiment"]
            known = key in valid or key.startswith(OPEN_SECTIONS)
            if not known:
                problems.append(f"{key}: no such key.{nearest(key, valid)}")
                continue
            prepared.append(f"++{text}" if key.startswith(OPEN_SECTIONS) else text)
    return prepared, problems


def _names_a_group(override: Override) -> bool:
    return not isinstance(override.value(), dict) and "." not in override.key_or_group


def _is_swept(override: str) -> bool:
    try:
        return OverridesParser.create().parse_override(override).is_sweep_override()
    except HydraException:
        return False  # prepare_overrides says what is wrong with it


def emptied_keys(overrides: list[str]) -> list[str]:
    """Keys that were given as ``{}``: Hydra merges mappings, and merging nothing would change nothing."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    return [one.key_or_group for one in parsed if not one.is_sweep_override() and one.value() == {}]


@contextlib.contextmanager
def hydra_configs() -> Iterator[None]:
    """Hydra, looking into the project's configs/."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        yield


def load(overrides: list[str], check_missing: bool = True) -> DictConfig:
    """Compose, resolve and check a configuration.

    Returns:
        The resolved configuration, ``experiment`` and ``name`` filled in.

    Raises:
        UserError: anything wrong with it; a `Complaint` of all unknown and missing keys and all wrong values at once.
    """
    swept = [one for one in everywhere(overrides) if _is_swept(one)]
    if swept:
        raise UserError(f"{swept[0]} is several runs: ppo-vs-dpo -m {' '.join(overrides)}")
    prepared, problems = sort_overrides(overrides)
    with hydra_configs():
        try:
            config = compose(config_name="config", overrides=prepared, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise (Complaint([*problems, explain(error)]) if problems else UserError(explain(error))) from None
        experiment = chosen(dict(config.hydra.runtime.choices))
        task_overrides = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    return finish(config, experiment, task_overrides, False, check_missing, problems=problems)


def compose_plainly(overrides: list[str]) -> DictConfig:
    """The root with no experiment: for commands that use a section or two of it.

    Raises:
        UserError: unknown keys, or what Hydra cannot compose.
    """
    with hydra_configs():
        try:
            config = compose(config_name="config", overrides=prepare_overrides(overrides))
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(explain(error)) from None
    OmegaConf.set_struct(config, False)
    return config


def finish(
    config: DictConfig,
    experiment: str,
    overrides: list[str],
    multirun: bool,
    check_missing: bool = True,
    emptied: list[str] | None = None,
    problems: list[str] | None = None,
) -> DictConfig:
    """Name the run, drop Hydra's own section, empty what was given as ``{}``, check and resolve.

    ``overrides`` are those that the run's name is made of (with ``multirun`` all of them), ``emptied`` all, where
    those are not all; ``problems`` is what has been found wrong so far.
    """
    plain = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    OmegaConf.set_struct(plain, False)
    plain = OmegaConf.create(OmegaConf.to_container(plain, resolve=False))
    for key in emptied_keys(overrides if emptied is None else emptied):
        OmegaConf.update(plain, key, {}, merge=False)
    for section in (one for stage in ("dpo", "ppo") if OmegaConf.is_dict(one := plain.get(stage))):
        section.sweep = section.get("sweep")  # `~dpo.sweep` says that there is none; without the key nothing is said
    plain.experiment = experiment
    leave_open(plain, experiment, overrides if emptied is None else emptied)
    plain.update(dict.fromkeys(odd := odd_places(plain), "odd"))  # the rest is looked at, too
    # A sweep's jobs have a folder each: what differs between them is part of the name, also of a given one.
    if not plain.get("name") or multirun:
        plain.name = run_name(str(plain.get("name") or experiment), overrides, multirun)
    try:
        found = [*(problems or []), *odd.values(), *problems_in(plain, check_missing)]
        if found:
            raise Complaint(found, plain)
        OmegaConf.resolve(plain)
    except InterpolationResolutionError as error:
        raise UserError(f"the configuration cannot be resolved: {first_sentence(error)}") from None
    return plain


def odd_places(config: DictConfig) -> dict[str, str]:
    """By its key, a sentence for a run's name or folder that would be interpreted, or that nothing shows as it is."""
    found = {}
    for key in ("name", "output_dir"):
        text = OmegaConf.to_container(config, resolve=False).get(key)
        if not isinstance(text, str):
            continue
        shown = f"{key}={printable(text)[:80]!r}"
        if "${" in text:
            found[key] = f"{shown}: ${{...}} is not filled in here; write the {key} itself."
        elif any(not c.isprintable() for c in text):
            found[key] = f"{shown}: it has a line break or another control character."
        elif key == "name" and ".." in Path(text).parts:
            found[key] = f"{shown}: a run's folder lies in output_dir; give output_dir=... for another place."
        elif any(len(part.encode()) > LONGEST_PART for part in Path(text).parts):
            found[key] = f"{shown}...: a name has at most {LONGEST_PART} bytes."
    return found


def chosen(choices: dict[str, str | None]) -> str:
    """The experiment's name: as it was given, or ``paper/NAME`` for a paper's full configuration.

    Raises:
        UserError: neither or both were given.
    """
    given = [
        f"paper/{value}" if group == "paper" else value
        for group in ("experiment", "paper")
        if (value := choices.get(group)) and value != "null"
    ]
    if not given:
        raise UserError(f"which experiment? Give experiment=NAME, one of: {', '.join(experiments())}.")
    if len(given) > 1:
        raise UserError(f"experiment={given[0]} and paper={given[1].removeprefix('paper/')}: give one of them.")
    return given[0]


def leave_open(config: DictConfig, experiment: str, overrides: list[str]) -> None:
    """Set to ``???`` again what the experiment's own file leaves open and the command line does not fill.

    OmegaConf lets the value of an earlier file stand where a later one says ``???``: a paper's unpublished number
    would silently be the testbed's.
    """
    path = (
        CONFIGS / f"{experiment}.yaml"
        if experiment.startswith("paper/")
        else CONFIGS / f"experiment/{experiment}.yaml"
    )
    if not path.is_file():
        return
    given = {override.lstrip("+~").partition("=")[0] for override in overrides}
    for key in unknown(path):
        if not any(key == one or key.startswith(f"{one}.") for one in given):
            OmegaConf.update(config, key, "???", force_add=True)


def run_name(experiment: str, overrides: list[str], multirun: bool) -> str:
    """The default name: the experiment, the seed where one was given, and in a sweep what else differs."""
    parts = [experiment.replace("/", "-")]
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key == "seed":
            parts.append(f"seed{value}")
        elif multirun and key.split(".")[0] not in ("experiment", "stages", "launch", "output_dir", "name", "hydra"):
            parts.append(f"{key}={value}".replace("/", "-"))
    name = "-".join(parts)
    if len(name.encode()) <= LONGEST_NAME:
        return name
    return f"{name.encode()[:LONGEST_NAME].decode(errors='ignore')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def explain(error: Exception) -> str:
    """Hydra's and OmegaConf's errors in one or two lines."""
    if isinstance(error, MissingConfigException) and str(error.missing_cfg_file).startswith("paper/"):
        return no_such_choice(str(error.missing_cfg_file).replace("paper/", "paper:", 1), all_settings())
    if isinstance(error, MissingConfigException) and error.options:
        wanted = str(error.missing_cfg_file)
        own = wanted.startswith("experiment/")
        return no_such_choice(
            wanted, experiments() if own and set(error.options) <= set(experiments()) else list(error.options)
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException):
        lines += [line.strip() for line in str(cause).splitlines()[:1]]
    kept = [line for line in lines if not line.startswith(("object_type", "reference_type", "full_key"))]
    if ".sweep=" in lines[0] and any("Cannot merge" in line for line in lines):
        kept[1:] = ["The experiment's own sweep is a list of grids: give a list, sweep=[{kl_coef: [0.1, 0.3]}]."]
    return "the configuration cannot be composed: " + " ".join(kept[:4])


def problems_in(config: DictConfig, check_missing: bool = True) -> list[str]:
    """Hold every section to its classes: a sentence for every unknown key, wrong type and missing value."""
    problems = []
    if check_missing:
        missing = sorted(OmegaConf.missing_keys(config))
        # OmegaConf lets a typed default stand where a file says ???, so the model's path is looked at by hand.
        if not config.model.get("path") and not config.model.get("architecture"):
            missing = sorted({*missing, "model.path"})
        notes = notes_on(str(config.get("experiment")))
        problems += [f"{key}: required, and not set.{notes.get(key, '')}" for key in missing]
    known = [*root_keys(), *SECTIONS, "experiment"]
    problems += [f"{key}: no such key.{nearest(key, known)}" for key in config if key not in known]
    try:
        if not OmegaConf.missing_keys(config.model):
            OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), config.model))
    except UserError as error:
        problems.append(str(error))
    for section, (own, _) in SECTIONS.items():
        problems += check_section(section, config.get(section) or {}, own, check_missing)
    launch = plain_of(config.get("launch") or {})
    problems += out_of_range(launch, "launch")
    if isinstance(launch.get("processes"), str) and launch["processes"] != "auto":
        problems.append(f"launch.processes is {launch['processes']}; it must be at least 1, or auto.")
    if isinstance(seed := config.get("seed"), int) and not 0 <= seed < 2**32:
        problems.append(f"seed is {seed}; it must lie in [0, 2^32).")
    stages = list(config.get("stages") or [])
    if not stages:
        problems.append(f"stages is empty; it must name some of {', '.join(STAGES)}.")
    return problems + [f"stages: there is no stage {s}.{nearest(s, list(STAGES))}" for s in stages if s not in STAGES]


def notes_on(experiment: str) -> dict[str, str]:
    """Key -> `` (what its comment says)`` for what a paper's file leaves open."""
    path = CONFIGS / f"{experiment}.yaml"
    return {key: f" ({note})" for key, note in unknown(path).items() if note} if path.is_file() else {}


def plain_of(values: DictConfig | dict) -> dict[str, Any]:
    """A section as plain values, as far as they are known."""
    if not isinstance(values, DictConfig):
        return dict(values)
    return OmegaConf.to_container(values, resolve=False, throw_on_missing=False)


def refused_values(own_class: type, mine: dict[str, Any]) -> list[str]:
    """What a stage's own class says about its values: when it is made, and when it is asked."""
    settings = OmegaConf.merge(OmegaConf.structured(own_class), mine)
    if OmegaConf.missing_keys(settings):
        return []
    try:
        made = OmegaConf.to_object(settings)
    except UserError as error:
        return [str(error)]
    return made.problems() if hasattr(made, "problems") else []


def of_another_source(values: DictConfig | dict, own: set[str], known: Iterable[str]) -> list[str]:
    """Keys of ``data`` that other sources read and this one does not: they would say nothing.

    Args:
        values: the section.
        own: keys of its source.
        known: keys of all sources.
    """
    found = []
    for key in values:
        if key in own or key not in known:
            continue
        groups = {"path": "files", "inline": "inline", "prompts_path": "rejection"}
        hint = f" Choose another source with it: data={groups[key]} data.{key}=..." if key in groups else ""
        found.append(f"data.{key}: the source {values.get('source')} has no such key, other sources have.{hint}")
    return found


def check_section(section: str, values: DictConfig | dict, own: str, complete: bool = True) -> list[str]:
    """Problems of one stage's section."""
    valid = section_keys(section)
    problems = [f"{section}.{key}: no such key.{nearest(key, valid)}" for key in values if key not in valid]
    problems += refused_keys(plain_of(values), section)
    problems += tracker_problems(section, values)
    try:
        own_class = data_class(values) if section == "data" else load_class(own)
    except UserError as error:
        return [*problems, str(error)]
    own_names = set(own_class.__dataclass_fields__)
    if section == "data":
        problems += of_another_source(values, own_names, valid)
    mine: dict[str, Any] = {
        key: values._get_node(key) if isinstance(values, DictConfig) else values[key]
        for key in values
        if key in own_names
    }
    for key, value in mine.items():
        try:
            OmegaConf.merge(OmegaConf.structured(own_class), {key: value})
        except OmegaConfBaseException as error:
            first = first_sentence(error.msg or error)
            problems.append(f"{section}.{error.full_key or key}: {first}")
    problems += out_of_range(plain_of(values), section)
    # A merge lets a default stand where a file says ???; what is still to be set is asked for, not judged.
    incomplete = isinstance(values, DictConfig) and bool(OmegaConf.missing_keys(values))
    if complete and not incomplete:
        # What stages refuse about values is refused here, before the first of them has worked for hours.
        wrong = {key for line in problems if (key := key_of(line, section)) in mine}
        sound = {key: value for key, value in mine.items() if key not in wrong}
        problems += [one for one in refused_values(own_class, sound) if not any(key in one for key in wrong)]
    return problems + list(sweep_problems(section, values.get("sweep") if hasattr(values, "get") else None, valid))
