"""Adapters over a packed base equal those over plain frozen parameters of the values that it unpacks to.

The reference is one plain process whose weights are `W' + scaling A B`, W' being packed and unpacked once.
Bound 1e-6 in fp32 on the first step's gradients (of order 0.1), on any layout.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor, nn

from cantata.models.lora import packed_names
from cantata.nn.lora import PackedWeight, Packing
from cantata.parallel.materialize import Index
from cantata.parallel.recompute import Recompute
from tests.distributed.spawn import run_ranks
from tests.distributed.test_expert_parallel import CPU
from tests.distributed.test_fsdp2 import assert_same
from tests.distributed.test_lora import LORA, Shaken, dense_gradients, steps

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

NF4 = replace(LORA, quantize_base=Packing.nf4)
LAYOUTS: dict[str, dict[str, Any]] = {
    "ep 1": {"mesh": (1, -1, 1)},
    "ep 1, offload": {"mesh": (1, -1, 1), "offload": "parameters"},
    "ep 2": {"mesh": (1, -1, 2)},
    "ep 2, full recomputation": {"mesh": (1, -1, 2), "recompute": Recompute.full},
    "ep 2, selective recomputation": {"mesh": (1, -1, 2), "recompute": Recompute.selective},
}


class Rested(Shaken):
    """The same values, packed and unpacked once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._packed = packed_names(model)

    def read(self, name: str, index: Index) -> Tensor:
        value = super().read(name, index)
        if name not in self._packed:
            return value
        resting = PackedWeight.empty(value.shape, value.dtype, Packing.nf4, CPU)
        resting.copy_(value)
        return resting.unpack()


@pytest.fixture(scope="module")
def runs() -> dict[int, dict[str, dict[str, Tensor]]]:
    one = {"ep 1": LAYOUTS["ep 1"]}
    return {1: run_ranks(steps, 1, one, NF4)[0], 2: run_ranks(steps, 2, LAYOUTS, NF4)[0]}


@pytest.mark.parametrize(("world_size", "name"), [(1, "ep 1"), *((2, name) for name in LAYOUTS)])
def test_gradients_of_adapters_equal_those_over_the_unpacked_values(
    world_size: int, name: str, runs: dict[int, dict[str, dict[str, Tensor]]]
) -> None:
    found, expected = runs[world_size][name], dense_gradients(world_size, NF4, Rested)
    assert found.keys() == expected.keys(), "every adapter learns, and nothing else"
    assert_same(found, expected, 1e-6)


def test_four_bits_make_a_difference(runs: dict[int, dict[str, dict[str, Tensor]]]) -> None:
    plain = dense_gradients(2, LORA, Shaken)
    assert max(float((runs[2]["ep 2"][name] - plain[name]).abs().max()) for name in plain) > 1e-3


def test_recomputation_changes_no_bit(runs: dict[int, dict[str, dict[str, Tensor]]]) -> None:
    for mode in ("full", "selective"):
        assert_same(runs[2][f"ep 2, {mode} recomputation"], runs[2]["ep 2"], 0.0)
