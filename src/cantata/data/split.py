"""Which samples of a dataset are held out: a function of their index alone."""

from __future__ import annotations

from enum import Enum

import numpy as np
from numpy.typing import NDArray

from cantata.core.errors import ConfigError
from cantata.data.order import mix

SALT = 0x5EED_0F_CA47A7A


class Split(Enum):
    """Which part of a dataset to read."""

    train = "train"
    held_out = "held_out"
    all = "all"


def split_indices(size: int, split: Split, held_out_share: float) -> NDArray[np.int64]:
    """Indices of the split, in order.

    Index i is held out where a fixed hash of i falls into the share, so a dataset that grows keeps its
    held-out samples. Raises `ConfigError` for a share outside [0, 1).
    """
    if not 0 <= held_out_share < 1:
        raise ConfigError(f"held_out_share={held_out_share} must be at least 0 and below 1")
    indices = np.arange(size, dtype=np.int64)
    if split is Split.all:
        return indices
    held_out = mix(indices.astype(np.uint64) + np.uint64(SALT)) < np.uint64(int(held_out_share * 2.0**64))
    chosen: NDArray[np.int64] = indices[held_out == (split is Split.held_out)]
    return chosen
