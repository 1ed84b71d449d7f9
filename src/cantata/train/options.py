"""Options that engines share."""

from __future__ import annotations

from enum import Enum
from typing import TypeVar

from cantata.core.errors import ConfigError
from cantata.core.suggest import hint


class Precision(Enum):
    """What the model computes in."""

    bf16 = "bf16"
    """Gathered parameters and activations in bf16; gradients are reduced in fp32."""
    fp32 = "fp32"


class StateDtype(Enum):
    """What parameters rest in between their uses, and with them their gradients and optimizer state."""

    fp32 = "fp32"
    bf16 = "bf16"
    """Half the memory; updates below a parameter's bf16 resolution are lost."""


class Offload(Enum):
    """What rests in host memory instead of on the device."""

    none = "none"
    optimizer = "optimizer"
    parameters = "parameters"
    """Parameters, and with them gradients and optimizer state."""


Option = TypeVar("Option", bound=Enum)


def choice(kind: type[Option], value: Option | str, key: str) -> Option:
    """The member that a config value names; raises `ConfigError` with the key and the valid names."""
    if isinstance(value, kind):
        return value
    if value in kind.__members__:
        return kind[str(value)]
    valid = kind.__members__
    raise ConfigError(f"{key}={value} is not one of {', '.join(valid)}{hint(str(value), valid)}")
