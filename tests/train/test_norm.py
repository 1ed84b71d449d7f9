"""The norm of gradients of several kinds, and that it does not lose digits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import distribute_tensor

from cantata.parallel.mesh import MeshConfig, build_mesh
from cantata.train.norm import clip, total_norm


@pytest.fixture
def _process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_process_group")
def test_sharded_and_plain_tensors_together() -> None:
    mesh = build_mesh(MeshConfig(1, -1, 1), 1, "cpu")
    sharded = distribute_tensor(torch.tensor([3.0]), mesh.dense)
    assert total_norm([sharded, torch.tensor([4.0])]).item() == pytest.approx(5.0, rel=1e-12)


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize(("norm", "factor"), [(10.0, 0.2), (1.0, 1.0)])
def test_gradients_are_scaled_down_and_never_up(norm: float, factor: float) -> None:
    mesh = build_mesh(MeshConfig(1, -1, 1), 1, "cpu")
    sharded = distribute_tensor(torch.tensor([3.0]), mesh.dense)
    parameters = [torch.nn.Parameter(value) for value in (sharded, torch.ones(2), torch.ones(1))]
    for parameter in parameters[:2]:
        parameter.grad = parameter.detach().clone()
    clip(parameters, 2.0, torch.tensor(norm, dtype=torch.float64))
    assert parameters[0].grad.full_tensor().item() == pytest.approx(3.0 * factor)
    assert parameters[1].grad.tolist() == pytest.approx([factor, factor])
    assert parameters[2].grad is None


def test_millions_of_equal_values_lose_no_digit() -> None:
    """fp32 sums of this many squares miss by far more than 1e-10."""
    values = torch.full((3_000_001,), 0.1)
    wanted = float(values[0]) * len(values) ** 0.5
    assert total_norm([values[:1000], values[1000:]]).item() == pytest.approx(wanted, rel=1e-10)


def test_no_gradient_has_norm_zero() -> None:
    assert total_norm([]).item() == 0.0
