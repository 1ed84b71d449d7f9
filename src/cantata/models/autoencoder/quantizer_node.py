"""A quantiser as plain values, its class and arguments, and back."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from torch import nn

from cantata.core.build import build
from cantata.core.errors import ConfigError
from cantata.core.target import TARGET
from cantata.nn.quantize.base import Quantizer

PACKAGE = "cantata.nn.quantize."
"""The one place that quantisers may come from: a folder of weights must not name other code to run."""


def described(quantizer: Quantizer) -> dict[str, Any]:
    """A node with the quantiser's `_target_` and what its constructor was given.

    Raises `ConfigError` for a class of another package, or one that keeps an argument under another name.
    """
    kind = type(quantizer)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if not name.startswith(PACKAGE):
        raise ConfigError(f"{name} cannot be published: only quantisers of {PACKAGE[:-1]} can be read back")
    node = {TARGET: name}
    for argument in inspect.signature(kind).parameters:
        if not hasattr(quantizer, argument):
            raise ConfigError(f"{name} cannot be published: it does not keep its argument {argument!r}")
        node[argument] = _plain(getattr(quantizer, argument))
    return node


def built(node: dict[str, Any]) -> Quantizer:
    """The quantiser of a node; `ConfigError` where it is none or names a class of another package."""
    _check(node)
    quantizer = build(node)
    if not isinstance(quantizer, Quantizer):
        raise ConfigError(f"quantizer.{TARGET} is {node[TARGET]}, which is no quantiser")
    return quantizer


def _check(value: Any) -> None:
    if isinstance(value, dict):
        target = value.get(TARGET)
        if target is not None and not str(target).startswith(PACKAGE):
            raise ConfigError(f"quantizer.{TARGET} is {target}; only {PACKAGE}* is read from a folder")
        for inner in value.values():
            _check(inner)
    elif isinstance(value, list):
        for inner in value:
            _check(inner)


def _plain(value: Any) -> Any:
    if isinstance(value, Quantizer):
        return described(value)
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, nn.ModuleList) or (isinstance(value, Sequence) and not isinstance(value, str)):
        return [_plain(item) for item in value]
    return value
