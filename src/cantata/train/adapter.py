"""What an adapted model starts from, and that it goes on from the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cantata.core.errors import ConfigError
from cantata.nn.lora import MAGNITUDE, is_factor
from cantata.parallel.materialize import Index, RandomInit, Source

_SAMPLED = 2**16


class AdapterValues:
    """A model's own values from `base`; those of its adapters from `saved`, or as training begins them.

    A magnitude (DoRA) begins as the norm of each row of its base weight, which leaves the model as it was.

    Args:
        model: adapted; meta and sharded ones too.
        base: holds the model's own parameters.
        saved: holds a saved adapter's, by the names of `model`; None: all are new.
        seed: decides the new ones.
    """

    def __init__(self, model: nn.Module, base: Source, saved: Source | None, seed: int) -> None:
        self._base = base
        self._new = RandomInit(model, seed)
        self._saved = saved
        self._kept = frozenset(saved or ())
        self._factors = [name for name, _ in model.named_parameters() if is_factor(name)]

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in self._base if not is_factor(name))
        yield from self._factors

    def read(self, name: str, index: Index) -> Tensor:
        """See `Source`."""
        if self._saved is not None and name in self._kept:
            return self._saved.read(name, index)
        if not is_factor(name):
            return self._base.read(name, index)
        if name.endswith(MAGNITUDE):
            weight = self._base.read(name.removesuffix(MAGNITUDE) + "weight", (*index, slice(None)))
            norms: Tensor = torch.linalg.vector_norm(weight.float(), dim=1)
            return norms
        return self._new.read(name, index)


class BaseIdentity:
    """Travels in an adapter's checkpoints, which are worth nothing without the weights that they adapt.

    Args:
        weights: the Hugging Face directory of the base, or None for random values.
        seed: which those follow from.
    """

    def __init__(self, weights: str | None, seed: int) -> None:
        self._weights = weights
        self._digest = f"seed {seed}" if weights is None else digest(Path(weights))

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"weights": self._weights, "digest": self._digest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises `ConfigError` where a checkpoint adapts other weights."""
        if state["digest"] != self._digest:
            was, now = (f"model.weights={weights}" for weights in (state["weights"], self._weights))
            raise ConfigError(
                f"the checkpoint adapts other weights ({was}) than these ({now}); give those that it began "
                "with, or start anew with another out="
            )


def digest(directory: Path) -> str:
    """Names, sizes and samples (beginning, middle and end) of a directory's weights: quick even for 50 GB."""
    found = hashlib.blake2b(digest_size=16)
    for file in sorted(directory.glob("*.safetensors")):
        size = file.stat().st_size
        found.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for start in (0, size // 2, size - _SAMPLED):
                stream.seek(max(0, start))
                found.update(stream.read(_SAMPLED))
    return found.hexdigest()
