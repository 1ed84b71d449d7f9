"""Spread a model over the ranks, in the one order that works."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import nn

from cantata.core.errors import ConfigError
from cantata.models.protocol import Unit
from cantata.parallel.compile import apply_compile
from cantata.parallel.fsdp import Sharding, apply_sharding
from cantata.parallel.recompute import Recompute, apply_recompute


@runtime_checkable
class Divisible(Protocol):
    """What a plan needs of a model."""

    def units(self) -> Sequence[Unit]:
        """Every part that holds parameters, in the order in which forward runs them."""
        ...


def apply_plan(
    model: nn.Module,
    *,
    device_type: str,
    recompute: Recompute,
    compile: bool,
    sharding: Sharding | None,
) -> None:
    """Prepare a model (on the meta device) for training, in place: experts, recompute, compile, shard.

    The order matters: experts are placed before anything wraps them (with `mesh.ep=1` they stay where
    they are), recompute goes inside the compiled region so that the compiler sees what is kept, and
    sharding goes around both so that its hooks are neither recomputed nor compiled. An engine that
    shards by itself passes no sharding.

    Raises:
        ConfigError: a combination that would silently run uncompiled.
    """
    if not isinstance(model, Divisible):
        raise TypeError(f"{type(model).__name__} lacks units; see cantata.models.protocol")
    if compile and recompute is not Recompute.none:
        raise ConfigError(
            f"train.compile=true with train.recompute={recompute.value} would run uncompiled: attention "
            "breaks the graph of a recomputed block; set train.recompute=none or train.compile=false"
        )
    units = model.units()
    for unit in units:
        if unit.is_block:
            apply_recompute(unit.module, recompute)
            if compile:
                apply_compile(unit.module, device_type)
    if sharding is not None:
        apply_sharding(model, units, sharding)
