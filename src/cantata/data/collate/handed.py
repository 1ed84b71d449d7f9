"""How a worker hands pixels to the trainer."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BY_VALUE_BYTES = 2**20


def by_handle(pixels: NDArray[np.uint8]) -> NDArray[np.uint8] | Tensor:
    """As a tensor where they are many, as they are where they are few.

    A tensor travels in shared memory, at the price of a handshake that holds up the trainer; arrays travel by
    value.
    """
    return torch.from_numpy(pixels) if pixels.nbytes > _BY_VALUE_BYTES else pixels
