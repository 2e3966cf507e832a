"""Gold rewards and other judges on text that the configuration names as ``package.module:function``."""

import importlib
from collections.abc import Callable

from ppo_vs_dpo.artifacts.errors import UserError


def load_gold(name: str) -> Callable[..., list[float]]:
    """The function that ``data.gold`` names.

    Args:
        name: ``package.module:function``.

    Raises:
        UserError: no such module or function.
    """
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"data.gold={name}: {error}. Give it as package.module:function.") from error
