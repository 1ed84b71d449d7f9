"""A model to use, from a published folder or from a run: first what it is, then its weights.

Between `open_model` and `load` a model is on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cantata.core.errors import ConfigError
from cantata.data.code_origin import CodeOrigin, read_origin
from cantata.data.collate.packed import PackedCollator
from cantata.models.adapter_files import read_adapter_config
from cantata.models.emu3 import Emu3Processor
from cantata.models.hub import CONFIG
from cantata.models.merge import MergedWeights
from cantata.models.protocol import Decodes, LanguageModel
from cantata.parallel.materialize import Index, Source, materialize, persistent_tensors
from cantata.tools.export_adapter import merged_run, open_adapter
from cantata.tools.families import family_of
from cantata.tools.runs import OpenRun, build_section, find_checkpoint, open_run
from cantata.train.adapter import AdapterValues
from cantata.train.stage import base_values

NO_PIXELS = "the model reads images as codes; add --tokenizer DIR, the image tokenizer whose codes it learned"


@dataclass(frozen=True)
class OpenedModel:
    """A model whose weights are still where they lie."""

    model: nn.Module
    """On the meta device."""
    collator: PackedCollator
    source: Source
    """Its weights, by native names."""
    max_positions: int
    """Tokens that a prompt and its continuation may have together."""
    no_images: str
    """Why images cannot be read as the model learned them; empty where they can."""
    notes: list[str]
    """What a user should know of the files."""
    codes: CodeOrigin | None = None
    """What made the codes that it learned; None where it learned none, or it is not known."""


class RunWeights:
    """The weights of a run: what its checkpoint holds, and what it adapts from where training read it."""

    def __init__(self, run: OpenRun) -> None:
        """Raises `ConfigError` where an adapter's base cannot be read or has changed."""
        self._run = run
        self._own = [name for name, _ in persistent_tensors(run.model)]
        self._held = frozenset(self._own)
        self._base = None if run.lora is None else run.base(None)

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from (name for name in self._base or () if name not in self._held)

    def read(self, name: str, index: Index) -> Tensor:
        """See `parallel.materialize.Source`."""
        if self._base is None or name in self._held:
            return self._run.read(name)[index]
        return self._base.read(name, index)


class Merged:
    """Parameters with an adapter merged into them, and buffers, which no adapter touches."""

    def __init__(self, parameters: MergedWeights, buffers: dict[str, Tensor]) -> None:
        self._parameters = parameters
        self._buffers = buffers

    def __iter__(self) -> Iterator[str]:
        yield from self._parameters
        yield from self._buffers

    def read(self, name: str, index: Index) -> Tensor:
        """See `parallel.materialize.Source`."""
        held = self._buffers.get(name)
        return (self._parameters.read(name) if held is None else held)[index]


def open_model(path: Path, adapter: Path | None = None, *, merge: bool = False) -> OpenedModel:
    """What lies at `path`: a Hugging Face folder, a checkpoint of a run, or a run directory (its newest).

    Args:
        adapter: a folder in PEFT's format, over a Hugging Face folder; a run brings its own.
        merge: add adapters to the weights instead of computing beside them: faster, rounded once.

    Raises `ConfigError` where it is none of these, not of a model that generates, or where an adapter does
    not fit; `RunError` for a damaged checkpoint.
    """
    if not path.exists():
        raise ConfigError(
            f"{path}: no such folder; give a Hugging Face folder, a run directory or a checkpoint"
        )
    if (path / CONFIG).is_file():
        if merge and adapter is None:
            raise ConfigError(f"--merge needs an adapter: {path} has none; add --adapter DIR")
        return _from_hub(path, adapter, merge)
    if adapter is not None:
        raise ConfigError(f"--adapter goes with a Hugging Face folder, and {path} is none")
    return _from_run(path, merge)


def load(opened: OpenedModel, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model with its weights, parameters in `dtype`, ready to be used; one tensor at a time is copied.

    Raises `RunError` where a weight cannot be read.
    """
    model = opened.model
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(False)
    materialize(model, opened.source, device)
    return model.eval()


def _from_hub(path: Path, adapter: Path | None, merge: bool) -> OpenedModel:
    family = family_of(path)
    with torch.device("meta"):
        model = family.build(path)
    assert isinstance(model, LanguageModel)
    layout = model.hub_layout()
    found = family.read_processor(path, layout)
    model.check_processor(found.processor)
    source: Source
    if adapter is None:
        source = base_values(str(path), 0, model)
    elif merge:
        source = Merged(open_adapter(adapter, path).merged(None), {})
    else:
        adapted = open_adapter(adapter, path)
        source = AdapterValues(adapted.model, adapted.base, adapted.adapter, seed=0)
        model = adapted.model
    if not isinstance(model, Decodes):
        raise ConfigError(f"{path}: {type(model).__name__} does not generate")
    notes = [*found.notes, *_other_base(path, adapter)]
    collator = PackedCollator(found.processor)
    codes = read_origin(path)
    return OpenedModel(model, collator, source, model.max_positions, found.no_images, notes, codes)


def _other_base(path: Path, adapter: Path | None) -> list[str]:
    """A line where an adapter says that it was trained on weights of another name."""
    named = None if adapter is None else read_adapter_config(adapter).get("base_model_name_or_path")
    if named is None or Path(named).resolve() == path.resolve():
        return []
    return [f"{adapter} was trained on {named}; that {path} holds the same weights is not checked"]


def _from_run(path: Path, merge: bool) -> OpenedModel:
    try:
        checkpoint = find_checkpoint(path)
    except ConfigError:
        raise ConfigError(
            f"{path} is no Hugging Face folder (no {CONFIG}), no complete checkpoint and no run "
            "directory that holds one"
        ) from None
    run = open_run(checkpoint)
    model = run.model
    source: Source
    if not merge:
        source = RunWeights(run)
    elif run.lora is None:
        raise ConfigError(f"--merge needs an adapter, and {path} trained none")
    else:
        with torch.device("meta"):
            model = build_section(run.config, "model", checkpoint)
        parameters = {name for name, _ in run.model.named_parameters()}
        held = [name for name, _ in persistent_tensors(run.model) if name not in parameters]
        source = Merged(merged_run(run, run.lora, None, None), {name: run.read(name) for name in held})
    if not isinstance(model, Decodes):
        raise ConfigError(f"{checkpoint}: {type(model).__name__} does not generate")
    no_images = NO_PIXELS if isinstance(run.processor, Emu3Processor) else ""
    collator = PackedCollator(run.processor)
    return OpenedModel(model, collator, source, model.max_positions, no_images, [], run.codes)
