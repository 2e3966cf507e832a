"""Going on from a checkpoint that is whole and of these settings, in every stage that trains."""

import contextlib
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import UnpicklingError

from safetensors import SafetensorError

from ppo_vs_dpo.artifacts.errors import UserError, not_the_file, warn
from ppo_vs_dpo.artifacts.guards.checkpoints import newest_whole, set_aside
from ppo_vs_dpo.artifacts.guards.refusals import of_a_pickle
from ppo_vs_dpo.artifacts.stage import StageContext
from ppo_vs_dpo.models.sharding.collectives import of_first
from ppo_vs_dpo.models.sharding.state import check_sharding


def resume_point(context: StageContext, folder: str | Path, sharded: bool) -> Path | None:
    """The checkpoint that a stage goes on from, the same on all ranks; ``None`` where it begins anew.

    The main process decides, and sets aside what is not fit.

    Args:
        sharded: the optimizer is DeepSpeed's.

    Raises:
        UserError: the optimizer's state in it is of the other kind: transformers' Trainer would go on without it.
    """
    found = of_first(newest_whole(Path(folder), context.fingerprint) if context.is_main_process else None)
    if found is not None:
        check_sharding(found, sharded)
    if found is not None and context.is_main_process:
        warn(f"going on from {found}\n")
    return found


@contextlib.contextmanager
def readable(checkpoint: Path | None, context: StageContext, has_begun: Callable[[], bool]) -> Iterator[None]:
    """Around training: a checkpoint that does not load is set aside, so that the same command goes on from another.

    Args:
        has_begun: whether a step has been taken since; what fails then is not the checkpoint's fault.

    Raises:
        UserError: it did not load; says why, and that the same command helps.
    """
    try:
        yield
    except (OSError, EOFError, ValueError, LookupError, RuntimeError, UnpicklingError, SafetensorError) as error:
        if checkpoint is None or has_begun() or not_the_file(error) or not _while_reading(error, checkpoint):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = of_a_pickle(error) if isinstance(error, UnpicklingError) else lines[-1].strip()
        if context.is_main_process:
            set_aside(checkpoint, reason)
        raise UserError(
            f"{checkpoint} could not be read ({reason}); it is set aside. Start the same command again: it goes on "
            f"from the checkpoint before, or begins this stage anew."
        ) from error


def _while_reading(error: BaseException, checkpoint: Path) -> bool:
    """Whether an exception arose where a checkpoint is read: in a function that has its path, or that loads one."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = frame.f_code.co_name
        if re.search(r"load.*(checkpoint|optimizer|scheduler|rng|state|trained)|^load_state|^read$", name):
            return True
    return str(checkpoint) in str(error)
