"""What an adapted model starts from, and that it goes on from the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cantata.core.errors import ConfigError
from cantata.models.lora import LoRAConfig
from cantata.nn.lora import Packing, is_factor
from cantata.parallel.materialize import Index, RandomInit, Source

_PARTS, _PART_BYTES = 16, 2**10


class AdapterValues:
    """A model's own values from `base`; those of its adapters from `saved`, or as training begins them.

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
        return self._new.read(name, index)


class BaseIdentity:
    """Travels in an adapter's checkpoints: what they adapt, in how many bits, and how their factors count.

    None of it shows in the factors themselves, which are worth nothing without.

    Args:
        weights: the Hugging Face directory of the base, or None for random values.
        seed: which those follow from.
        lora: what the factors are scaled by, and what the weights rest in while they learn.
    """

    def __init__(self, weights: str | None, seed: int, lora: LoRAConfig) -> None:
        self._weights = f"random values of seed={seed}" if weights is None else f"model.weights={weights}"
        self._digest = f"seed {seed}" if weights is None else digest(Path(weights))
        self._settings = {
            "alpha": lora.alpha,
            "rslora": lora.rslora,
            "quantize_base": lora.quantize_base.value,
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"weights": self._weights, "digest": self._digest, "scaling": self._settings}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises `ConfigError` where a checkpoint adapts other weights, or adapts them otherwise."""
        if state["digest"] != self._digest:
            raise ConfigError(
                f"the checkpoint adapts other weights ({state['weights']}) than these ({self._weights}); "
                "give those that it began with, or start anew with another out="
            )
        # Checkpoints from before there was a choice have no word of it.
        then = {"quantize_base": Packing.none.value, **state["scaling"]}
        for key, value in self._settings.items():
            was = then[key]
            if was != value:
                raise ConfigError(
                    f"the checkpoint was trained with lora.{key}={was}, the config has {value}, which would "
                    "change what it learned; restore it, or start anew with another out="
                )


def digest(directory: Path) -> str:
    """Every file's header and a part of each of its tensors: quick even for 50 GB.

    Of a stack of experts the parts lie in several of them, so that one expert more or less is seen.
    """
    found = hashlib.blake2b(digest_size=16)
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb") as stream:
            length = stream.read(8)
            header = stream.read(int.from_bytes(length, "little"))
            found.update(file.name.encode() + length + header)
            tensors = json.loads(header)
            begin = 8 + len(header)
            for name in sorted(tensors.keys() - {"__metadata__"}):
                start, end = tensors[name]["data_offsets"]
                for part in range(_PARTS):
                    stream.seek(begin + start + (end - start) * part // _PARTS)
                    found.update(stream.read(min(_PART_BYTES, (end - start) // _PARTS + 1)))
    return found.hexdigest()
