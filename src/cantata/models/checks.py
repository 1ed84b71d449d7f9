"""What settings of several families must fulfil."""

from __future__ import annotations

from cantata.core.errors import ConfigError


def check_divides(section: object, section_name: str, name: str, of_name: str) -> None:
    """Raise `ConfigError` where a value of a section under `model` does not divide another."""
    value, of = getattr(section, name), getattr(section, of_name)
    if value < 1 or of % value:
        raise ConfigError(f"model.{section_name}.{name} is {value}; it must divide {of_name} ({of})")
