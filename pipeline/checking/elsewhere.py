"""What the machines of a hostfile get of this one's environment.

DeepSpeed's launcher hands on what begins with NCCL and PYTHON, and the lines of ``~/.deepspeed_env``. All else that a
run is told by its environment (threads, where models lie, which interface to use, how memory is handed out) would hold
for this machine alone, without a word.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from ppo_vs_dpo.artifacts.files import write_text

# The beginnings of names that matter to a run.
NAMES = (
    "HF_", "OMP_", "MKL_", "GLOO_", "TORCH", "PYTORCH_", "TOKENIZERS_", "TRANSFORMERS_", "WANDB_", "VLLM_",
)  # fmt: skip
# Theirs would stand in a file, and in the command line of every machine.
_SECRET = re.compile("TOKEN$|KEY|SECRET|PASSW|CREDENTIAL|AUTH")
# An address with a user's name and word in it is one, too.
_SIGNED = re.compile(r"://[^/\s]*@")
# What DeepSpeed reads: a name in the home folder and in this one, or, where it is absolute, that file.
VARIABLE, DEFAULT = "DS_ENV_FILE", ".deepspeed_env"


def own_files() -> list[Path]:
    """The user's own files of variables that are handed on."""
    files = [place / os.environ.get(VARIABLE, DEFAULT) for place in (Path.home(), Path())]
    return [file for file in files if file.is_file()]


def wanted(environment: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Names of variables that matter to a run, and of those among them that are secrets."""
    names = sorted(name for name, value in environment.items() if name.startswith(NAMES) and "\n" not in value)
    secrets = [name for name in names if _SECRET.search(name) or _SIGNED.search(environment[name])]
    return [name for name in names if name not in secrets], secrets


def not_handed_on(environment: Mapping[str, str]) -> list[str]:
    """Names that other machines will not see: where the user has a file, those that it lacks; else secrets."""
    names, secrets = wanted(environment)
    files = own_files()
    if not files:
        return secrets
    known = {
        line.partition("=")[0].strip() for file in files for line in file.read_text(encoding="utf-8").splitlines()
    }
    return [name for name in (*names, *secrets) if name not in known]


def handed_on(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """What makes DeepSpeed's launcher hand an environment on: its variables in a file of ``folder``, without secrets.

    Nothing where the user has such a file.
    """
    if own_files():
        return {}
    file = folder / "environment"
    write_text(file, "".join(f"{name}={environment[name]}\n" for name in wanted(environment)[0]))
    return {VARIABLE: str(file.resolve())}
