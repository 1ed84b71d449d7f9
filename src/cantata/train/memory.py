"""Memory: what a process has used, and what a rank will need, from shapes alone.

The estimate is a sum of these parts:

    parameters   weights at rest: elements / shards * bytes
    gradients    the same of the trained parameters
    optimizer    moments, fp32 masters and averages of the trained parameters
    gathered     what sharding brings together at once, see `gathered_bytes`, and the largest packed weight
                 while it is in use
    activations  what forward and backward hold beyond that when they hold most, the batch included: a dry run
    logits       of that what the language head makes, a few rows at a time: logits, their softmax, and the
                 gradients that follow from them
    all_to_all   of that the rows that leave for the experts of other ranks, and those that came, kept for
                 backward or not
    packed       weights that `lora.quantize_base` packs, whole on every rank

With `mesh.ep` a rank holds num_experts / ep experts of each layer, sharded among fewer ranks than the rest.

Not counted: the interpreter and its libraries, the allocator's rounding, workspaces of kernels, the loader.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
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
OCCASIONAL = ("all_to_all", "packed")
"""Parts of the estimate that are worth a line only where they are not 0."""


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
    reduces: bool
    """Gradients are copied to fp32 and summed, unit by unit; else they stay where backward makes them."""
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
    return Layout(_dtype(precision), resting, resting, states, gathers=True, reduces=True, ep=ep)


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
        reduces=True,
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
            layout = replace(layout, gathers=False, reduces=False)
    if not (keeps_averages(optimizer) and layout.states.bytes_each):
        return layout
    return replace(layout, states=layout.states._replace(bytes_each=layout.states.bytes_each + FP32))


def _dtype(precision: Precision) -> torch.dtype:
    return {Precision.bf16: torch.bfloat16, Precision.fp32: torch.float32}[precision]


class UnitElements(NamedTuple):
    """Of the parameters of a unit."""

    all: int
    trained: int

    @staticmethod
    def of(parameters: Iterable[Tensor]) -> UnitElements:
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in parameters]
        return UnitElements(sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained))


def gathered_bytes(layout: Layout, units: Iterable[UnitElements]) -> int:
    """The largest unit at work: its weights, those of one prefetched, its gradient, and that in fp32.

    The fp32 copy is what is reduced. Weights that are whole on every rank need no gathering, but their
    gradient counts all the same, unless nothing is reduced.
    """
    weights = 2 * layout.compute_dtype.itemsize if layout.gathers else 0
    gradient = layout.compute_dtype.itemsize + FP32 if layout.reduces else 0
    return max((unit.all * weights + unit.trained * gradient for unit in units), default=0)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a rank needs at its peak, by purpose."""

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    logits: int = 0
    all_to_all: int = 0
    packed: int = 0
    """Of these `parameters` holds none: no engine shards or offloads them."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def parts(self) -> dict[str, int]:
        """Without what not every run has."""
        return {name: part for name, part in asdict(self).items() if part or name not in OCCASIONAL}


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
    without accumulation the activations' parts are what is left of the peak beside the gradients.

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
        UnitElements.of(p for p in unit.module.parameters() if id(p) not in resting) for unit in local.units()
    ]
    left = peak.total if accumulates else max(0, peak.total - gradients)
    all_to_all = min(peak.all_to_all, left)
    logits = min(peak.logits, left - all_to_all)
    unpacked = max((weight.numel() for weight in packed.values()), default=0) * layout.compute_dtype.itemsize
    return MemoryEstimate(
        parameters=layout.weights.of(own) + layout.base.of(adapted),
        gradients=gradients,
        optimizer=layout.states.of(trained),
        gathered=gathered_bytes(layout, units) + unpacked,
        activations=left - logits - all_to_all,
        logits=logits,
        all_to_all=all_to_all,
        packed=sum(packed_bytes(weight.shape, packing(local)) for weight in packed.values()),
    )


def _packed(model: nn.Module) -> dict[str, nn.Parameter]:
    """What `lora.quantize_base` packs: whole on every rank and on its device, whatever the engine."""
    return {name: model.get_parameter(name) for name in packed_names(model)}
