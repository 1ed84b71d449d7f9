"""Spread a model over the ranks, in the one order that works."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import nn

from cantata.core.errors import ConfigError
from cantata.models.protocol import Unit
from cantata.nn.moe.layer import MoELayer
from cantata.parallel.compile import apply_compile
from cantata.parallel.expert import apply_expert_parallel
from cantata.parallel.fsdp import Sharding, apply_sharding
from cantata.parallel.mesh import RankMesh
from cantata.parallel.recompute import Recompute, apply_recompute


@runtime_checkable
class Divisible(Protocol):
    """What a plan needs of a model."""

    def units(self) -> Sequence[Unit]:
        """Every part that holds parameters, in the order in which forward runs them."""
        ...

    def moe_layers(self) -> Sequence[MoELayer]:
        """The MoE layers, first to last."""
        ...


def fp32_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that stay fp32 while they compute, whatever the engine's precision."""
    assert isinstance(model, Divisible)
    exact = {id(p) for unit in model.units() if unit.in_fp32 for p in unit.module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in exact}


def apply_plan(
    model: nn.Module,
    *,
    recompute: Recompute,
    compile: bool,
    mesh: RankMesh,
    sharding: Sharding | None,
) -> None:
    """Prepare a model (on the meta device) for training, in place: experts, recompute, compile, shard.

    The order matters: experts are spread before anything wraps them (with `mesh.ep=1` they stay where
    they are), recompute goes inside the compiled region so that the compiler sees what is kept, and
    sharding goes around both so that its hooks are neither recomputed nor compiled. An engine that
    shards by itself passes no sharding.

    Raises:
        ConfigError: a combination that would silently run uncompiled, or experts that `mesh.ep` does not
            divide.
    """
    if not isinstance(model, Divisible):
        raise TypeError(f"{type(model).__name__} lacks units or moe_layers; see cantata.models.protocol")
    if compile and recompute is not Recompute.none:
        raise ConfigError(
            f"train.compile=true with train.recompute={recompute.value} would run uncompiled: attention "
            "breaks the graph of a recomputed block; set train.recompute=none or train.compile=false"
        )
    if mesh.experts is not None:
        layers = model.moe_layers()
        if not layers:
            raise ConfigError(f"mesh.ep={mesh.ep}, but the model has no experts; set mesh.ep=1")
        for layer in layers:
            apply_expert_parallel(layer, mesh.experts["ep"])
    units = model.units()
    for unit in units:
        if unit.is_block:
            apply_recompute(unit.module, recompute)
            if compile:
                apply_compile(unit.module, mesh.device_type)
    if sharding is not None:
        apply_sharding(model, units, mesh, sharding)
