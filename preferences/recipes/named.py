"""Gold rewards and other judges on text that the configuration names as ``package.module:function``."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from ppo_vs_dpo.artifacts.errors import UserError


def load_gold(name: str, key: str = "data.gold") -> Callable[..., list[float]]:
    """The function that a key of the configuration names.

    Args:
        name: ``my_file.py:function``, or ``package.module:function`` (the working folder counts as a place to look).

    Raises:
        UserError: no such file, module or function; or the file cannot be run.
    """
    module, _, function = name.partition(":")
    try:
        found = _from_file(Path(module)) if module.endswith(".py") else _from_module(module)
        if not callable(getattr(found, function, None)):
            raise ImportError(f"{module} has no function {function!r}{_there(found)}")
        return getattr(found, function)
    except (ImportError, ValueError, SyntaxError) as error:
        raise UserError(
            f"{key}={name}: {error}. Give it as my_file.py:function or package.module:function."
        ) from error


def _there(module: ModuleType) -> str:
    """The functions that a module defines itself."""
    own = [name for name, one in vars(module).items() if getattr(one, "__module__", None) == module.__name__]
    names = [name for name in own if callable(getattr(module, name)) and not name.startswith("_")]
    return f"; it has {', '.join(names)}" if names else ""


def _from_file(path: Path) -> ModuleType:
    """A Python file as a module, under a name that hides nothing; files beside it can be imported."""
    path = path.expanduser().resolve()
    if not path.is_file():
        raise ImportError(f"{path} does not exist")
    name = f"ppo_vs_dpo_file_{path.stem}"
    known = sys.modules.get(name)
    if known is not None and known.__file__ == str(path):
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ImportError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def _from_module(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here in sys.path:
        return importlib.import_module(name)
    sys.path.append(here)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(here)
