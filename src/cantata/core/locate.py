"""Where configs, recipes and assets lie: inside the wheel, or beside `src` in a checkout."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from cantata.core.errors import ConfigError
from cantata.core.suggest import hint

EMBEDDED = "embedded:"
"""Prefix of a path that means a file carried by the package."""

_PACKAGE = Path(str(files("cantata")))


def configs_dir() -> Path:
    """The folder of YAML that Hydra composes from."""
    return _shipped("configs")


def recipes_dir() -> Path:
    """The folder of recipes, one script for each stage."""
    return _shipped("recipes")


def asset(path: str) -> Path:
    """The file or folder that `path` names; `embedded:NAME` is one that the package carries.

    Raises `ConfigError` where there is none.
    """
    if not path.startswith(EMBEDDED):
        found = Path(path).expanduser()
        if not found.exists():
            raise ConfigError(f"{path}: no such file or folder (looked at {found.absolute()})")
        return found
    name = path.removeprefix(EMBEDDED)
    found = _PACKAGE / "assets" / name
    if not name or not found.exists():
        known = [entry.name for entry in (_PACKAGE / "assets").iterdir()]
        raise ConfigError(f"{path}: the package carries no such file{hint(name, known)}")
    return found


def _shipped(folder: str) -> Path:
    inside = _PACKAGE / folder
    return inside if inside.is_dir() else _PACKAGE.parents[1] / folder
