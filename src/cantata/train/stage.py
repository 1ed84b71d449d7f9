"""The config roots of the stages, and the way from them to a model, its data and its engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cantata.core import dist
from cantata.core.build import build
from cantata.core.errors import ConfigError
from cantata.core.schema import slot
from cantata.core.suggest import hint
from cantata.data.assembly import build_held_out, build_loader
from cantata.data.collate import PackedCollator
from cantata.data.config import DataConfig, ImageDataConfig
from cantata.data.held_out import HeldOut
from cantata.data.loader import Loader
from cantata.models.adapter_files import AdapterReader
from cantata.models.hub import HubReader, parameter_shapes
from cantata.models.lora import LoRAConfig, apply_lora
from cantata.models.protocol import (
    AssembledFrom,
    HubPart,
    ImageTokenizer,
    LanguageModel,
    PairEncoder,
    PatchPredictor,
)
from cantata.nn.lora import is_factor
from cantata.parallel.materialize import Assembled, RandomInit, Source, persistent_tensors
from cantata.parallel.mesh import MeshConfig, build_mesh
from cantata.train.accuracy import AccuracyConfig
from cantata.train.adapter import AdapterValues, BaseIdentity
from cantata.train.checkpoint import CheckpointConfig
from cantata.train.cluster import ClusterConfig
from cantata.train.config import LanguageTrainConfig, TrainConfig
from cantata.train.engine import Engine, Objective
from cantata.train.loggers import LoggerConfig
from cantata.train.optim import ParameterRule

ENGINE_RUNTIME = ("model", "mesh", "source", "optimizer", "parameters", "recompute", "compile", "device")
"""What the program, not the YAML, hands to an engine."""

WEIGHTS_WANTED = ""
"""`model.weights` where a stage leaves it to the user, as YAML's `???` cannot: it never replaces a value."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Every key that all stages have."""

    name: str
    """Names the run; part of `out` by default."""
    out: Path
    """The run directory, one for all ranks; the same one again resumes."""
    seed: int
    """Decides initial values and the order of samples."""
    model: dict[str, Any] = slot()
    data: ImageDataConfig
    mesh: MeshConfig
    engine: dict[str, Any] = slot(runtime=ENGINE_RUNTIME)
    optimizer: dict[str, Any] = slot()
    parameters: dict[str, ParameterRule]
    """Learning rate, decay and freezing by pattern on parameter names; the last match decides."""
    schedule: dict[str, Any] = slot()
    train: TrainConfig
    checkpoint: CheckpointConfig
    logger: LoggerConfig
    cluster: ClusterConfig

    def __post_init__(self) -> None:
        if self.goals() and not (self.train.eval_every and self.data.held_out):
            key = next(iter(self.goals()))
            raise ConfigError(f"{key} needs evaluations: set train.eval_every above 0 and name data.held_out")

    def goals(self) -> dict[str, str]:
        """Metrics of evaluations that the run goes by, by the key that names them."""
        chosen = {
            "checkpoint.best.metric": self.checkpoint.best,
            "train.early_stopping.metric": self.train.early_stopping,
        }
        return {key: goal.metric for key, goal in chosen.items() if goal is not None}


@dataclass(frozen=True, kw_only=True)
class LanguageStage(Stage):
    """Every key of a stage that trains a language model."""

    collator: dict[str, Any] = slot()
    data: DataConfig
    train: LanguageTrainConfig


@dataclass(frozen=True, kw_only=True)
class PretrainStage(LanguageStage):
    """Every key of pretraining."""

    objective: dict[str, Any] = slot(runtime=("model",))
    """What is minimised: the next token, or what a model of another kind learns by."""


@dataclass(frozen=True, kw_only=True)
class FineTuneStage(LanguageStage):
    """Every key of supervised fine-tuning."""

    accuracy: AccuracyConfig
    """How many answers to held-out questions are right."""

    def __post_init__(self) -> None:
        super().__post_init__()
        held_out = self.data.held_out
        for key, metric in self.goals().items():
            if metric.startswith("eval/accuracy") and not self.accuracy.samples:
                raise ConfigError(f"{key}={metric} needs questions: set accuracy.samples above 0")
        for source in self.accuracy.choices:
            if source not in held_out:
                raise ConfigError(
                    f"accuracy.choices.{source} is no source of data.held_out{hint(source, held_out)}"
                )


@dataclass(frozen=True, kw_only=True)
class LoRAStage(FineTuneStage):
    """Every key of fine-tuning with adapters."""

    lora: LoRAConfig
    """Which parts get low-rank adapters; all else is frozen."""


def build_objective(stage: PretrainStage, model: nn.Module) -> Objective:
    """What the model learns by; `ConfigError` where it cannot learn by that."""
    objective: Objective = build(stage.objective, model=model)
    return objective


def require_weights(stage: LanguageStage) -> None:
    """Raise `ConfigError` where nobody has said what to start from."""
    if stage.model["weights"] == WEIGHTS_WANTED:
        raise ConfigError(
            "model.weights must be given, for example on the command line: model.weights=DIR, a Hugging Face "
            "directory (of a run: cantata export RUN --to DIR); null starts from random values"
        )


def build_model(stage: Stage) -> nn.Module:
    """The model on the meta device, with its adapters: shapes without storage.

    Raises `ConfigError` for a model that is not fine-tuned, and where a pattern of `lora` matches nothing.
    """
    with torch.device("meta"):
        model: nn.Module = build(stage.model)
        if isinstance(stage, FineTuneStage):
            _check_answers(model)
        if isinstance(stage, LoRAStage):
            apply_lora(model, stage.lora)
    return model


def _check_answers(model: nn.Module) -> None:
    """Fine-tuning learns the next token of answers alone."""
    if isinstance(model, PatchPredictor | PairEncoder):
        raise ConfigError(
            f"model: {type(model).__name__} learns patches or pairs, cantata sft and lora the next token of "
            "answers; go on from weights with cantata pretrain and the model's own objective"
        )


def base_identity(stage: Stage) -> dict[str, BaseIdentity]:
    """What the checkpoints of an adapter keep of the weights that it adapts."""
    if not isinstance(stage, LoRAStage):
        return {}
    return {"base": BaseIdentity(stage.model["weights"], stage.seed, stage.lora)}


def build_data(stage: LanguageStage, model: nn.Module) -> tuple[Loader, HeldOut]:
    """Training and held-out batches of this rank; opens every file, so what is missing is found first.

    Raises `ConfigError` where the collator makes what the model cannot read.
    """
    process = dist.find_process()
    collator = build_collator(stage, model)
    shape = {
        "sequence_length": stage.train.sequence_length,
        "micro_batch_size": stage.train.micro_batch_size,
        "rank": process.rank,
        "world_size": process.world_size,
    }
    loader = build_loader(stage.data, collator, seed=stage.seed, **shape)
    return loader, build_held_out(stage.data, collator, **shape)


def build_collator(stage: LanguageStage, model: nn.Module) -> PackedCollator:
    """Raises `ConfigError` where the collator makes what the model cannot read."""
    assert isinstance(model, LanguageModel)
    collator: PackedCollator = build(stage.collator)
    model.check_processor(collator.processor)
    return collator


def build_engine(stage: Stage, model: nn.Module) -> Engine:
    """The engine that `engine` names, with the model spread over the mesh and given its first values."""
    device = dist.device()
    engine: Engine = build(
        stage.engine,
        model=model,
        mesh=build_mesh(stage.mesh, dist.world_size(), device.type),
        source=initial_values(stage, model),
        optimizer=build(stage.optimizer),
        parameters=stage.parameters,
        recompute=stage.train.recompute,
        compile=stage.train.compile,
        device=device,
    )
    return engine


def initial_values(stage: Stage, model: nn.Module) -> Source:
    """Random values from the seed, or the checkpoint that `model.weights` names; of adapters, theirs."""
    if not isinstance(stage, LoRAStage):
        return base_values(stage.model["weights"], stage.seed, model)
    assert isinstance(model, LanguageModel)
    base, saved = base_values(stage.model["weights"], stage.seed, model), None
    if stage.lora.adapter is not None:
        saved = AdapterReader(stage.lora.adapter, model.hub_layout(), model, stage.lora, base)
    return AdapterValues(model, base, saved, stage.seed)


def base_values(weights: str | None, seed: int, model: nn.Module) -> Source:
    """The values of a model's own parameters, adapters left out; of an image tokenizer its buffers too."""
    parts = model.parts() if isinstance(model, AssembledFrom) else ()
    if parts:
        return Assembled(RandomInit(model, seed), [_reader(part, model) for part in parts])
    if weights is None:
        return RandomInit(model, seed)
    if isinstance(model, ImageTokenizer):
        assert isinstance(model, nn.Module)
        kept = {name: tensor.shape for name, tensor in persistent_tensors(model)}
        return HubReader(weights, model.hub_layout(), kept)
    assert isinstance(model, LanguageModel)
    shapes = {name: shape for name, shape in parameter_shapes(model).items() if not is_factor(name)}
    return HubReader(weights, model.hub_layout(), shapes)


def _reader(part: HubPart, model: nn.Module) -> HubReader:
    shapes = {name: shape for name, shape in parameter_shapes(model).items() if name in part.names}
    return HubReader(part.directory, part.layout, shapes)
