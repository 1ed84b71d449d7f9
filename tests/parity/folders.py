"""Published folders, ours beside the one that transformers saves."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    """The same keys, and the same bits under each; ours may be in several files."""
    wanted = load_file(theirs / "model.safetensors")
    found: dict[str, Tensor] = {}
    for shard in ours.glob("*.safetensors"):
        found |= load_file(shard)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in found)
