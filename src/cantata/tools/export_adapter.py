"""What `cantata export` does with adapters: write one in PEFT's format, or merge one into its base."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from cantata.core.errors import ConfigError
from cantata.models.adapter_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    AdapterReader,
    read_lora_config,
    whole,
)
from cantata.models.adapter_writer import AdapterWriter
from cantata.models.hub import CONFIG, INDEX, HubWriter, parameter_shapes, staged
from cantata.models.lora import LoRAConfig, apply_lora, base_names
from cantata.models.merge import MergedWeights
from cantata.models.protocol import HubLayout, LanguageModel
from cantata.parallel.materialize import Source
from cantata.tools.families import family_of
from cantata.tools.runs import OpenRun
from cantata.train.humane import count, size
from cantata.train.stage import base_values

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_OWN = (CONFIG, INDEX, ADAPTER_CONFIG, ADAPTER_WEIGHTS, "README.md")


def export_adapter(
    run: OpenRun,
    lora: LoRAConfig,
    base: Path | None,
    directory: Path,
    dtype: torch.dtype | None,
    write: Callable[[str], None],
) -> None:
    """Write a run's adapter to `directory` in PEFT's format, with tokenizer and processor files.

    Raises `ConfigError` where PEFT has no place for a part of it, or `directory` exists already, and
    `RunError` where the checkpoint is damaged or the disk refuses.
    """
    weights = run.config["model"]["weights"] if base is None else str(base)
    writer = AdapterWriter(run.model, run.layout, lora, weights)
    source = run.base(base)
    shapes = parameter_shapes(run.model)
    trained = shapes.keys() - base_names(run.model)

    def read(name: str) -> torch.Tensor:
        return run.read(name) if name in trained else source.read(name, whole(shapes[name]))

    with staged(directory) as path:
        notes = [*writer.write(path, read, dtype), *run.layout.write_processor(run.processor, path)]
        if run.codes is not None:
            run.codes.write(path)
    elements = sum(shapes[name].numel() for name in trained)
    bytes_written = (directory / ADAPTER_WEIGHTS).stat().st_size
    write(f"{directory}: an adapter of {count(elements)} parameters, {size(bytes_written)}, from {run.title}")
    if weights is None:
        notes.append(
            "no folder holds what it adapts, random values (model.weights: null): "
            "to use it elsewhere export a merged model with --merge"
        )
    for note in notes:
        write(note)


def merged_run(run: OpenRun, lora: LoRAConfig, base: Path | None, dtype: torch.dtype | None) -> MergedWeights:
    """The weights of a run's model, its adapter merged."""
    return MergedWeights(run.model, run.layout, lora, run.base(base), run.read, dtype)


class AdaptedFolder(NamedTuple):
    """A Hugging Face folder with an adapter in PEFT's format over it."""

    model: nn.Module
    """Adapted, on the meta device."""
    layout: HubLayout
    lora: LoRAConfig
    base: Source
    adapter: AdapterReader

    def merged(self, dtype: torch.dtype | None) -> MergedWeights:
        """Its weights, the adapter merged; a dtype of None keeps the base's."""
        shapes = parameter_shapes(self.model)

        def read(name: str) -> torch.Tensor:
            return self.adapter.read(name, whole(shapes[name]))

        return MergedWeights(self.model, self.layout, self.lora, self.base, read, dtype)


def open_adapter(adapter: Path, base: Path) -> AdaptedFolder:
    """Raises `ConfigError` where the two do not fit."""
    with torch.device("meta"):
        model = family_of(base).build(base)
        assert isinstance(model, LanguageModel)
        layout = model.hub_layout()
        lora = read_lora_config(adapter, layout, model)
        apply_lora(model, lora)
    source = base_values(str(base), 0, model)
    return AdaptedFolder(model, layout, lora, source, AdapterReader(adapter, layout, model, lora, source))


def merge_folder(
    adapter: Path, base: Path, directory: Path, dtype: torch.dtype | None, max_shard_bytes: int
) -> str:
    """Merge an adapter in PEFT's format into the Hugging Face folder `base`; returns what was merged.

    Other files (a tokenizer, say) are copied, the adapter's where both folders have one.

    Raises `ConfigError` where the two do not fit or `directory` exists already.
    """
    adapted = open_adapter(adapter, base)
    merged = adapted.merged(dtype)
    with HubWriter(directory, adapted.layout, max_shard_bytes) as writer:
        for folder in (base, adapter):
            for file in folder.iterdir():
                if file.is_file() and file.suffix not in _WEIGHTS and file.name not in _OWN:
                    shutil.copyfile(file, writer.path / file.name)
        for name in merged:
            writer.write(name, merged.read(name))
    return f"{adapter} merged into {base}"


def require_base(adapter: Path, base: Path | None, *, merge: bool) -> Path:
    """Raise `ConfigError` where the folder of an adapter was given and not what to do with it."""
    if merge and base is not None:
        return base
    raise ConfigError(
        f"{adapter} is an adapter in PEFT's format already; to merge it add --merge --base HF_DIR"
    )
