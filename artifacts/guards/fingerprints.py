"""What each stage's result depends on, found by walking the resolved configuration.

Whatever a section names counts: a file's or a folder's content, an adapter's base, the source of a function and of the
user's own modules that it imports, a template of ours by its name. A list of keys would forget the next one.

What only cuts up the work of an update, on a rank or over ranks, may change between two attempts at one result: the
rows of the update may not.
"""

import ast
import errno
import re
import sysconfig
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from ppo_vs_dpo.artifacts.errors import not_the_file
from ppo_vs_dpo.artifacts.files import read_marker, sha256_of
from ppo_vs_dpo.artifacts.guards.digests import Digests
from ppo_vs_dpo.artifacts.guards.versions import ROOMS, ROOT

# What a stage reads from other stages' folders.
NEEDS = {
    "data": (),
    "sft": ("data",),
    "pairs": ("data", "sft"),
    "reward_model": ("sft", "pairs"),
    "dpo": ("sft", "pairs"),
    "ppo": ("data", "sft", "reward_model"),
    "compare": ("data", "sft", "pairs", "reward_model", "dpo", "ppo"),
}
# Those that train a model.
TRAINED = ("sft", "reward_model", "dpo", "ppo")
# What a stage reads from the configuration, besides its own section and the seed.
READS = {
    "data": ("model",),
    "sft": ("model",),
    "pairs": ("data", "model"),
    "reward_model": ("model", "data"),
    "dpo": ("model",),
    "ppo": ("model", "data"),
    "compare": ("model", "data"),
}
# Keys that change how a result is made, not what it is.
COSMETIC = ("report_to", "disable_tqdm", "logging_steps", "run_name", "workers")
COSMETIC += ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision")
# The rows of an update are their product, times the ranks: transformers' defaults.
ROWS = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
# Keys of a training stage that change the cut of its work, and of its result the rounding.
CUT = (*ROWS, "per_device_eval_batch_size", "precompute_ref_batch_size", "eval_accumulation_steps")
CUT += ("micro_batch_tokens", "local_rollout_forward_batch_size", "torch_empty_cache_steps")
CUT += ("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_offloading")
CUT += ("activation_checkpointing", "activation_checkpointing_kwargs")
CUT += ("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers")
# Losses that compare the rows of one pass with each other, or average over its tokens (trl 1.16, `DPOTrainer`).
OF_A_PASS = ("aot", "aot_unpaired", "sft")
# Keys whose values are names of something else, also where a file of that name lies about.
NAMES = frozenset(
    {"source", "format", "split", "test_split", "subset", "kind", "name", "sft", "mode", "rule", "revision", "dtype"}
    | {
        "model_type",
        "attn_implementation",
        "optim",
        "lr_scheduler_type",
        "save_strategy",
        "eval_strategy",
        "dimension",
    }
    | {"logging_strategy", "head_init", "value_from", "loss_type", "target_modules", "base_url", "api_key_env"}
    | {"loss", "loss_average", "advantage", "preference_labels", "importance_sampling"}
    | {"reward_shaping", "reward_ensemble", "reward_aggregation"}
)
# A word with neither a slash nor a dot is a name, but for keys that hold a place, and there but for these words.
BARE, PLACES, WORDS = re.compile(r"[\w-]+\Z"), ("path", "completions", "few_shot", "reward_model"), ("testbed",)
# Where our own files lie that a configuration names without a path: key -> folder in configs/.
OURS = {"template": "judge", "constitution": "constitution"}
CONFIGS = ROOT / "configs"

_LATE_IMPORTS = ("import_module", "__import__")
FUNCTION = re.compile(r"^(?P<module>[A-Za-z_][\w.]*|[^:]+\.py):(?P<name>[A-Za-z_][\w.]*)$")


def point_text(point: dict[str, Any]) -> str:
    """As `artifacts.stage.parse_point` reads a point: ``{"lam": None, "kl_coef": 0}`` -> ``"kl_coef=0,lam=null"``."""
    return ",".join(f"{key}={'null' if value is None else value}" for key, value in sorted(point.items()))


def point_name(stage: str, point: dict[str, Any]) -> str:
    """Name of a stage's run at a point of a sweep: ``("ppo", {"kl_coef": 0.0})`` -> ``"ppo,kl_coef=0.0"``."""
    return ",".join([stage, *([point_text(point)] if point else [])])


def points_of(config: DictConfig, stage: str) -> list[dict[str, Any]]:
    """Points of a stage's sweep.

    A mapping varies each of its keys alone: ``{"kl_coef": [0, 1]}`` -> ``[{"kl_coef": 0}, {"kl_coef": 1}]``. A list of
    mappings is a grid each, every combination of its values (as scikit-learn's ``ParameterGrid``). A value equal to
    the main run's is left out of its point: what then has none is the main run.
    """
    section = config.get(stage)
    sweep = OmegaConf.to_container(section.get("sweep"), resolve=True) if section and section.get("sweep") else {}
    if isinstance(sweep, dict):
        grids = [{key: values} for key, values in sweep.items()]
    else:
        grids = [grid for grid in sweep if isinstance(grid, dict)]
    grids = [grid for grid in grids if all(isinstance(v, list) for v in grid.values())]  # refused elsewhere
    points = [dict(zip(grid, values, strict=True)) for grid in grids for values in product(*grid.values())]
    points = [{key: value for key, value in point.items() if value != section.get(key)} for point in points]
    return [point for point in points if point]


def needs_of(config: DictConfig, stage: str) -> tuple[str, ...]:
    """The jobs whose results a stage reads; `compare` reads every point of every sweep."""
    points = [point_name(other, point) for other in NEEDS for point in points_of(config, other)]
    return (*NEEDS[stage], *(points if stage == "compare" else ()))


class Made(NamedTuple):
    """What a job's result depends on.

    Attributes:
        fingerprint: hash of all of it.
        parts: hash of each part under its name.
        update: of a job that trains, how its updates are cut up (`update_of`), as it is hashed.
    """

    fingerprint: str
    parts: dict[str, str]
    update: dict[str, Any] | None = None


def bound_by(section: dict[str, Any]) -> str | None:
    """The setting of a stage by which the rows of one pass are part of its result, and not of the cut alone.

    Rows that an epoch leaves out (``dataloader_drop_last``) are those of a pass that would not be full.
    """
    losses = section.get("loss_type") or ()
    losses = (losses,) if isinstance(losses, str) else losses
    if any(loss in OF_A_PASS for loss in losses):
        return "loss_type"
    if section.get("dataloader_drop_last"):
        return "dataloader_drop_last"
    return "average_tokens_across_devices" if section.get("average_tokens_across_devices") is False else None


def cut_keys(section: dict[str, Any]) -> tuple[str, ...]:
    """The keys of `CUT` that may change between two attempts at a stage."""
    return tuple(key for key in CUT if bound_by(section) is None or key not in ROWS)


def update_of(section: dict[str, Any], ranks: int | None) -> dict[str, Any] | None:
    """The cut of a stage's updates: ``{"settings": its keys of `cut_keys`, "ranks": 2, "rows": 16, "bound": None}``.

    ``rows`` is an update's, over all ranks (PPO: responses); ``bound`` is `bound_by`. ``None`` where a number is none,
    or nobody knows the ranks: refused elsewhere, before work.
    """
    counts = [section.get(key) or default for key, default in ROWS.items()]
    if ranks is None or any(type(count) is not int or count < 1 for count in counts):
        return None
    rows = section.get("rollout_batch_size") or prod(counts) * ranks
    settings = {key: section[key] for key in cut_keys(section) if key in section}
    return {"settings": settings, "ranks": ranks, "rows": rows, "bound": bound_by(section)}


def fingerprints(
    config: DictConfig,
    digests: Digests | None = None,
    ranks: int | None = 1,
    recorded: Callable[[str], dict[str, Any] | None] = lambda name: None,
) -> dict[str, Made]:
    """Of every job of a run: what its result depends on.

    Args:
        digests: keeps the hashes of files that did not change; ``None`` reads them all.
        ranks: of a training stage that starts now; ``None`` where nobody knows.
        recorded: with what there is of a job was begun, by its name: ``{"fingerprint": ..., "update": ...}``
            (`update_of`). Where only the cut differs, and not the rows of an update, the job is what it was.
    """
    inputs = external_inputs(config, digests or Digests(None))
    found: dict[str, Made] = {}
    for stage in NEEDS:
        for point in [{}, *points_of(config, stage)]:
            found[point_name(stage, point)] = _made(config, stage, point, inputs, found, ranks, recorded)
    return found


def fingerprint_of(
    config: DictConfig,
    stage: str,
    point: dict[str, Any],
    digests: Digests | None = None,
    ranks: int | None = 1,
    recorded: Callable[[str], dict[str, Any] | None] = lambda name: None,
) -> Made:
    """`fingerprints` of one job; the point need not be one of the sweep's."""
    known = fingerprints(config, digests, ranks, recorded)
    name = point_name(stage, point)
    if name in known:
        return known[name]
    inputs = external_inputs(config, digests or Digests(None))
    return _made(config, stage, point, inputs, known, ranks, recorded)


def _made(
    config: DictConfig,
    stage: str,
    point: dict[str, Any],
    inputs: dict[str, str],
    known: dict[str, Made],
    ranks: int | None,
    recorded: Callable[[str], dict[str, Any] | None],
) -> Made:
    own = OmegaConf.to_container(config.get(stage, OmegaConf.create({})), resolve=True) or {}
    own = {key: value for key, value in own.items() if key not in (*COSMETIC, "sweep")}
    parts = {"the seed": str(config.get("seed"))}
    for section in READS[stage]:
        if config.get(section) is not None:
            parts[f"the section {section}"] = sha256_of(OmegaConf.to_container(config[section], resolve=True))
    sections = (*READS[stage], stage)
    parts |= {
        f"the content of {key}": value for key, value in inputs.items() if re.split(r"[.\[]", key)[0] in sections
    }
    parts |= {f"stage {name}": known[name].fingerprint for name in needs_of(config, stage)}

    def made(own: dict[str, Any], update: dict[str, Any] | None) -> Made:
        whole = {f"the settings of {stage}": sha256_of([own, point]), **parts}
        return Made(sha256_of(whole), whole, update)

    if stage not in TRAINED:
        return made(own, None)
    update, keys = update_of({**own, **point}, ranks), cut_keys({**own, **point})
    before = recorded(point_name(stage, point)) if not {*CUT} & point.keys() else None
    cut = before["update"] if before is not None else None
    # Where nobody knows the ranks, nothing is started, and what there is may well be of these rows.
    if cut is not None and (ranks is None or (update is not None and cut["rows"] == update["rows"])):
        settings = {key: value for key, value in cut["settings"].items() if key in keys}
        same = made({key: value for key, value in own.items() if key not in keys} | settings, cut)
        if same.fingerprint == before["fingerprint"]:
            return same
    return made(own, update)


# ---------------------------------------------------------------------------------------- what a configuration names


def external_inputs(config: DictConfig, digests: Digests) -> dict[str, str]:
    """Hash of everything outside of the run that its sections name: dotted key -> hash."""
    found = {}
    for section in {*NEEDS, *(name for names in READS.values() for name in names)}:
        value = config.get(section)
        if value is None:
            continue
        plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        for key, text in leaves(plain, section):
            content = content_of(text, key, digests)
            if content is not None:
                found[key] = content
    return dict(sorted(found.items()))


def leaves(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """``(dotted key, text)`` of every text in nested dicts and lists."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from leaves(item, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from leaves(item, f"{key}[{number}]")
    elif isinstance(value, str):
        yield key, value


def content_of(text: str, key: str, digests: Digests) -> str | None:
    """Hash of the file, folder or function that a text names; ``None`` where it names none."""
    name = re.sub(r"\[\d+\]$", "", key).rpartition(".")[2]
    if not text or len(text) > 4096 or "\n" in text or "\0" in text or name in NAMES:
        return None
    if name in OURS and (ours := CONFIGS / OURS[name] / f"{text}.yaml").is_file():
        return digests.of(ours)
    if BARE.match(text) and (not name.endswith(PLACES) or text in WORDS):
        return None  # `ppo.reward=reward_model` is no folder, though one of that name may lie where one types
    path = Path(text).expanduser()
    try:
        if path.exists():
            return sha256_of([digests.of(path), *_bases(path, digests)])
    except OSError as error:
        # A disk that does not answer makes no finished stage stale; what nobody may read here may be no path at all.
        if not_the_file(error) and error.errno not in (errno.EACCES, errno.EPERM):
            raise
        return None
    match = FUNCTION.match(text)
    source = source_of(match["module"]) if match else None
    return sha256_of([digests.of(one) for one in own_files(source)]) if source else None


def _bases(folder: Path, digests: Digests, depth: int = 0) -> list[str]:
    """Hashes of the local models that an adapter stands on."""
    base = (read_marker(folder / "adapter_config.json") or {}).get("base_model_name_or_path")
    if not isinstance(base, str) or depth > 5 or not Path(base).exists():
        return []
    return [digests.of(Path(base)), *_bases(Path(base), digests, depth + 1)]


def source_of(module: str) -> Path | None:
    """The file of a module, by its name or its path; nothing is imported."""
    if module.endswith(".py"):
        return Path(module) if Path(module).is_file() else None
    spec, places = None, None
    for part in module.split("."):
        spec = PathFinder.find_spec(part if spec is None else f"{spec.name}.{part}", places)
        if spec is None:
            return _of_this_package(module)
        places = spec.submodule_search_locations
        if places is None and part != module.split(".")[-1]:
            return None
    return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None


def _of_this_package(module: str) -> Path | None:
    root, _, rest = module.partition(".")
    path = ROOT.joinpath(*rest.split("."))
    files = [one for one in (path.with_suffix(".py"), path / "__init__.py") if one.is_file()]
    return files[0] if root == "ppo_vs_dpo" and files else None


def own_files(source: Path) -> list[Path]:
    """A module's file, those of the user's own modules that it imports, one after the other, and files they read.

    Of a package its ``__init__.py`` counts, too; of what is read, files that the source names (a word list that is
    opened for reading). Installed packages, Python's own and this project's rooms are left out: their versions are
    part of what made a stage.
    """
    installed = [Path(sysconfig.get_paths()[name]).resolve() for name in ("stdlib", "purelib", "platlib")]
    installed += [ROOT / room for room in ROOMS]
    found: dict[Path, bool] = {}
    read: set[Path] = set()
    waiting = [source.resolve()]
    while waiting:
        path = waiting.pop()
        if path in found or any(place in path.parents for place in installed):
            continue
        found[path] = True
        if (package := path.parent / "__init__.py").is_file() and path.parent != ROOT:
            waiting.append(package)
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            continue
        waiting += [other.resolve() for other in _imports(tree, path)]
        read |= {file.resolve() for file in _read_by(tree, path)}
    return sorted({*found, *read})


_READS = re.compile(r"open|read\w*|load\w*|from_pretrained|pipeline|genfromtxt|fromfile")


def _read_by(tree: ast.AST, path: Path) -> Iterator[Path]:
    """Files that a module names where it reads: ``open("words.txt")``, ``Path(...).read_text()``, ``pd.read_csv``."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", None) or getattr(node.func, "id", "")
        texts = [one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        writes = name == "open" and any(re.fullmatch(r"[wax]b?t?\+?|r\+b?", text) for text in texts)
        if not _READS.fullmatch(name) or writes:
            continue
        for text in texts:
            if 0 < len(text) < 256 and text.isprintable():
                yield from (file for place in (path.parent, Path()) if (file := place / text).is_file())


def _module_at(place: Path) -> Path | None:
    """The file of a module or package at a path without its ending."""
    found = (place.with_name(f"{place.name}.py"), place / "__init__.py")
    return next((file for file in found if place.name and file.is_file()), None)


def _imports(tree: ast.AST, path: Path) -> Iterator[Path]:
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in _LATE_IMPORTS:
            names = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.ImportFrom):
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            beside = [base, *(base / alias.name for alias in node.names)]
            yield from (file for one in beside if (file := _module_at(one)) is not None)
        for name in names:
            other = (_module_at(path.parent.joinpath(*name.split("."))) or source_of(name)) if name else None
            if other is not None:
                yield other
