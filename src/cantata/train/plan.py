"""What a run on any number of ranks would hold, send and compute, found in one process without weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cantata.core.build import build
from cantata.core.errors import ConfigError
from cantata.core.types import Batch, PixelBatch, Segments
from cantata.models.lora import base_names
from cantata.models.protocol import (
    ImageTokenizer,
    LanguageModel,
    PairEncoder,
    PatchPredictor,
    ReadsAcross,
    Trainable,
)
from cantata.parallel.fake_world import fake_world
from cantata.parallel.materialize import Index
from cantata.parallel.mesh import MeshSizes, RankMesh, build_mesh, validate
from cantata.parallel.plan import apply_plan
from cantata.train import deepspeed, describe
from cantata.train.dry_run import synthetic_batch
from cantata.train.engine import Engine
from cantata.train.memory import GIB, Layout, MemoryEstimate, estimate_memory, layout_of
from cantata.train.optim import (
    GroupSummary,
    deciding_pattern,
    describe_groups,
    optimizer_defaults,
    parameter_groups,
)
from cantata.train.options import Offload
from cantata.train.stage import LanguageStage, Stage, build_model
from cantata.train.startup import Experts
from cantata.train.tokenizer_stage import TokenizerStage
from cantata.train.traffic import Traffic

META = torch.device("meta")
CHANNELS = 3
IMAGE_PATH = ("vision.", "projector.")
"""How the names of the parameters begin that only images reach."""
IMAGE_KEYS = {"image_size", "patch_size", "features_per_image"}
TOKENS_PER_IMAGE = 512
"""How many tokens there are for each image that is one of them."""


@dataclass(frozen=True)
class Plan:
    """The figures of one stage on `ranks` ranks."""

    ranks: int
    mesh: MeshSizes
    groups: list[GroupSummary]
    experts: Experts | None
    images: int
    """Images of a micro-batch of the dry run."""
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
    notes: list[str]
    """What stands in the way of such a run."""

    @property
    def fits(self) -> bool | None:
        """Whether the estimate is below the limit; None where there is none."""
        return None if self.limit_gib is None else self.memory.total <= self.limit_gib * GIB


def make_plan(stage: Stage) -> Plan:
    """The plan of a stage on `cluster.gpus` ranks; neither data nor weights are read.

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
    train = stage.train
    batch: Batch | PixelBatch
    if isinstance(stage, TokenizerStage):
        batch = likely_images(stage, model)
        length, images, patches = batch.codes_per_image, train.micro_batch_size, 0
    else:
        assert isinstance(stage, LanguageStage)
        assert isinstance(model, LanguageModel)
        batch = likely_batch(stage, model)
        length, of_images = stage.train.sequence_length, batch.images.patches
        images, patches = len(of_images.lengths), of_images.total
    memory = estimate_memory(model, layout, batch, train.recompute, META, train.gradient_accumulation_steps)
    tokens = train.micro_batch_size * length
    tokens_per_step = tokens * train.gradient_accumulation_steps * ranks
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
        limit_gib=stage.cluster.memory_gib,
        traffic=describe.exchanged(stage, model, mesh) if isinstance(stage, LanguageStage) else None,
        flops_per_step=tokens_per_step * model.flops_per_token(length),
        notes=_notes(stage),
    )


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


def likely_images(stage: TokenizerStage, model: Trainable) -> PixelBatch:
    """A micro-batch of the largest size; clips where the collator takes them."""
    assert isinstance(model, ImageTokenizer)
    count, frames = stage.train.micro_batch_size, stage.collator["frames"]
    height, width = max(stage.collator["sizes"], key=math.prod)
    return PixelBatch(
        torch.empty((count, frames, CHANNELS, height, width), dtype=torch.uint8, device=META),
        is_real_B=torch.ones(count, dtype=torch.bool),
        keys=("image",) * count,
        codes_per_image=math.prod(model.grid(frames, height, width)),
    )


def likely_batch(stage: LanguageStage, model: LanguageModel) -> Batch:
    """Full rows of one sample each; where images are trained on, their features take half of a row.

    For a model that reads images across, one of every `TOKENS_PER_IMAGE` tokens is an image of all its tiles.
    The share is a guess in place of data that a plan does not read. A stage whose rules freeze the tower and
    the projector is taken to have no images; the shapes of others are those that the processor makes.
    """
    rows, length = stage.train.micro_batch_size, stage.train.sequence_length
    if isinstance(model, ReadsAcross):
        return _likely_across(rows, length, model.patches_per_image, stage.collator["processor"])
    processor = stage.collator["processor"]
    if isinstance(model, PatchPredictor | PairEncoder):
        return _likely_patches(model, processor, rows, length)
    path = [name for name, _ in model.named_parameters() if name.startswith(IMAGE_PATH)]
    if not path:
        return synthetic_batch(Segments((length,) * rows), Segments(()), Segments(()), 0)
    unknown = IMAGE_KEYS - processor.keys()
    if unknown:
        raise ConfigError(f"collator.processor.{min(unknown)} is not there, and cantata plan needs it")
    features = processor["features_per_image"]
    patches = (processor["image_size"] // processor["patch_size"]) ** 2
    deciding = [deciding_pattern(name, stage.parameters) for name in path]
    sees = any(pattern is None or not stage.parameters[pattern].frozen for pattern in deciding)
    images = rows * max(1, length // (2 * features)) if sees and features <= length else 0
    return synthetic_batch(
        Segments((length,) * rows),
        Segments((patches,) * images),
        Segments((features,) * images),
        CHANNELS * processor["patch_size"] ** 2,
    )


def _likely_across(rows: int, length: int, patches: int, processor: Mapping[str, Any]) -> Batch:
    if "patch_size" not in processor:
        raise ConfigError("collator.processor.patch_size is not there, and cantata plan needs it")
    step = min(length, TOKENS_PER_IMAGE)
    firsts = [row * length + at for row in range(rows) for at in range(0, length - step + 1, step)]
    firsts = firsts if patches else []
    return synthetic_batch(
        Segments((length,) * rows),
        Segments((patches,) * len(firsts)),
        Segments((1,) * len(firsts)),
        CHANNELS * processor["patch_size"] ** 2,
        firsts,
    )


def _likely_patches(
    model: PatchPredictor | PairEncoder, processor: Mapping[str, Any], rows: int, length: int
) -> Batch:
    """Rows full of images of the most patches, with half of each for a prefix; of pairs the longest texts."""
    patches, values = processor["max_patches"], CHANNELS * processor["patch_size"] ** 2
    if isinstance(model, PairEncoder):
        pairs = rows * (length // processor["max_length"])
        texts = Segments((processor["max_length"],) * pairs)
        return synthetic_batch(texts, Segments((patches,) * pairs), Segments((0,) * pairs), values)
    images = Segments((patches,) * (rows * (length // patches)))
    prefix = Segments((max(1, patches // 2),) * len(images.lengths))
    return synthetic_batch(Segments((length,) * rows), images, images, values, prefix=prefix)
