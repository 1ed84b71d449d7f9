"""What a run on any number of ranks would hold, send and compute, found in one process without weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cantata.core.build import build
from cantata.core.types import Batch, PixelBatch
from cantata.models.lora import base_names
from cantata.models.protocol import (
    Trainable,
)
from cantata.parallel.fake_world import fake_world
from cantata.parallel.materialize import Index
from cantata.parallel.mesh import MeshSizes, RankMesh, build_mesh, validate
from cantata.parallel.plan import apply_plan
from cantata.train import deepspeed, describe
from cantata.train.engine import Engine
from cantata.train.hours import Hours, hours
from cantata.train.likely import META, first_batches, likely
from cantata.train.memory import GIB, Layout, MemoryEstimate, estimate_memory, layout_of
from cantata.train.optim import (
    GroupSummary,
    describe_groups,
    optimizer_defaults,
    parameter_groups,
)
from cantata.train.options import Offload
from cantata.train.stage import LanguageStage, Stage, build_model
from cantata.train.startup import Experts
from cantata.train.tokenizer_stage import TokenizerStage
from cantata.train.traffic import Traffic


@dataclass(frozen=True)
class Plan:
    """The figures of one stage on `ranks` ranks."""

    ranks: int
    mesh: MeshSizes
    groups: list[GroupSummary]
    experts: Experts | None
    images: int
    """Images of the micro-batch that is planned for."""
    patches: int
    tokens_per_micro_batch: int
    """Of a rank."""
    tokens_per_step: int
    """Of all ranks."""
    memory: MemoryEstimate
    """Of rank 0, which holds the most: what does not divide evenly is cut from its end."""
    limit_gib: float | None
    traffic: Traffic | None
    flops_per_step: float
    """Forward and backward operations of all ranks, without what is computed again."""
    hours: Hours | None
    """None where no GPU is named."""
    notes: list[str]
    """What stands in the way of such a run."""

    @property
    def fits(self) -> bool | None:
        """Whether the estimate is below the limit; None where there is none."""
        return None if self.limit_gib is None else self.memory.total <= self.limit_gib * GIB


def make_plan(stage: Stage, read: int = 0) -> Plan:
    """The plan of a stage on `cluster.gpus` ranks; neither weights nor, unless asked to, data are read.

    Args:
        read: micro-batches to read, and to plan for the largest of them; 0: for a likely one.

    Raises:
        ConfigError: what training would refuse as well.
    """
    ranks = stage.cluster.gpus
    mesh = validate(stage.mesh, ranks)
    layout = layout_of(stage.engine, build(stage.optimizer), mesh)
    held = held_by_rank_0(stage, layout)
    model = build_model(stage)
    assert isinstance(model, Trainable)
    groups = parameter_groups(model, stage.parameters, *optimizer_defaults(build(stage.optimizer)))
    train, steps = stage.train, stage.train.gradient_accumulation_steps
    batches = first_batches(stage, model, read) if read else [likely(stage, model)]
    device = torch.device("cpu") if stage.cluster.is_cpu else META
    memory, batch = max(
        ((estimate_memory(model, layout, batch, train.recompute, device, steps), batch) for batch in batches),
        key=lambda found: found[0].total,
    )
    length, images, patches = _sizes(stage, batch)
    tokens = train.micro_batch_size * length
    tokens_per_step = tokens * steps * ranks
    flops_per_step = tokens_per_step * model.flops_per_token(length)
    return Plan(
        ranks=ranks,
        mesh=mesh,
        groups=describe_groups(groups, model),
        experts=describe.experts(model),
        images=images,
        patches=patches,
        tokens_per_micro_batch=tokens,
        tokens_per_step=tokens_per_step,
        memory=memory if held is None else replace(memory, **held),
        limit_gib=stage.cluster.limit_gib,
        traffic=describe.exchanged(stage, model, mesh) if isinstance(stage, LanguageStage) else None,
        flops_per_step=flops_per_step,
        hours=hours(stage, flops_per_step, tokens_per_step),
        notes=_notes(stage),
    )


def _sizes(stage: Stage, batch: Batch | PixelBatch) -> tuple[int, int, int]:
    """Tokens of a row, or codes of an image; images and patches of the micro-batch."""
    if isinstance(batch, PixelBatch):
        return batch.codes_per_image, stage.train.micro_batch_size, 0
    assert isinstance(stage, LanguageStage)
    of_images = batch.images.patches
    return stage.train.sequence_length, len(of_images.lengths), of_images.total


def _notes(stage: Stage) -> list[str]:
    ranks, streams = stage.cluster.gpus, stage.data.streams
    notes = describe.unheard(stage)
    if isinstance(stage, TokenizerStage):
        judges = {"critic": stage.critic, "perceptual": stage.perceptual}
        if uncounted := [key for key, judge in judges.items() if judge is not None]:
            notes.append(f"{' and '.join(uncounted)}: no part of the memory above")
    if streams % ranks:
        notes.append(f"data.streams={streams} must become a multiple of {ranks} before this can run")
    return notes


def held_by_rank_0(stage: Stage, layout: Layout) -> dict[str, int] | None:
    """Bytes of parameters, gradients and optimizer that rank 0 holds on its device.

    Under FSDP2 the engine itself is built, in a fake world and on the meta device, and its shards are
    counted. DeepSpeed needs storage to start: there the mesh, its options and the spread of the experts are
    checked, and None leaves the bytes to the formulas.
    """
    train, ranks = stage.train, stage.cluster.gpus
    with fake_world(ranks):
        mesh = build_mesh(stage.mesh, ranks, "cpu")
        if "zero_stage" in stage.engine:
            offload = Offload(stage.engine["offload"])
            deepspeed.validate(mesh, offload, stage.engine["zero_stage"], train.compile)
            model = build_model(stage)
            apply_plan(model, recompute=train.recompute, compile=train.compile, mesh=mesh, sharding=None)
            return None
        engine = _without_values(stage, mesh)
        if layout.weights.bytes_each == 0:
            return dict.fromkeys(("parameters", "gradients", "optimizer"), 0)
        base = base_names(engine.model)
        kept = {f"model.{name}": shard for name, shard in engine.model.named_parameters() if name in base}
        return shard_bytes(engine.state_dict() | kept)


def shard_bytes(state: Mapping[str, Any]) -> dict[str, int]:
    """What the shards of an engine's `state_dict` occupy on this rank.

    A gradient has the type and the shape of its parameter; a parameter is trained if there is state of it.
    """
    sizes = {name: _local_bytes(tensor) for name, tensor in state.items()}
    of_optimizer = [name.removeprefix("optimizer.") for name in sizes if name.startswith("optimizer.")]
    trained = {name.rpartition(".")[0] for name in of_optimizer}
    return {
        "parameters": sum(size for name, size in sizes.items() if name.startswith("model.")),
        "gradients": sum(sizes[f"model.{name}"] for name in trained),
        "optimizer": sum(sizes[f"optimizer.{name}"] for name in of_optimizer),
    }


def _local_bytes(tensor: Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


def _without_values(stage: Stage, mesh: RankMesh) -> Engine:
    """The engine as training builds it, on the meta device: nothing is allocated and nothing read."""
    offload = stage.engine["offload"]
    # Offloaded shards would be allocated in host memory; their sizes are the same anywhere.
    kept = Offload.none.value if offload == Offload.parameters.value else offload
    model = build_model(stage)
    engine: Engine = build(
        stage.engine | {"offload": kept},
        model=model,
        mesh=mesh,
        source=_NoValues(model),
        optimizer=build(stage.optimizer),
        parameters=stage.parameters,
        recompute=stage.train.recompute,
        compile=stage.train.compile,
        device=META,
    )
    return engine


class _NoValues:
    """A source of every tensor whose values are never needed."""

    def __init__(self, model: nn.Module) -> None:
        self._names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def read(self, name: str, index: Index) -> Tensor:
        return torch.empty([part.stop - part.start for part in index], device=META)
