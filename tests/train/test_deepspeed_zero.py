"""Which gradients each stage's optimizer will use. The stages run in tests/distributed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from cantata.train.deepspeed_zero import PartitionedStates, PartitionedStatesBF16


def stage(kind: type, **optimizer: Any) -> Any:
    made = kind.__new__(kind)
    made.optimizer = SimpleNamespace(**optimizer)
    return made


def test_gradients_are_this_ranks_partition_wherever_it_lies() -> None:
    first, second = torch.tensor([1.0]), torch.tensor([2.0, 3.0])
    flat = torch.zeros(2)
    flat.grad = second
    averaged = {0: [first], 1: [second]}
    here = stage(PartitionedStates, cpu_offload=False, averaged_gradients=averaged)
    assert here.gradients() == [first, second]
    offloaded = stage(PartitionedStates, cpu_offload=True, single_partition_of_fp32_groups=[flat])
    assert offloaded.gradients() == [second]
    bf16 = stage(PartitionedStatesBF16, fp32_groups_gradient_flat_partition=[first])
    assert bf16.gradients() == [first]
