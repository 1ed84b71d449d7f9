"""Many pixels travel in shared memory, few by value; both hold the same."""

from __future__ import annotations

import numpy as np
import torch

from cantata.data.collate.handed import by_handle


def pixels(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint32).astype(np.uint8).reshape(-1, 4)


def test_few_stay_an_array() -> None:
    given = pixels(2**20)
    assert by_handle(given) is given


def test_many_become_a_tensor_of_the_same_memory() -> None:
    given = pixels(2**20 + 4)
    found = by_handle(given)
    assert isinstance(found, torch.Tensor)
    assert found.dtype == torch.uint8
    assert np.array_equal(found.numpy(), given)
    given[0, 0] = 77
    assert found[0, 0] == 77
