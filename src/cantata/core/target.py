"""Which classes and functions a config may name, and how they are found."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

from cantata.core.errors import ConfigError
from cantata.core.suggest import hint

TARGET = "_target_"
ALLOWED = ("cantata.", "torch.")


def find_target(name: str) -> Callable[..., Any]:
    """The class or function that `name` points at.

    Raises `ConfigError` where the name is not allowed, not there, or cannot be called.
    """
    if not name.startswith(ALLOWED):
        raise ConfigError(f"a target must begin with {' or '.join(ALLOWED)}")
    module, rest = _import_longest(name)
    found: Any = module
    for part in rest:
        if not hasattr(found, part):
            raise ConfigError(f"{_name(found)} has no {part}{hint(part, _public(found))}")
        found = getattr(found, part)
    # A module's own imports are attributes too: `torch.os.system` must not pass for torch's.
    if not f"{getattr(found, '__module__', '')}.".startswith(ALLOWED):
        raise ConfigError(f"it is not defined by {' or '.join(prefix[:-1] for prefix in ALLOWED)}")
    if not callable(found):
        raise ConfigError("it is neither a class nor a function")
    target: Callable[..., Any] = found
    return target


def _import_longest(name: str) -> tuple[ModuleType, list[str]]:
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        path = ".".join(parts[:count])
        try:
            return importlib.import_module(path), parts[count:]
        except ImportError as error:
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing is None or not f"{path}.".startswith(f"{missing}."):
                raise ConfigError(f"importing {path} failed: {error}") from error
    raise ConfigError("no such module")


def _name(found: Any) -> str:
    return str(getattr(found, "__name__", found))


def _public(found: Any) -> set[str]:
    names = {name for name in vars(found) if not name.startswith("_") and callable(getattr(found, name))}
    if isinstance(found, ModuleType) and hasattr(found, "__path__"):
        names |= {module.name for module in pkgutil.iter_modules(found.__path__)}
    return names
