"""`cantata export CHECKPOINT --to DIR`: a run's model or adapter for others to load, tensor by tensor."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from cantata.core.errors import CantataError, ConfigError, RunError
from cantata.models.adapter_files import is_adapter
from cantata.models.hub import HubWriter
from cantata.models.protocol import PartlyPublished
from cantata.parallel.materialize import persistent_tensors
from cantata.tools.arguments import Parser
from cantata.tools.export_adapter import export_adapter, merge_folder, merged_run, require_base
from cantata.tools.runs import OpenRun, open_run
from cantata.train.humane import count, size

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
UNITS = {"MB": 10**6, "GB": 10**9}


def export(
    checkpoint: Path,
    directory: Path,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    write: Callable[[str], None],
    *,
    merge: bool = False,
    base: Path | None = None,
) -> None:
    """Write the model or the adapter of a checkpoint to `directory`, in the layout that others load.

    A whole model needs the memory of one shard and of the two largest tensors, however large it is.

    Args:
        checkpoint: a checkpoint, a run directory (its newest one), or an adapter's folder in PEFT's format.
        dtype: of the written weights; None keeps what is stored, of a merged model what its base has.
        write: takes the lines that say what was written and what was not.
        merge: write the whole model that an adapter makes of its base, not the adapter.
        base: the Hugging Face folder that an adapter adapts; None: where training read it.

    Raises:
        ConfigError: no complete checkpoint, no usable `config.yaml` beside it, a checkpoint of another
            model, another base than training's, or `directory` exists already.
        RunError: the checkpoint is damaged, the disk refuses, or a balance bias would be lost.
    """
    if is_adapter(checkpoint):
        folder = require_base(checkpoint, base, merge=merge)
        title = merge_folder(checkpoint, folder, directory, dtype, max_shard_bytes)
        _report(directory, title, [], write)
        return
    run = open_run(checkpoint)
    if run.lora is None and (merge or base is not None):
        raise ConfigError(f"{run.path} holds a whole model and no adapter; leave out --merge and --base")
    run.layout.hub_config()
    _check_buffers(run)
    if run.lora is not None and not merge:
        export_adapter(run, run.lora, base, directory, dtype, write)
        return
    merged = None if run.lora is None else merged_run(run, run.lora, base, dtype)
    with HubWriter(directory, run.layout, max_shard_bytes) as writer:
        notes = run.layout.write_processor(run.processor, writer.path)
        if run.codes is not None:
            run.codes.write(writer.path)
        if merged is not None:
            for name in merged:
                writer.write(name, merged.read(name))
        else:
            for name in run.names():
                writer.write(name, _cast(run.read(name), dtype))
            notes += _left_behind(run)
    _report(directory, run.title if merged is None else f"{run.title}, merged", notes, write)


def _report(directory: Path, title: str, notes: Sequence[str], write: Callable[[str], None]) -> None:
    elements = 0
    files = sorted(directory.glob("*.safetensors"))
    for file in files:
        with safe_open(file, framework="pt") as opened:
            shapes = [opened.get_slice(key).get_shape() for key in opened.keys()]  # noqa: SIM118
        elements += sum(math.prod(shape) for shape in shapes)
    total = size(sum(file.stat().st_size for file in files))
    write(f"{directory}: {count(elements)} parameters, {total} in {_files(len(files))}, from {title}")
    for note in notes:
        write(note)


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _files(number: int) -> str:
    return f"{number} file" + ("s" if number > 1 else "")


def _left_behind(run: OpenRun) -> list[str]:
    """A line on the parameters that no published folder holds."""
    written = set(run.names())
    left = {name: p.numel() for name, p in run.model.named_parameters() if name not in written}
    if not isinstance(run.model, PartlyPublished) or not left:
        return []
    parts = ", ".join(sorted({name.partition(".")[0] for name in left}))
    return [f"only training needs {parts} ({count(sum(left.values()))} parameters): left in the run"]


def _check_buffers(run: OpenRun) -> None:
    """Raise where the published model would route otherwise: its layout has no place for a balance bias."""
    parameters = {name for name, _ in run.model.named_parameters()}
    written = set(run.names())
    for name, _ in persistent_tensors(run.model):
        if name not in written | parameters and run.read(name).any():
            raise RunError(
                f"{run.path}: {name} is not zero, and a published checkpoint has no place for it: without "
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
        help="RUN/checkpoints/step-..., RUN: its newest complete checkpoint, or the folder of an adapter",
    )
    parser.add_argument("--to", metavar="DIR", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--merge", action="store_true", help="of a LoRA run write the whole model, its adapter merged"
    )
    parser.add_argument(
        "--base",
        metavar="HF_DIR",
        type=Path,
        help="what the adapter adapts (default: the run's model.weights)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the weights (default: as stored; merged: as in the base)"
    )
    parser.add_argument(
        "--max-shard-size", type=shard_bytes, default="5GB", help="largest file of weights (%(default)s)"
    )
    given = parser.parse_args(arguments)
    try:
        dtype = DTYPES.get(given.dtype)
        shard = given.max_shard_size
        export(given.checkpoint, given.to, dtype, shard, print, merge=given.merge, base=given.base)
    except OSError as error:
        raise CantataError(f"{error.filename or given.to}: {error.strerror or error}") from error
    return 0
