"""Taking rows against plain indexing."""

from __future__ import annotations

import pytest
import torch

from cantata.nn.rows import take_rows


@pytest.mark.parametrize("index", [[], [2], [4, 0, 3]])
def test_equals_indexing(index: list[int]) -> None:
    x, rows = torch.randn(5, 3), torch.tensor(index, dtype=torch.int64)
    fast, slow = x.clone().requires_grad_(), x.clone().requires_grad_()
    grad = torch.randn(len(index), 3)
    take_rows(fast, rows).backward(grad)
    slow[rows].backward(grad)
    assert torch.equal(take_rows(fast, rows), slow[rows])
    assert torch.equal(fast.grad, slow.grad)
