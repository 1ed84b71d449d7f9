"""A checkpoint of a run, opened on the meta device: what it is of, and where its tensors lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cantata.core.build import build
from cantata.core.config import read_config
from cantata.core.errors import ConfigError, RunError
from cantata.core.schema import convert
from cantata.data.code_origin import CodeOrigin
from cantata.models.lora import LoRAConfig, apply_lora
from cantata.models.protocol import HubLayout, ImageTokenizer, LanguageModel, PartlyPublished
from cantata.parallel.materialize import Source, persistent_tensors
from cantata.train.adapter import BaseIdentity
from cantata.train.checkpoint_files import CheckpointFiles, is_complete, read_state
from cantata.train.checkpoint_sums import damage
from cantata.train.checkpoint_tensors import StoredTensors, differences
from cantata.train.learned_codes import KEPT
from cantata.train.stage import base_values

BASE = "base"
"""Under which a checkpoint's state says what its adapter adapts."""

_MODEL = "model."


@dataclass(frozen=True)
class OpenRun:
    """A complete checkpoint that fits the model its run describes."""

    path: Path
    config: dict[str, Any]
    model: nn.Module
    """With its adapters, where `lora` is not None."""
    layout: HubLayout
    processor: Any
    """A `Processor`; None of an image tokenizer."""
    lora: LoRAConfig | None
    stored: StoredTensors
    state: dict[str, Any]

    @property
    def title(self) -> str:
        """Which one it is, for a line that says what was done with it."""
        return f"{self.path} (step {self.state['step']})"

    @property
    def codes(self) -> CodeOrigin | None:
        """What made the codes that it learned; None where it learned none."""
        kept = self.state["extra"].get(KEPT)
        return None if kept is None else CodeOrigin(**kept)

    def read(self, name: str) -> Tensor:
        """A whole tensor of the checkpoint, by its native name: its moving average where one is kept."""
        average = f"optimizer.{name}.ema"
        return self.stored.read(average if average in self.stored.shapes else _MODEL + name)

    def names(self) -> list[str]:
        """The native names of what a published folder holds: parameters, of image tokenizers buffers too."""
        if isinstance(self.model, ImageTokenizer):
            return [name for name, _ in persistent_tensors(self.model)]
        names = [name for name, _ in self.model.named_parameters()]
        if isinstance(self.model, PartlyPublished):
            return [name for name in names if self.model.is_published(name)]
        return names

    def base(self, folder: Path | None) -> Source:
        """The weights that the adapter adapts: of `folder`, or of where training read them.

        Raises `ConfigError` where they cannot be read or are other ones than training's.
        """
        assert self.lora is not None
        weights = self.config["model"]["weights"] if folder is None else str(folder)
        found = base_values(weights, self.config["seed"], self.model)
        BaseIdentity(weights, self.config["seed"], self.lora).load_state_dict(self.state["extra"][BASE])
        return found


def open_run(checkpoint: Path) -> OpenRun:
    """Open a checkpoint, or the newest one of a run directory.

    Raises:
        ConfigError: no complete checkpoint, no usable `config.yaml` beside it, or one of another model.
        RunError: the checkpoint does not match its checksums, or its index is damaged.
    """
    path = find_checkpoint(checkpoint)
    if problem := damage(path):
        raise RunError(f"{path} is damaged ({problem}); take another checkpoint of the run")
    source = path.parent.parent / "config.yaml"
    if not source.is_file():
        raise ConfigError(f"{path}: the model is described in {source}, which is not there; put it back")
    config = read_config(source)
    with torch.device("meta"):
        model: nn.Module = build_section(config, "model", source)
    if not isinstance(model, LanguageModel | ImageTokenizer):
        raise ConfigError(f"{source}: {type(model).__name__} cannot be exported")
    processor = None
    if isinstance(model, LanguageModel):
        processor = build_section(config, "collator", source).processor
    lora = _read_lora(config, source)
    if lora is not None:
        _require_seed(config, source)
        apply_lora(model, lora)
    stored = StoredTensors(path)
    wanted = {_MODEL + name: tensor.shape for name, tensor in persistent_tensors(model)}
    found = {name: shape for name, shape in stored.shapes.items() if name.startswith(_MODEL)}
    problems = differences(found, wanted)
    if problems:
        raise ConfigError(f"{path} is of another model than its config.yaml describes: {problems}")
    return OpenRun(path, config, model, model.hub_layout(), processor, lora, stored, read_state(path))


def find_checkpoint(path: Path) -> Path:
    """The complete checkpoint that `path` is, or the newest of the run directory that it is.

    Raises `ConfigError` where there is none.
    """
    found = path if is_complete(path) else CheckpointFiles(path).newest()
    if found is None:
        raise ConfigError(f"{path} is neither a complete checkpoint nor a run directory that holds one")
    return found.absolute()


def build_section(config: dict[str, Any], key: str, path: Path) -> Any:
    """What the slot `key` of a run's configuration describes; messages name `path`."""
    node = config.get(key)
    if not isinstance(node, dict):
        raise ConfigError(f"{path} has no {key}; is it the config.yaml of a run?")
    try:
        return build(node)
    except ConfigError as error:
        raise ConfigError(f"{path}, {key}: {error}") from error


def _require_seed(config: dict[str, Any], path: Path) -> None:
    """The adapter's base may be random values, which the seed decides."""
    seed = config.get("seed")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ConfigError(f"{path} has no seed (a whole number); is it the config.yaml of a run?")


def _read_lora(config: dict[str, Any], path: Path) -> LoRAConfig | None:
    node = config.get("lora")
    if node is None:
        return None
    try:
        found: LoRAConfig = convert(node, LoRAConfig, ("lora",), lambda slot, key, runtime: slot)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return found
