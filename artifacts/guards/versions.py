"""Which code a stage was made by: the project's own source, and the libraries that decide results."""

import functools
import hashlib
import importlib.metadata
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = (
    *("ppo-vs-dpo", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed"),
    *("numpy", "scipy", "scikit-learn", "evaluate", "hydra-core"),
)
# Of these another version may end with other bits.
DECISIVE = ("torch", "transformers", "trl", "peft", "accelerate")
ROOT = Path(__file__).parents[2]
ROOMS = ("artifacts", "models", "preferences", "sft", "reward_model", "ppo", "dpo", "compare")


def versions() -> dict[str, str | None]:
    """Installed versions of the packages that decide results."""
    return {package: _version(package) for package in PACKAGES}


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The project's commit, with ``-dirty`` where files differ; ``None`` outside a checkout."""
    if not (ROOT / ".git").exists():
        return None
    try:
        run = ["git", "-C", str(ROOT)]
        commit = subprocess.run([*run, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run([*run, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if dirty.strip() else commit


@functools.cache
def source_hash() -> str:
    """Hash of the code that makes stages (of this package's rooms, without the command and the documentation)."""
    digest = hashlib.sha256()
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def made_by() -> dict[str, Any]:
    """What makes a stage now: ``source``, ``commit``, and the decisive versions."""
    found = versions()
    return {
        "ppo-vs-dpo": found["ppo-vs-dpo"],
        "commit": git_commit(),
        "source": source_hash(),
        **{name: found[name] for name in DECISIVE},
    }


def differences(there: dict[str, Any] | None, here: dict[str, Any]) -> list[str]:
    """What another stage was made by that this is not, in words; empty where both are the same code."""
    if not isinstance(there, dict):
        return ["it does not say by which version"]
    found = [
        f"{name} {there.get(name)} there, {here.get(name)} here"
        for name in DECISIVE
        if there.get(name) != here.get(name)
    ]
    if there.get("source") != here.get("source"):
        found.insert(0, f"ppo-vs-dpo {_name(there)} there, {_name(here)} here")
    return found


def _name(made: dict[str, Any]) -> str:
    commit = (made.get("commit") or "")[:12]
    dirty = "-dirty" if str(made.get("commit") or "").endswith("-dirty") else ""
    return f"{made.get('ppo-vs-dpo')} ({commit + dirty + ', ' if commit else ''}source {made.get('source')})"
