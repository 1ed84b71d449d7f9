"""Adapters, those of the experts above all, equal a plain process that makes every update as a whole matrix.

The reference has no adapters: its weights are `W + scaling A B`, through which autograd reaches A and B.
Bound 1e-6 in fp32 on the first step's gradients (of order 0.1), on any layout.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from cantata.models.lora import LoRAConfig, apply_lora
from cantata.nn.lora import Packing, is_factor
from cantata.parallel.materialize import Index, RandomInit, Source
from cantata.parallel.mesh import MeshConfig
from cantata.parallel.recompute import Recompute
from cantata.train.fsdp2 import FSDP2Engine
from cantata.train.objectives import NextToken
from tests.distributed.join import join
from tests.distributed.mesh import mesh_of
from tests.distributed.spawn import run_ranks
from tests.distributed.test_expert_parallel import (
    CPU,
    MICRO_BATCHES,
    MIXTURE,
    OPTIMIZER,
    build,
    gradients,
    totals,
)
from tests.distributed.test_fsdp2 import assert_same

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

LORA = LoRAConfig(
    r=4,
    alpha=6,
    dropout=0.0,
    rslora=False,
    dora=False,
    targets=["text.layers.*", "head", "vision.layers.*"],
    ranks={"*.experts.fc2": 2},
    modules_to_save=[],
    adapter=None,
    quantize_base=Packing.none,
)
LAYOUTS: dict[str, dict[str, Any]] = {
    "ep 1": {"mesh": (1, -1, 1)},
    "ep 2": {"mesh": (1, -1, 2)},
    "ep 2, full recomputation": {"mesh": (1, -1, 2), "recompute": Recompute.full},
    "ep 2, selective recomputation": {"mesh": (1, -1, 2), "recompute": Recompute.selective},
}


class Shaken:
    """Random values in every factor: with B at zero, A would have no gradient."""

    def __init__(self, model: nn.Module) -> None:
        self._plain = RandomInit(model, 7)
        self._names = dict(model.named_parameters())

    def __iter__(self) -> Any:
        return iter(self._plain)

    def read(self, name: str, index: Index) -> Tensor:
        if not is_factor(name):
            return self._plain.read(name, index)
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        return torch.randn(self._names[name].shape, generator=generator)[index] * 0.1


def step_of(layout: dict[str, Any], lora: LoRAConfig) -> dict[str, Tensor]:
    """The gradients of a step of two micro-batches on this world, whole."""
    options = dict(layout)
    mesh = mesh_of(MeshConfig(*options.pop("mesh")))
    model = build(MIXTURE)
    apply_lora(model, lora)
    engine = FSDP2Engine(
        model=model,
        mesh=mesh,
        source=Shaken(model),
        optimizer=OPTIMIZER,
        parameters={},
        compile=False,
        device=CPU,
        precision="fp32",
        state_dtype="fp32",
        **({"recompute": Recompute.none, "offload": "none"} | options),
    )
    objective = NextToken(model.balance)
    for micro, batch in enumerate(MICRO_BATCHES[dist.get_rank()]):
        engine.forward_backward(batch, objective, totals(dist.get_world_size()), last=micro == 1)
    return gradients(engine.model)


def steps(layouts: dict[str, dict[str, Any]], lora: LoRAConfig) -> dict[str, dict[str, Tensor]]:
    return {name: step_of(layout, lora) for name, layout in layouts.items()}


def dense_gradients(
    world_size: int, lora: LoRAConfig, values_of: Callable[[nn.Module], Source]
) -> dict[str, Tensor]:
    adapted, plain = build(MIXTURE), build(MIXTURE).to_empty(device=CPU)
    apply_lora(adapted, lora)
    source = values_of(adapted)
    values = {
        name: source.read(name, tuple(slice(None) for _ in parameter.shape))
        for name, parameter in adapted.named_parameters()
    }
    factors = {name: value.requires_grad_() for name, value in values.items() if is_factor(name)}
    with torch.no_grad():
        for name, buffer in plain.named_buffers():
            buffer.copy_(RandomInit(plain, 7).read(name, tuple(slice(None) for _ in buffer.shape)))
    objective = NextToken(plain.balance)
    for micro in range(2):
        weights = {name: _weight(name, values) for name in values if not is_factor(name)}
        batch = join([MICRO_BATCHES[rank][micro] for rank in range(world_size)])
        loss = objective(partial(functional_call, plain, weights), batch, totals(world_size))  # type: ignore[arg-type]
        loss.value.backward()
    return {name: factor.grad for name, factor in factors.items() if factor.grad is not None}


def _weight(name: str, values: dict[str, Tensor]) -> Tensor:
    """`W + scaling A B`, made whole."""
    parent, _, leaf = name.rpartition(".")
    prefix = f"{name}_lora_" if leaf in ("fc1", "fc2") and "experts" in parent else f"{parent}.lora_"
    if f"{prefix}A" not in values or leaf == "bias":
        return values[name]
    a, b = values[f"{prefix}A"], values[f"{prefix}B"]
    is_experts = a.ndim == 3
    scaling = LORA.alpha / (a.shape[2] if is_experts else a.shape[0])
    return values[name] + scaling * (a @ b if is_experts else b @ a)


@pytest.fixture(scope="module")
def runs() -> dict[int, dict[str, dict[str, Tensor]]]:
    """One rank has every expert; two share them or do not."""
    one = {"ep 1": LAYOUTS["ep 1"]}
    return {1: run_ranks(steps, 1, one, LORA)[0], 2: run_ranks(steps, 2, LAYOUTS, LORA)[0]}


@pytest.mark.parametrize(("world_size", "name"), [(1, "ep 1"), *((2, name) for name in LAYOUTS)])
def test_gradients_of_adapters_equal_those_through_whole_updates(
    world_size: int, name: str, runs: dict[int, dict[str, dict[str, Tensor]]]
) -> None:
    found, expected = runs[world_size][name], dense_gradients(world_size, LORA, Shaken)
    assert found.keys() == expected.keys(), "every adapter learns, and nothing else"
    assert any("experts.fc1_lora_A" in key for key in found)
    assert all(gradient.any() for gradient in expected.values())
    assert_same(found, expected, 1e-6)


def test_recomputation_changes_no_bit(runs: dict[int, dict[str, dict[str, Tensor]]]) -> None:
    for mode in ("full", "selective"):
        assert_same(runs[2][f"ep 2, {mode} recomputation"], runs[2]["ep 2"], 0.0)
