"""What travels between ranks when experts are spread over them, on balanced routing."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cantata.models.protocol import Trainable
from cantata.parallel.recompute import Recompute


class Traffic(NamedTuple):
    """The all-to-alls of one rank."""

    rows: int
    """Rows that a rank sends, and on balanced routing receives: tokens of a micro-batch * top_k."""
    bytes_each: int
    """Bytes that leave a rank in one all-to-all: what it sends to itself does not travel."""
    buffer_bytes: int
    """Bytes of the rows sent and received in one all-to-all, which are there at the same time."""
    per_step: int
    """All-to-alls of a step: there and back, in each MoE layer and micro-batch, forward and backward."""

    @property
    def bytes_per_step(self) -> int:
        return self.bytes_each * self.per_step


def traffic(
    model: Trainable,
    ep: int,
    tokens: int,
    dtype: torch.dtype,
    recompute: Recompute,
    accumulation_steps: int,
) -> Traffic | None:
    """What `mesh.ep` costs; None where nothing travels.

    Args:
        model: whole.
        tokens: of a micro-batch, padding included: it is routed as well.
        dtype: of the activations.
        recompute: `full` forgets what came, and exchanges it again in backward.
    """
    layers = model.moe_layers()
    if ep == 1 or not layers:
        return None
    rows = tokens * layers[0].router.top_k
    row_bytes = layers[0].router.weight.shape[1] * dtype.itemsize
    passes = 3 if recompute is Recompute.full else 2
    return Traffic(
        rows=rows,
        bytes_each=rows * (ep - 1) // ep * row_bytes,
        buffer_bytes=2 * rows * row_bytes,
        per_step=2 * passes * len(layers) * accumulation_steps,
    )
