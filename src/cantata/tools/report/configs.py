"""What differs between the configurations of runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

ABSENT = None


class Difference(NamedTuple):
    """A key, and each run's value as text; `ABSENT` where a run has no such key."""

    key: str
    values: list[str | None]


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys and their values as text; lists and empty mappings are values."""
    found: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= flatten(value, f"{name}.")
        else:
            found[name] = _text(value)
    return found


def _text(value: Any) -> str:
    """JSON; texts stand without quotes, except where they would be taken for something else."""
    quoted = json.dumps(value, ensure_ascii=False, default=str)
    if not isinstance(value, str) or not value:
        return quoted
    try:
        json.loads(value)
    except (ValueError, RecursionError):
        return value
    return quoted


def differences(configs: Sequence[Mapping[str, Any]]) -> list[Difference]:
    """The keys that are not the same in all, in the order of their first appearance."""
    flat = [flatten(config) for config in configs]
    keys = dict.fromkeys(key for one in flat for key in one)
    found = [Difference(key, [one.get(key, ABSENT) for one in flat]) for key in keys]
    return [one for one in found if len(set(one.values)) > 1]
