"""Memory: what a process has used, and what a rank will need, from shapes alone.

The estimate is a sum of these parts:

    parameters   weights at rest: elements / shards * bytes
    gradients    the same of the trained parameters
    optimizer    moments, fp32 masters and averages of the trained parameters
    gathered     what sharding brings together at once, see `gathered_bytes`, and the largest packed weight
                 while it is in use
    activations  what forward and backward hold beyond that when they hold most, logits and the rows that
                 travel to experts included: a dry run
    packed       weights that `lora.quantize_base` packs, whole on every rank

With `mesh.ep` a rank holds num_experts / ep experts of each layer, sharded among fewer ranks than the rest.

Not counted: the interpreter and its libraries, the allocator's rounding, workspaces of kernels, the loader.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cantata.core.types import Batch, PixelBatch
from cantata.models.lora import base_names, packed_names, packing
from cantata.models.protocol import Trainable
from cantata.nn.lora import packed_bytes
from cantata.parallel.mesh import MeshSizes
from cantata.parallel.recompute import Recompute
from cantata.train.dry_run import peak_activation_bytes
from cantata.train.ema import keeps_averages
from cantata.train.one_rank import Elements, expert_ids, on_one_rank
from cantata.train.optim import OptimizerPartial
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
    """Ranks that share one copy of what is no expert."""
    expert_shards: int
    """Ranks that share one copy of the experts of one of them."""

    def of(self, elements: Elements) -> int:
        shares = -(-elements.dense // self.shards), -(-elements.experts // self.expert_shards)
        return sum(shares) * self.bytes_each


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
    ep: int
    """Ranks that the experts are spread over."""

    @property
    def base(self) -> Resting:
        """Weights that adapters leave as they came: no more bits of them are kept than compute."""
        return self.weights._replace(bytes_each=min(self.weights.bytes_each, self.compute_dtype.itemsize))


def fsdp2_layout(
    precision: Precision, state_dtype: StateDtype, offload: Offload, shards: int, ep: int
) -> Layout:
    """FSDP2: everything in the state's type, over the ranks that share a copy."""
    each = {StateDtype.fp32: 4, StateDtype.bf16: 2}[state_dtype]
    resting = Resting(0 if offload is Offload.parameters else each, shards, shards // ep)
    states = resting._replace(bytes_each=MOMENTS * resting.bytes_each)
    return Layout(_dtype(precision), resting, resting, states, gathers=True, ep=ep)


def zero_layout(zero_stage: int, precision: Precision, offload: Offload, world_size: int, ep: int) -> Layout:
    """DeepSpeed: ZeRO shares states from stage 1, gradients from 2, weights from 3.

    Gradients and moments are fp32; in bf16 so are the masters beside the weights.
    """
    dtype = _dtype(precision)
    masters = 0 if dtype is torch.float32 else FP32

    def resting(bytes_each: int, from_stage: int) -> Resting:
        shared = zero_stage >= from_stage
        return Resting(bytes_each, world_size if shared else 1, world_size // ep if shared else 1)

    return Layout(
        dtype,
        weights=resting(0 if offload is Offload.parameters else dtype.itemsize, from_stage=3),
        gradients=resting(FP32 if offload is Offload.none else 0, from_stage=2),
        states=resting(MOMENTS * FP32 + masters if offload is Offload.none else 0, from_stage=1),
        gathers=zero_stage == 3,
        ep=ep,
    )


def layout_of(engine: Mapping[str, Any], optimizer: OptimizerPartial, mesh: MeshSizes) -> Layout:
    """The layout that the values under `engine` ask for: FSDP2 shards over a copy's ranks, ZeRO over all."""
    precision, offload = Precision(engine["precision"]), Offload(engine["offload"])
    if "zero_stage" in engine:
        world_size = mesh.dp_replicate * mesh.dp_shard
        layout = zero_layout(engine["zero_stage"], precision, offload, world_size, mesh.ep)
    else:
        state_dtype = StateDtype(engine["state_dtype"])
        layout = fsdp2_layout(precision, state_dtype, offload, mesh.dp_shard, mesh.ep)
        kept_as_computed = layout.weights.bytes_each == layout.compute_dtype.itemsize
        if mesh.dp_replicate * mesh.dp_shard == 1 and kept_as_computed:
            layout = replace(layout, gathers=False)
    if not (keeps_averages(optimizer) and layout.states.bytes_each):
        return layout
    return replace(layout, states=layout.states._replace(bytes_each=layout.states.bytes_each + FP32))


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
    packed: int = 0
    """Of these `parameters` holds none: no engine shards or offloads them."""

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Without what hardly any run has."""
        parts = {item.name: getattr(self, item.name) for item in fields(self)}
        return parts if self.packed else {name: part for name, part in parts.items() if name != "packed"}


def estimate_memory(
    model: Trainable,
    layout: Layout,
    batch: Batch | PixelBatch,
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
    local = on_one_rank(model, layout.ep)
    assert isinstance(local, nn.Module)
    experts = expert_ids(local)
    base, packed = base_names(local), _packed(local)
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name, parameter in local.named_parameters():
        if name not in packed:
            parts[name in base].append(parameter)
    own, adapted = (Elements.of(part, experts) for part in parts)
    trained = Elements.of((parameter for parameter in parts[0] if parameter.requires_grad), experts)
    gradients = layout.gradients.of(trained)
    accumulates = accumulation_steps > 1
    peak = peak_activation_bytes(
        local,
        batch,
        layout.compute_dtype,
        recompute,
        device,
        (lambda elements: 0) if accumulates else layout.gradients.of,
    )
    resting = {id(parameter) for parameter in packed.values()}
    units = [
        sum(p.numel() for p in unit.module.parameters() if id(p) not in resting) for unit in local.units()
    ]
    unpacked = max((weight.numel() for weight in packed.values()), default=0) * layout.compute_dtype.itemsize
    return MemoryEstimate(
        parameters=layout.weights.of(own) + layout.base.of(adapted),
        gradients=gradients,
        optimizer=layout.states.of(trained),
        gathered=gathered_bytes(layout, units) + unpacked,
        activations=peak if accumulates else max(0, peak - gradients),
        packed=sum(packed_bytes(weight.shape, packing(local)) for weight in packed.values()),
    )


def _packed(model: nn.Module) -> dict[str, nn.Parameter]:
    """What `lora.quantize_base` packs: whole on every rank and on its device, whatever the engine."""
    return {name: model.get_parameter(name) for name in packed_names(model)}
