"""An image encoder to use: from a run, a checkpoint, or a folder that was exported or published."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from cantata.core.errors import ConfigError
from cantata.models.aimv2 import (
    Aimv2Contrastive,
    Aimv2Encoder,
    Aimv2PairProcessor,
    Aimv2Pretraining,
    Aimv2VisionConfig,
)
from cantata.models.aimv2.hf import Aimv2VisionLayout, read_hub_config
from cantata.models.aimv2.processor import PatchReader
from cantata.models.aimv2.vision import VisionTower
from cantata.models.chat_files import token_names
from cantata.models.hub import CONFIG, load_from_hub
from cantata.parallel.materialize import materialize
from cantata.tools.open_model import RunWeights
from cantata.tools.runs import find_checkpoint, open_run

MAX_NATIVE_PATCHES = 4096
"""Patches of a native image at most, where a folder does not say: those that AIMv2 was trained up to."""
TOKENIZER = "tokenizer_config.json"


class OpenedEncoder(NamedTuple):
    """An encoder with its weights, frozen and in evaluation."""

    vision: Aimv2VisionConfig
    tower: VisionTower
    reader: PatchReader
    pairs: Aimv2Contrastive | None
    """The whole model, where it has a text tower."""


def open_encoder(path: Path, device: torch.device) -> OpenedEncoder:
    """The AIMv2 encoder at `path`, in fp32: a run (its newest checkpoint), a checkpoint or a folder.

    Raises `ConfigError` where there is none.
    """
    model, reader = _from_hub(path) if (path / CONFIG).is_file() else _from_run(path, device)
    model.requires_grad_(False)
    model.to(device).eval()
    pairs = model if isinstance(model, Aimv2Contrastive) else None
    return OpenedEncoder(model.vision_config, model.vision, reader, pairs)


def _from_hub(path: Path) -> tuple[Any, PatchReader]:
    layout = read_hub_config(path)
    vision = layout.vision
    most = min(vision.grid**2, MAX_NATIVE_PATCHES) if vision.is_native else vision.grid**2
    sizes = (vision.image_size, vision.patch_size, vision.is_native, most)
    model: nn.Module
    if isinstance(layout, Aimv2VisionLayout):
        model, reader = Aimv2Encoder(vision), PatchReader(*sizes)
    else:
        model = Aimv2Contrastive(*layout)
        reader = _pair_reader(path, sizes, layout.text.max_position_embeddings)
    load_from_hub(model, layout, path)
    return model, reader


def _pair_reader(path: Path, sizes: tuple[int, int, bool, int], max_length: int) -> PatchReader:
    """With the folder's tokenizer, where there is one."""
    if not (path / TOKENIZER).is_file():
        return PatchReader(*sizes)
    names = token_names(path)
    roles = [f"{role}_token" for role in ("bos", "eos", "pad")]
    for role in roles:
        if role not in names:
            raise ConfigError(f"{path / TOKENIZER} names no {role}")
    begin, end, pad = (names[role] for role in roles)
    return Aimv2PairProcessor(str(path), *sizes, begin, end, pad, max_length)


def _from_run(path: Path, device: torch.device) -> tuple[Any, PatchReader]:
    if not path.exists():
        raise ConfigError(f"{path}: no such folder; give a run of AIMv2 or a folder with {CONFIG}")
    run = open_run(find_checkpoint(path))
    if not isinstance(run.model, Aimv2Pretraining | Aimv2Contrastive):
        raise ConfigError(f"{path}: {type(run.model).__name__} has no image encoder; give a run of AIMv2")
    materialize(run.model, RunWeights(run), device)
    return run.model, run.processor
