"""What becomes of an exception that ends a stage: one sentence for a person, the traceback for the log."""

import errno
import os
import re
import traceback
from pathlib import Path
from pickle import UnpicklingError

from ppo_vs_dpo.artifacts.errors import UserError, explain_os_error, first_sentence, out_of_memory

# Libraries that check what they are given: what they refuse is about settings or inputs, not a defect of this project.
LIBRARIES = ("trl", "transformers", "peft", "accelerate", "datasets", "deepspeed", "huggingface_hub", "tokenizers")
REFUSALS = (ValueError, TypeError, NotImplementedError, ImportError, LookupError, OSError, AssertionError)
# How libraries say that the disk is full when the operating system's error has got lost on the way.
FULL = re.compile(
    r"no space left on device|os error 28|disk quota exceeded|PytorchStreamWriter failed|file write failed"
    # torch.save, where the last bytes of a file did not get down.
    r"|inline_container\S*\s*\.\s*unexpected pos",
    re.I,
)


def explain(error: BaseException) -> str | None:
    """One sentence (or several, of a `UserError`) where the cause can be mended; ``None`` for a defect."""
    if isinstance(error, UserError):
        return str(error)
    for one in chain(error):
        if isinstance(one, OSError) and (said := explain_os_error(one)):
            return said
        if FULL.search(str(one)):
            return explain_os_error(OSError(errno.ENOSPC, "")) or ""
        if out_of_memory(one):
            return (
                f"memory is full: {first_sentence(one)}{_place(one)}. `ppo-vs-dpo plan` says what each stage needs; "
                f"smaller batches, gradient_checkpointing=true, adapters (lora) or deepspeed=zero3 need less."
            )
        if isinstance(one, UnpicklingError):
            return f"{_file_of(one) or 'a file of weights'} is not loaded: {of_a_pickle(one)}."
    library = refused_by(error)
    if library is None:
        return None
    return f"{library} refuses: {first_sentence(error)}{_place(error)}"


def of_a_pickle(error: UnpicklingError) -> str:
    """Why a pickled file is not loaded: it names code, which is never run, or it is none that can be read."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    if found:
        return f"it holds more than tensors ({found[1]}), which could run anything; only tensors are loaded"
    return "it cannot be read"


def _file_of(error: BaseException) -> Path | None:
    """The file that was being unpickled, as the functions that did it had it."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        for value in frame.f_locals.values():
            if isinstance(value, str | os.PathLike) and Path(value).suffix in (".bin", ".pt", ".pth", ".ckpt"):
                return Path(value)
    return None


def not_found(path: str, error: BaseException) -> str:
    """Why a model is not there: what is wrong with its folder, or that there is no such folder and the Hub's word."""
    if Path(path).expanduser().is_dir():
        return first_sentence(error)
    return f"there is no such folder here, and it could not be read from the Hub: {first_sentence(error)}"


def chain(error: BaseException):
    """An exception and those it was raised from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def refused_by(error: BaseException) -> str | None:
    """The library that raised an exception about what it was given, or ``None``."""
    if not isinstance(error, REFUSALS):
        return None
    frames = traceback.extract_tb(error.__traceback__)
    parts = Path(frames[-1].filename).parts if frames else ()
    if "site-packages" not in parts:
        return None
    package = parts[len(parts) - parts[::-1].index("site-packages")]
    return package if package in LIBRARIES else None


def of_a_defect(error: BaseException) -> str:
    """What is said of an exception that nobody expected."""
    return f"{type(error).__name__}: {first_sentence(error)}{_place(error)}. The traceback is above, in the log."


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
