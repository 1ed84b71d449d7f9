"""Grouped products against the loop."""

from __future__ import annotations

import pytest
import torch

from cantata.nn import matmul
from cantata.nn.moe.experts import Experts, can_group, grouped_product, looped_product

COUNTS = {"even": [4, 4, 4], "uneven": [1, 9, 2], "idle": [0, 12, 0], "idle-last": [5, 7, 0]}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_grouped_equals_the_loop(counts: list[int]) -> None:
    torch.manual_seed(0)
    x, weight, grad = torch.randn(12, 8), torch.randn(3, 8, 16), torch.randn(12, 16)
    results = []
    for product in (grouped_product, looped_product):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = product(*leaves, torch.tensor(counts))
        out.backward(grad)
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("fast_half", [True, False])
def test_bf16_equals_the_fp32_loop_rounded_once(monkeypatch: pytest.MonkeyPatch, fast_half: bool) -> None:
    monkeypatch.setattr(matmul, "_fast_half_products", lambda: fast_half)
    torch.manual_seed(0)
    x, weight, grad = (t.bfloat16() for t in (torch.randn(12, 8), torch.randn(3, 8, 16), torch.randn(12, 16)))
    counts = torch.tensor(COUNTS["uneven"])
    fast = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    slow = [x.float().requires_grad_(), weight.float().requires_grad_()]
    out, expected = grouped_product(*fast, counts), looped_product(*slow, counts)
    out.backward(grad)
    expected.backward(grad.float())
    for found, exact in ((out, expected), *((a.grad, b.grad) for a, b in zip(fast, slow, strict=True))):
        assert found is not None
        assert exact is not None
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), exact, rtol=2**-7, atol=1e-5)


def test_what_the_grouped_kernel_cannot_take_goes_through_the_loop() -> None:
    weight = torch.randn(3, 8, 16)
    assert can_group(torch.randn(12, 8), weight)
    assert not can_group(torch.randn(0, 8), weight)
    assert not can_group(torch.randn(12, 8).double(), weight.double())
    assert not can_group(torch.randn(12, 6), torch.randn(3, 6, 16))
    assert not can_group(torch.randn(12, 4).bfloat16(), torch.randn(3, 4, 16).bfloat16())


@pytest.mark.parametrize(("hidden", "width", "rows"), [(8, 4, 12), (6, 5, 12), (8, 4, 0)])
def test_experts_are_swiglu_blocks(hidden: int, width: int, rows: int) -> None:
    torch.manual_seed(0)
    experts = Experts(3, hidden, width)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    counts = torch.tensor([rows // 4, rows - rows // 4, 0])
    x = torch.randn(rows, hidden)
    out = experts(x, counts)
    start = 0
    for expert, length in enumerate(counts.tolist()):
        part = x[start : start + length]
        gate, up = (part @ experts.fc1[expert]).chunk(2, -1)
        expected = (torch.nn.functional.silu(gate) * up) @ experts.fc2[expert]
        torch.testing.assert_close(out[start : start + length], expected, rtol=1e-5, atol=1e-5)
        start += length
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in experts.parameters())
