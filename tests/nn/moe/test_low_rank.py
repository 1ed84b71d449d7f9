"""How pairs are laid out for operators."""

from __future__ import annotations

import torch

from cantata.nn.moe.low_rank import LowRank, factors, kept_only, pairs


def test_pairs_are_read_from_one_list() -> None:
    a, b, kept = torch.randn(2, 3, 1), torch.randn(2, 1, 4), torch.ones(5, 3, dtype=torch.bool)
    assert pairs(()) == (None, None)
    assert pairs([a, b, kept, None, None, None]) == (LowRank(a, b, kept), None)
    assert pairs([None, None, None, a, b, None]) == (None, LowRank(a, b, None))
    assert factors([1, 2, 3, 4, 5, 6]) == [1, 2, 4, 5]
    assert factors([]) == []


def test_what_is_not_kept_is_zero_in_every_precision() -> None:
    kept = torch.tensor([[True, False, True]])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.tensor([[1.5, 2.5, -3.5]], dtype=dtype)
        assert torch.equal(kept_only(x, kept), torch.tensor([[1.5, 0.0, -3.5]], dtype=dtype))
        assert kept_only(x, None) is x
