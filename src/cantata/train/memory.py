"""Memory: what a process has used, and what a rank will need, from shapes alone.

The estimate is a sum of five parts:

    parameters   weights at rest: elements / shards * bytes
    gradients    the same of the trained parameters
    optimizer    moments and fp32 masters of the trained parameters
    gathered     what sharding brings together at once, see `gathered_bytes`
    activations  what forward and backward hold beyond that when they hold most, logits included: a dry run

Not counted: the interpreter and its libraries, the allocator's rounding, workspaces of kernels, the loader.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch

from cantata.core.types import Batch
from cantata.models.protocol import LanguageModel
from cantata.parallel.recompute import Recompute
from cantata.train.dry_run import peak_activation_bytes
from cantata.train.options import Offload, Precision, StateDtype

GIB = 2**30
MOMENTS = 2
"""Values that Adam keeps for each parameter."""
FP32 = 4


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far, GiB: tensors on a CUDA device, the whole process (resident) on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB


class Resting(NamedTuple):
    """One kind of tensor between its uses."""

    bytes_each: int
    """Bytes of an element; 0 where it rests in another memory."""
    shards: int
    """Ranks that share one copy."""

    def of(self, elements: int) -> int:
        return -(-elements // self.shards) * self.bytes_each


@dataclass(frozen=True)
class Layout:
    """How an engine keeps a model."""

    compute_dtype: torch.dtype
    weights: Resting
    gradients: Resting
    states: Resting
    """Everything the optimizer keeps for a trained parameter, fp32 masters included."""
    gathers: bool
    """Weights are brought together unit by unit, as they are used."""


def fsdp2_layout(precision: Precision, state_dtype: StateDtype, offload: Offload, shards: int) -> Layout:
    """FSDP2: everything in the state's type, over the ranks that share a copy."""
    each = {StateDtype.fp32: 4, StateDtype.bf16: 2}[state_dtype]
    resting = Resting(0 if offload is Offload.parameters else each, shards)
    states = resting._replace(bytes_each=MOMENTS * resting.bytes_each)
    return Layout(_dtype(precision), resting, resting, states, gathers=True)


def zero_layout(zero_stage: int, precision: Precision, offload: Offload, world_size: int) -> Layout:
    """DeepSpeed: ZeRO shares states from stage 1, gradients from 2, weights from 3.

    Gradients and moments are fp32; in bf16 so are the masters beside the weights.
    """
    dtype = _dtype(precision)
    masters = 0 if dtype is torch.float32 else FP32
    shards = [world_size if zero_stage >= stage else 1 for stage in (1, 2, 3)]
    return Layout(
        dtype,
        weights=Resting(0 if offload is Offload.parameters else dtype.itemsize, shards[2]),
        gradients=Resting(FP32 if offload is Offload.none else 0, shards[1]),
        states=Resting(MOMENTS * FP32 + masters if offload is Offload.none else 0, shards[0]),
        gathers=zero_stage == 3,
    )


def layout_of(engine: Mapping[str, Any], shards: int, world_size: int) -> Layout:
    """The layout that the values under `engine` ask for.

    Args:
        shards: ranks that share one copy of the model under FSDP2 (`mesh.dp_shard`).
        world_size: ranks that share one under ZeRO.
    """
    precision, offload = Precision(engine["precision"]), Offload(engine["offload"])
    if "zero_stage" in engine:
        return zero_layout(engine["zero_stage"], precision, offload, world_size)
    return fsdp2_layout(precision, StateDtype(engine["state_dtype"]), offload, shards)


def _dtype(precision: Precision) -> torch.dtype:
    return {Precision.bf16: torch.bfloat16, Precision.fp32: torch.float32}[precision]


def gathered_bytes(layout: Layout, unit_elements: Sequence[int]) -> int:
    """The largest unit at work: its weights, those of one prefetched, its gradient, and that in fp32.

    The fp32 copy is what is reduced. Weights that are whole on every rank need no gathering, but their
    gradient counts all the same.
    """
    largest = max(unit_elements, default=0)
    weights = 2 * layout.compute_dtype.itemsize if layout.gathers else 0
    return largest * (weights + layout.compute_dtype.itemsize + FP32)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a rank needs at its peak, by purpose."""

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        return {item.name: getattr(self, item.name) for item in fields(self)}


def estimate_memory(
    model: LanguageModel,
    layout: Layout,
    batch: Batch,
    recompute: Recompute,
    device: torch.device,
    accumulation_steps: int,
) -> MemoryEstimate:
    """What a rank needs for a training step on micro-batches like `batch`.

    Gradients fill up while backward frees activations. Only a second micro-batch meets all of them, so
    without accumulation the activations' part is what is left of the peak beside the gradients.

    Args:
        model: whole and on the meta device, its frozen parameters marked; it stays as it is.
        batch: decides lengths, images and targets; its values do not matter.
        device: where the run will compute; it decides which kernels keep what.
    """
    parameters = [parameter for _, parameter in model.named_parameters()]
    elements = sum(parameter.numel() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    gradients = layout.gradients.of(trained)
    accumulates = accumulation_steps > 1
    peak = peak_activation_bytes(
        model,
        batch,
        layout.compute_dtype,
        recompute,
        device,
        (lambda elements: 0) if accumulates else layout.gradients.of,
    )
    units = [sum(parameter.numel() for parameter in unit.module.parameters()) for unit in model.units()]
    return MemoryEstimate(
        parameters=layout.weights.of(elements),
        gradients=gradients,
        optimizer=layout.states.of(trained),
        gathered=gathered_bytes(layout, units),
        activations=peak if accumulates else max(0, peak - gradients),
    )
