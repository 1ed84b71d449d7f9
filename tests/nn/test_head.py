"""The end of a language model against its parts, one after another."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cantata.core.types import IGNORE_INDEX
from cantata.nn.head import LanguageHead


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("with_logits", [False, True])
def test_equals_norm_linear_and_cross_entropy(tied: bool, with_logits: bool) -> None:
    torch.manual_seed(0)
    head = LanguageHead(8, 20, 1e-6, tied=tied)
    embedding = torch.randn(20, 8, requires_grad=True)
    if head.weight is not None:
        torch.nn.init.normal_(head.weight)
    weight = embedding if tied else head.weight
    assert weight is not None
    labels = torch.tensor([3, IGNORE_INDEX, 7, 19, IGNORE_INDEX])
    x = torch.randn(5, 8, requires_grad=True)
    out = head(x, labels, torch.tensor([0, 2, 3]), None, embedding if tied else None, with_logits)
    logits = F.linear(head.norm(x), weight)
    torch.testing.assert_close(
        out.loss_sum, F.cross_entropy(logits, labels, reduction="sum"), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(out.loss_N, F.cross_entropy(logits, labels, reduction="none")[[0, 2, 3]])
    assert (out.logits_TV is not None) == with_logits
    if with_logits:
        torch.testing.assert_close(out.logits_TV, logits)
    fast = torch.autograd.grad(out.loss_sum, [x, weight, head.norm.weight])
    slow = torch.autograd.grad(
        F.cross_entropy(logits, labels, reduction="sum"), [x, weight, head.norm.weight]
    )
    for found, expected in zip(fast, slow, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
