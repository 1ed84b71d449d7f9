"""From a checked `_target_` node to the object it describes."""

from __future__ import annotations

from functools import partial
from typing import Any

from cantata.core.schema import Key, bind


def build(slot: dict[str, Any], **runtime: Any) -> Any:
    """Call the slot's target with its values and with `runtime`.

    Nested targets are built first; strings become the enums, paths and dataclasses that the
    signatures ask for. `_partial_: true` gives a callable that waits for the remaining arguments.
    Raises `ConfigError` where a value does not fit the signature.
    """
    return _make(slot, (), runtime)


def _make(node: dict[str, Any], key: Key, runtime: dict[str, Any]) -> Any:
    bound = bind(node, key, tuple(runtime), lambda inner, at, _: _make(inner, at, {}))
    if bound.partial:
        return partial(bound.target, **bound.arguments, **runtime)
    return bound.target(**bound.arguments, **runtime)
