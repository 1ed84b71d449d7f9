"""The tensors of a complete checkpoint, whatever layout and engine wrote them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

from cantata.core.errors import RunError
from cantata.train.restricted_pickle import RestrictedReader

_SHOWN = 4


class StoredTensors:
    """Reads whole tensors one at a time, in one process and without a process group.

    Raises `RunError` where the checkpoint's index is damaged or refused.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = _OnceIndexed(path)
        entries = self._reader.read_metadata().state_dict_metadata
        self._entries = {n: e for n, e in entries.items() if isinstance(e, TensorStorageMetadata)}

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The whole shape of every tensor."""
        return {name: entry.size for name, entry in self._entries.items()}

    def read(self, name: str) -> Tensor:
        """A whole tensor in the dtype that it was saved in.

        Needs its memory, and for a moment that of its largest stored piece beside it. Raises `RunError`
        where a file of the checkpoint is damaged or gone.
        """
        entry = self._entries[name]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                load_tensors({name: tensor}, storage_reader=self._reader, no_dist=True)
        except CheckpointException as error:
            raise RunError(f"{self.path} cannot be read: {reason(error)}") from error
        return tensor


class _OnceIndexed(RestrictedReader):
    """Keeps its index, which for a large model on many ranks takes seconds to read."""

    _index: Metadata | None = None

    def read_metadata(self) -> Metadata:
        if self._index is None:
            self._index = super().read_metadata()
        return self._index


def differences(stored: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size]) -> str:
    """What keeps a checkpoint from fitting a model, in part of a line; empty where names and shapes agree."""
    problems = [f"it lacks {name}" for name in sorted(wanted.keys() - stored.keys())]
    problems += [f"it also holds {name}" for name in sorted(stored.keys() - wanted.keys())]
    problems += [
        f"{name} is {tuple(stored[name])} there and {tuple(shape)} here"
        for name, shape in sorted(wanted.items())
        if name in stored and stored[name] != shape
    ]
    more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + more


def reason(error: CheckpointException) -> str:
    """The first rank's cause in one line."""
    rank, (cause, _) = next(iter(error.failures.items()))
    told = cause.strerror if isinstance(cause, OSError) and not cause.filename else None
    text = (told or str(cause)).strip().splitlines()
    return f"{text[0] if text else type(cause).__name__} (rank {rank})"
