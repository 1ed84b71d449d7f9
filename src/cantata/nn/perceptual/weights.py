"""Reading the weights of frozen networks from files that a user names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cantata.core.errors import ConfigError


class Weights:
    """The tensors of one or more files by name; the last one that holds a name decides.

    Raises `ConfigError` for a file that is not there or holds no state dict.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files = " and ".join(map(str, dict.fromkeys(paths)))
        self.left: dict[str, Tensor] = {}
        """What nobody has taken yet."""
        self._missing: list[str] = []
        for path in paths:
            self.left |= _read(path)

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of this name and shape, fp32; zeros where there is none, which `check` reports."""
        tensor = self.left.pop(name, None)
        if tensor is not None and tuple(tensor.shape) == shape:
            return tensor.detach().float()
        found = "" if tensor is None else f" (it has {list(tensor.shape)})"
        self._missing.append(f"{name} {list(shape)}{found}")
        return torch.zeros(shape)

    def check(self) -> None:
        """Raise `ConfigError` with the names and shapes that `take` did not find."""
        if self._missing:
            raise ConfigError(
                f"perceptual: {self._files} lack {len(self._missing)} tensors: {'; '.join(self._missing)}"
            )


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ConfigError(f"perceptual: {path} is no file")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"perceptual: {path} cannot be read: {reason}") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ConfigError(f"perceptual: {path} is no state dict, names with a tensor each")
    return dict(content)
