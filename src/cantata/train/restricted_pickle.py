"""Read the index of a distributed checkpoint without running code that hides in it.

DCP writes its index, `.metadata`, as a pickle, and a pickle may call anything. This reader knows the
few data classes that an index is made of and refuses the rest, as well as entries that DCP itself
would unpickle later.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from cantata.core.errors import RunError

_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
}


# What a damaged pickle raises depends on the byte that is wrong.
_DAMAGE = (EOFError, TypeError, ValueError, AttributeError, LookupError, ImportError)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


def read_metadata(checkpoint: Path) -> Metadata:
    """The index of a checkpoint directory.

    Raises:
        RunError: it is unreadable, asks for foreign classes, or names files outside the directory.
    """
    path = checkpoint / ".metadata"
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("it holds no checkpoint index")
        _check(metadata)
    except (OSError, pickle.UnpicklingError, *_DAMAGE) as error:
        raise RunError(f"{path} is refused: {error}") from error
    return metadata


def _check(metadata: Metadata) -> None:
    for name, entry in metadata.state_dict_metadata.items():
        # DCP unpickles the bytes of every entry that is not a tensor.
        if not isinstance(entry, TensorStorageMetadata):
            raise pickle.UnpicklingError(f"{name} is not a tensor")
    for info in metadata.storage_data.values():
        if not isinstance(info, _StorageInfo) or Path(info.relative_path).name != info.relative_path:
            raise pickle.UnpicklingError("it names a file outside the checkpoint")


def tensor_shapes(checkpoint: Path) -> dict[str, torch.Size]:
    """The whole shape of every tensor in a checkpoint; raises as `read_metadata`."""
    entries = read_metadata(checkpoint).state_dict_metadata
    return {name: entry.size for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


class RestrictedReader(FileSystemReader):
    """DCP's reader (which reads tensors with `weights_only`) with the index read as above."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint)
        self._checkpoint = checkpoint

    def read_metadata(self) -> Metadata:
        """See `read_metadata`."""
        return read_metadata(self._checkpoint)
