"""Hugging Face checkpoint directories, read and written tensor by tensor.

Sharded safetensors, an index and a `config.json`. Nothing here needs more memory than one shard.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cantata.core.errors import ConfigError, RunError
from cantata.models.protocol import HubLayout, Written

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SHOWN = 10


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `ConfigError` where the file is missing or is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path.parent}: no {path.name}; give a Hugging Face model directory") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds no JSON object")
    return content


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """A JSON object, as published folders have them."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class _Stored(NamedTuple):
    """Where a hub's tensor lies in a file."""

    key: str
    place: int
    """Of the tensors stacked under that key, the number of this one."""
    of: int
    """How many are stacked there."""


class HubReader:
    """Reads a published checkpoint by native names, lazily and in slices.

    directory: a Hugging Face model directory.
    layout: the family's names.
    shapes: the native parameters wanted, with their whole shapes.

    Raises `ConfigError` that lists the keys that are missing, unexpected or of another shape.
    """

    def __init__(self, directory: str | Path, layout: HubLayout, shapes: Mapping[str, torch.Size]) -> None:
        self.directory = Path(directory)
        self._shapes = dict(shapes)
        self._keys = {name: layout.to_hub(name) for name in shapes}
        self._open: tuple[str, Any] | None = None
        self._files: dict[str, str] = {}
        self._stored: dict[str, _Stored] = {}
        for stored, file in self._locate().items():
            found = layout.hub_key(stored)
            keys = (found,) if isinstance(found, str) else found or ()
            for place, key in enumerate(keys):
                self._files[key], self._stored[key] = file, _Stored(stored, place, len(keys))
        self._check({self._keys[name]: layout.hub_shape(name, shape) for name, shape in shapes.items()})

    def __iter__(self) -> Iterator[str]:
        """Native names, file by file: the order in which each file is opened once."""
        return iter(sorted(self._keys, key=lambda name: self._files[self._keys[name]]))

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> Tensor:
        """A parameter, or the slice `index` of it, in the dtype of the file."""
        key, shape = self._keys[name], self._shapes[name]
        stored = self._slice(key)
        if tuple(stored.get_shape()) != tuple(shape):
            rows = self._shape(key)[:1]
            start = self._stored[key].place * (rows[0] if rows else 0)
            whole: Tensor = (stored[start : start + rows[0]] if rows else stored[...]).reshape(shape)
            return whole if index is None else whole[index]
        part: Tensor = stored[:] if index is None else stored[index]
        return part

    def _locate(self) -> dict[str, str]:
        if not self.directory.is_dir():
            raise ConfigError(f"{self.directory}: no such folder; give a Hugging Face model directory")
        if (self.directory / SINGLE).is_file():
            return dict.fromkeys(self._file_keys(SINGLE), SINGLE)
        if not (self.directory / INDEX).is_file():
            wanted = f"neither {SINGLE} nor {INDEX}"
            raise ConfigError(f"{self.directory}: {wanted}; give a Hugging Face model directory")
        weight_map = read_json(self.directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ConfigError(f"{self.directory / INDEX}: no weight_map")
        found = {key: file for file in sorted(set(weight_map.values())) for key in self._file_keys(file)}
        lost = sorted(key for key in weight_map if key not in found)
        if lost:
            raise ConfigError(f"{self.directory}: the index names keys that no file holds: {listed(lost)}")
        return found

    def _file_keys(self, file: str) -> Iterable[str]:
        keys: Iterable[str] = self._file(file).keys()
        return keys

    def _file(self, file: str) -> Any:
        if self._open is None or self._open[0] != file:
            try:
                self._open = (file, safe_open(self.directory / file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{self.directory / file}: cannot be read ({error})") from error
        return self._open[1]

    def _slice(self, key: str) -> Any:
        return self._file(self._files[key]).get_slice(self._stored[key].key)

    def _shape(self, key: str) -> tuple[int, ...]:
        """The shape of the hub's tensor, which may be stacked with others in the file."""
        shape = tuple(self._slice(key).get_shape())
        count = self._stored[key].of
        if count == 1 or not shape or shape[0] % count:
            return shape
        return (shape[0] // count, *shape[1:])

    def _check(self, expected: Mapping[str, torch.Size]) -> None:
        missing = [key for key in expected if key not in self._files]
        extra = [key for key in self._files if key not in expected]
        misshapen = []
        for key in sorted(expected.keys() & self._files.keys(), key=self._files.__getitem__):
            shape = self._shape(key)
            if _without_leading_ones(shape) != _without_leading_ones(tuple(expected[key])):
                misshapen.append(f"{key} {list(shape)} instead of {list(expected[key])}")
        problems = [
            f"{len(keys)} {what}: {listed(keys)}"
            for what, keys in (("missing", missing), ("unexpected", extra), ("misshapen", misshapen))
            if keys
        ]
        if problems:
            found = "; ".join(problems)
            raise ConfigError(f"{self.directory}: the checkpoint does not fit the model; {found}")


def _without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Layouts of one family differ in them; what is read is given the native shape."""
    return _without_leading_ones(shape[1:]) if shape[:1] == (1,) else shape


def listed(keys: Sequence[str]) -> str:
    """The first few, in part of a line."""
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more


def parameter_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Whole shapes of a model's parameters, as `HubReader` wants them; meta and sharded ones too."""
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def load_from_hub(model: nn.Module, layout: HubLayout, directory: str | Path) -> None:
    """Copy a checkpoint into an unsharded, materialised model."""
    reader = HubReader(directory, layout, parameter_shapes(model))
    with torch.no_grad():
        for name in reader:
            model.get_parameter(name).copy_(reader.read(name))


def begin(directory: Path) -> Path:
    """The empty folder `<directory>.incomplete`; `ConfigError` if `directory` exists already."""
    if directory.exists():
        raise ConfigError(f"{directory} exists already; remove it or export to another directory")
    path = directory.with_name(directory.name + ".incomplete")
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A folder to write into that becomes `directory` if all goes well: see `begin`."""
    path = begin(directory)
    yield path
    path.rename(directory)


class HubWriter:
    """Writes a published checkpoint, one tensor at a time.

    All files go into `<directory>.incomplete`, which becomes `directory` at the end; use as a context
    manager. What is to lie beside the weights (a tokenizer, say) is put into `self.path` before that.

    Raises `ConfigError` if `directory` exists already, and `RunError` if the disk refuses.
    """

    def __init__(self, directory: str | Path, layout: Written, max_shard_bytes: int) -> None:
        self.directory = Path(directory)
        self.path = self.directory.with_name(self.directory.name + ".incomplete")
        self._layout = layout
        self._max_shard_bytes = max_shard_bytes
        self._shard: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._bytes = self._total_bytes = self._total_parameters = 0
        self._dtypes: set[torch.dtype] = set()

    def __enter__(self) -> Self:
        begin(self.directory)
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Add a whole native parameter; the dtype stays."""
        value = tensor.detach().reshape(self._layout.hub_shape(name, tensor.shape)).to("cpu", copy=True)
        size = value.numel() * value.element_size()
        if self._shard and self._bytes + size > self._max_shard_bytes:
            self._flush()
        self._shard[self._layout.to_hub(name)] = value.contiguous()
        self._bytes += size
        self._total_bytes += size
        self._total_parameters += value.numel()
        self._dtypes.add(value.dtype)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            return
        self._flush()
        try:
            self._finish()
        except OSError as failure:
            raise RunError(f"{self.path}: cannot be written ({failure})") from failure

    def _flush(self) -> None:
        try:
            save_file(self._shard, self.path / f"shard-{len(self._shards):05d}", metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise RunError(f"{self.path}: a shard cannot be written ({error})") from error
        self._shards.append(list(self._shard))
        self._shard, self._bytes = {}, 0

    def _finish(self) -> None:
        count = len(self._shards)
        weight_map = {}
        for number, keys in enumerate(self._shards):
            file = SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            (self.path / f"shard-{number:05d}").rename(self.path / file)
            weight_map.update(dict.fromkeys(keys, file))
        if count > 1:
            totals = {"total_parameters": self._total_parameters, "total_size": self._total_bytes}
            index = {"metadata": totals, "weight_map": dict(sorted(weight_map.items()))}
            (self.path / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        config = self._layout.hub_config()
        if len(self._dtypes) == 1:
            config["dtype"] = str(*self._dtypes).removeprefix("torch.")
        (self.path / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        self.path.rename(self.directory)


def save_to_hub(model: nn.Module, layout: HubLayout, directory: str | Path, max_shard_bytes: int) -> None:
    """Write an unsharded model as a published checkpoint.

    Raises `RunError` where the model would route differently afterwards: the layout has no place for a
    balance bias.
    """
    for name, buffer in model.named_buffers():
        if buffer.any():
            raise RunError(f"{name} is not zero, and a published checkpoint has no place for it")
    with HubWriter(directory, layout, max_shard_bytes) as writer:
        for name, parameter in model.named_parameters():
            writer.write(name, parameter)
