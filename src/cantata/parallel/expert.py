"""Spread the experts of a layer over the ranks of a mesh."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from cantata.core.errors import ConfigError
from cantata.nn.moe.exchange import ExchangeDispatcher
from cantata.nn.moe.layer import MoELayer


def apply_expert_parallel(layer: MoELayer, mesh: DeviceMesh) -> None:
    """Leave every rank of `mesh` its equal run of the experts, and let tokens travel to them.

    Names and whole shapes of the parameters stay; what they hold of a layer that is not on the meta
    device is lost.

    Raises:
        ConfigError: the ranks do not divide the experts.
    """
    num_experts, ranks = layer.router.num_experts, mesh.size()
    check_ranks(num_experts, ranks)
    experts = layer.experts
    for name, parameter in list(experts.named_parameters(recurse=False)):
        part = parameter.new_empty((num_experts // ranks, *parameter.shape[1:]))
        shard = DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
        setattr(experts, name, nn.Parameter(shard, requires_grad=parameter.requires_grad))
    experts.local = local_part
    layer.dispatcher = ExchangeDispatcher(num_experts, mesh.get_group())


def check_ranks(num_experts: int, ranks: int) -> None:
    """Raise `ConfigError` where the ranks do not divide the experts; needs no mesh, so it can come first."""
    if num_experts % ranks:
        raise ConfigError(f"mesh.ep={ranks} must divide the number of experts ({num_experts})")


def local_part(weight: Tensor) -> Tensor:
    """The experts of this rank; the gradient of the part is this rank's part of the gradient."""
    part: Tensor = weight.to_local() if isinstance(weight, DTensor) else weight
    return part
