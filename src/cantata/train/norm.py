"""The norm of all gradients, wherever their shards lie."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """L2 norm over all gradients and ranks, a plain fp64 scalar.

    Norms are taken per mesh and then combined, since no operation spans two meshes. Squares are summed in
    fp64: in fp32 a million of them lose up to 1e-4 of the norm, differently for every sharding.
    """
    by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}
    for gradient in gradients:
        mesh = gradient.device_mesh if isinstance(gradient, DTensor) else None
        by_mesh.setdefault(mesh, []).append(gradient)
    norms = []
    for members in by_mesh.values():
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(members, 2, dtype=torch.float64)))
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    norm_of_all: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm_of_all
