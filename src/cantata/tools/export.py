"""`cantata export CHECKPOINT --to DIR`: a run's checkpoint as a Hugging Face directory, tensor by tensor."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cantata.core.build import build
from cantata.core.config import read_config
from cantata.core.errors import CantataError, ConfigError, RunError
from cantata.models.hub import HubWriter
from cantata.models.protocol import LanguageModel
from cantata.parallel.materialize import persistent_tensors
from cantata.tools.arguments import Parser
from cantata.train.checkpoint_files import CheckpointFiles, is_complete, read_state
from cantata.train.checkpoint_tensors import StoredTensors, differences
from cantata.train.humane import count, size

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
UNITS = {"MB": 10**6, "GB": 10**9}
_MODEL = "model."


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


def export(
    checkpoint: Path,
    directory: Path,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    write: Callable[[str], None],
) -> None:
    """Write the model of a checkpoint to `directory`, in the layout that transformers loads.

    Needs the memory of one shard and of the two largest tensors, however large the model is.

    Args:
        checkpoint: a checkpoint, or a run directory: its newest one.
        dtype: of the written weights; None keeps what is stored.
        write: takes the lines that say what was written and what was not.

    Raises:
        ConfigError: no complete checkpoint, no usable `config.yaml` beside it, a checkpoint of another
            model, or `directory` exists already.
        RunError: the checkpoint is damaged, the disk refuses, or a balance bias would be lost.
    """
    path = find_checkpoint(checkpoint)
    source = path.parent.parent / "config.yaml"
    if not source.is_file():
        raise ConfigError(f"{path}: the model is described in {source}, which is not there; put it back")
    config = read_config(source)
    with torch.device("meta"):
        model: nn.Module = build_section(config, "model", source)
    if not isinstance(model, LanguageModel):
        raise ConfigError(f"{source}: {type(model).__name__} cannot be exported")
    processor = build_section(config, "collator", source).processor
    layout = model.hub_layout()
    layout.hub_config()
    stored = StoredTensors(path)
    _check_model(model, stored)
    _check_buffers(model, stored)
    with HubWriter(directory, layout, max_shard_bytes) as writer:
        notes = layout.write_processor(processor, writer.path)
        for name, _ in model.named_parameters():
            writer.write(name, stored.read(_MODEL + name).to(dtype))
    shapes = [parameter.shape.numel() for parameter in model.parameters()]
    files = [file.stat().st_size for file in directory.glob("*.safetensors")]
    step = read_state(path)["step"]
    write(
        f"{directory}: {count(sum(shapes))} parameters, {size(sum(files))} in {_files(len(files))}, "
        f"from {path} (step {step})"
    )
    for note in notes:
        write(note)


def _files(number: int) -> str:
    return f"{number} file" + ("s" if number > 1 else "")


def _check_model(model: nn.Module, stored: StoredTensors) -> None:
    wanted = {_MODEL + name: tensor.shape for name, tensor in persistent_tensors(model)}
    found = {name: shape for name, shape in stored.shapes.items() if name.startswith(_MODEL)}
    problems = differences(found, wanted)
    if problems:
        raise ConfigError(f"{stored.path} is of another model than its config.yaml describes: {problems}")


def _check_buffers(model: nn.Module, stored: StoredTensors) -> None:
    """Raise where the published model would route otherwise: its layout has no place for a balance bias."""
    parameters = {name for name, _ in model.named_parameters()}
    for name, _ in persistent_tensors(model):
        if name not in parameters and stored.read(_MODEL + name).any():
            raise RunError(
                f"{stored.path}: {name} is not zero, and a published checkpoint has no place for it: without "
                "it tokens would go to other experts; publish a run that balances by its losses alone "
                "(model.text.moe.balance.bias_update_rate=0 from its start)"
            )


def shard_bytes(text: str) -> int:
    """Bytes of `5GB` or `500MB`; `ArgumentTypeError` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(MB|GB)", text)
    number = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if not number:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 5GB or 500MB")
    return number


def main(arguments: Sequence[str]) -> int:
    """The command; returns 0."""
    parser = Parser(prog="cantata export", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        help="RUN/checkpoints/step-..., or RUN: its newest complete checkpoint",
    )
    parser.add_argument(
        "--to", metavar="DIR", type=Path, required=True, help="the Hugging Face directory to write"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: as stored)")
    parser.add_argument(
        "--max-shard-size", type=shard_bytes, default="5GB", help="largest file of weights (%(default)s)"
    )
    given = parser.parse_args(arguments)
    try:
        export(given.checkpoint, given.to, DTYPES.get(given.dtype), given.max_shard_size, print)
    except OSError as error:
        raise CantataError(f"{error.filename or given.to}: {error.strerror or error}") from error
    return 0
