"""An image tokenizer to use: from a run, a checkpoint or a folder that was exported or published."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from cantata.core.errors import ConfigError
from cantata.models.autoencoder.model import autoencoder_from_hub
from cantata.models.emu3.vqvae import emu3_vqvae_from_hub
from cantata.models.hub import CONFIG, HubReader, read_json
from cantata.models.protocol import ImageTokenizer
from cantata.parallel.materialize import Source, materialize, persistent_tensors
from cantata.tools.open_model import RunWeights
from cantata.tools.runs import find_checkpoint, open_run

BY_TYPE = {"cantata_autoencoder": autoencoder_from_hub, "emu3_vqgan": emu3_vqvae_from_hub}
"""Who builds the model of a `config.json`, by its `model_type`."""


class OpenedTokenizer(NamedTuple):
    """A tokenizer with its weights, in evaluation."""

    model: ImageTokenizer
    digest: str
    """Of its quantiser's rule and its weights' and tables' names, shapes and bytes."""


def open_tokenizer(path: Path, device: torch.device) -> OpenedTokenizer:
    """The tokenizer at `path`, in fp32 and frozen: a run (its averages, where it kept some) or a folder.

    Raises `ConfigError` where it is no tokenizer's.
    """
    model, source = _from_hub(path) if (path / CONFIG).is_file() else _from_run(path)
    if not isinstance(model, ImageTokenizer):
        raise ConfigError(f"{path}: {type(model).__name__} is no image tokenizer; give a run of cantata vq")
    model.requires_grad_(False)
    materialize(model, source, device)
    return OpenedTokenizer(model.eval(), digest(model))


def digest(model: nn.Module) -> str:
    """Equal for tokenizers that make the same codes."""
    assert isinstance(model, ImageTokenizer)
    found = hashlib.blake2b(f"{model.quantizer.rule}\n".encode(), digest_size=16)
    # Tables that follow from the config are in no checkpoint, and codes follow from them.
    tensors = dict(persistent_tensors(model)) | dict(model.named_buffers())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _from_hub(path: Path) -> tuple[nn.Module, Source]:
    kind = read_json(path / CONFIG).get("model_type")
    if kind not in BY_TYPE:
        raise ConfigError(
            f"{path / CONFIG} has model_type={kind!r}; image tokenizers are {', '.join(BY_TYPE)}"
        )
    with torch.device("meta"):
        model: Any = BY_TYPE[kind](path)
    shapes = {name: tensor.shape for name, tensor in persistent_tensors(model)}
    return model, HubReader(path, model.hub_layout(), shapes)


def _from_run(path: Path) -> tuple[nn.Module, Source]:
    if not path.exists():
        raise ConfigError(f"{path}: no such folder; give a run of cantata vq, or a folder with {CONFIG}")
    run = open_run(find_checkpoint(path))
    return run.model, RunWeights(run)
