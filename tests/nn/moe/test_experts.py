"""Experts on one path and the other against loops over tokens and choices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cantata.nn.moe import experts as module
from cantata.nn.moe.dispatch import Dispatched, Order
from cantata.nn.moe.experts import Experts, can_group
from cantata.nn.moe.router import count

EXPERTS = 5
ROUTINGS = {
    "even": [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]],
    "uneven": [[0, 1], [0, 2], [0, 3], [3, 0]],
    "idle first and last": [[2, 1], [3, 2], [1, 3]],
    "one choice": [[4], [0], [4], [2]],
    "no token": [],
}


def plain(x_ND: Tensor, weights_NK: Tensor, fc1: Tensor, fc2: Tensor, index_NK: Tensor) -> Tensor:
    rows = []
    for token, weights_K, index_K in zip(x_ND, weights_NK, index_NK, strict=True):
        row = torch.zeros_like(token)
        for weight, expert in zip(weights_K, index_K.tolist(), strict=True):
            gate, up = (token @ fc1[expert]).chunk(2)
            row = row + weight * ((F.silu(gate) * up) @ fc2[expert])
        rows.append(row)
    none = 0 * (x_ND.sum() + weights_NK.sum() + fc1.sum() + fc2.sum())
    return (torch.stack(rows) if rows else x_ND) + none


def ours(x_ND: Tensor, weights_NK: Tensor | None, fc1: Tensor, fc2: Tensor, index_NK: Tensor) -> Tensor:
    given = (x_ND, weights_NK, fc1, fc2, count(index_NK, len(fc1)), *Order.of(index_NK))
    out: Tensor = module._Experts.apply(*given)
    return out


def gradients(run: Callable[..., Tensor], leaves: list[Tensor], index: Tensor, grad: Tensor) -> list[Tensor]:
    """The result and the gradient of every leaf."""
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    out = run(*leaves, index)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def problem(routing: str, hidden: int = 8, width: int = 4) -> tuple[list[Tensor], Tensor, Tensor]:
    """The leaves (tokens, weights, fc1, fc2), the chosen experts and the gradient of the result."""
    torch.manual_seed(0)
    index_NK = torch.tensor(ROUTINGS[routing], dtype=torch.int64)
    index_NK = index_NK if len(index_NK) else index_NK.new_empty(0, 2)
    tokens = [torch.randn(len(index_NK), hidden), torch.rand(index_NK.shape)]
    experts = [torch.randn(EXPERTS, hidden, 2 * width), torch.randn(EXPERTS, width, hidden)]
    return tokens + experts, index_NK, torch.randn(len(index_NK), hidden)


@pytest.fixture(params=["looped", "grouped"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grouped kernel exists on CPU too, where it is only slower."""
    if request.param == "grouped":
        monkeypatch.setattr(module, "can_group", lambda x_ND, *weights: len(x_ND) > 0)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("routing", ROUTINGS)
def test_equals_the_loop(routing: str) -> None:
    leaves, index, grad = problem(routing)
    found = gradients(ours, leaves, index, grad)
    expected = gradients(plain, leaves, index, grad)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("routing", ["uneven", "one choice"])
def test_rows_that_are_not_weighted_count_one(routing: str) -> None:
    (x, weights, *experts), index, grad = problem(routing)
    found = gradients(lambda x, fc1, fc2, i: ours(x, None, fc1, fc2, i), [x, *experts], index, grad)
    expected = gradients(ours, [x, torch.ones_like(weights), *experts], index, grad)
    del expected[2]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("frozen", [(0,), (2, 3), (0, 1, 3)])
def test_frozen_parts_get_no_gradient_and_change_no_other(frozen: tuple[int, ...]) -> None:
    leaves, index, grad = problem("uneven")
    expected = gradients(ours, leaves, index, grad)[1:]
    some = [leaf.clone().requires_grad_(i not in frozen) for i, leaf in enumerate(leaves)]
    ours(*some, index).backward(grad)
    for i, leaf in enumerate(some):
        assert (leaf.grad is None) if i in frozen else torch.equal(leaf.grad, expected[i])


@pytest.mark.usefixtures("path")
def test_neither_rows_nor_results_are_kept() -> None:
    leaves, index, _ = problem("even")
    kept: list[tuple[int, ...]] = []

    def remember(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        ours(*(leaf.requires_grad_() for leaf in leaves), index)
    assert sorted(kept) == sorted([*(tuple(leaf.shape) for leaf in leaves), (index.numel(), 8)])


def test_the_grouped_kernel_is_taken_on_devices_where_it_can_be() -> None:
    def on_device(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    assert can_group(on_device(12, 8), on_device(3, 8, 16))
    assert not can_group(torch.empty(12, 8), torch.empty(3, 8, 16))
    assert not can_group(on_device(0, 8), on_device(3, 8, 16))
    assert not can_group(on_device(12, 8, dtype=torch.float64), on_device(3, 8, 16, dtype=torch.float64))
    assert not can_group(on_device(12, 6), on_device(3, 6, 16))
    assert not can_group(on_device(12, 4, dtype=torch.bfloat16), on_device(3, 4, 16, dtype=torch.bfloat16))


def test_the_module_computes_with_its_own_part_of_the_weights() -> None:
    (x, weights, fc1, fc2), index, _ = problem("uneven")
    experts = Experts(EXPERTS + 3, 8, 4)
    with torch.no_grad():
        experts.fc1[3:], experts.fc2[3:] = fc1, fc2
    experts.local = lambda weight: weight[3:]
    out = experts(Dispatched(x, weights, count(index, EXPERTS), Order.of(index), None))
    torch.testing.assert_close(out, plain(x, weights, fc1, fc2, index), rtol=1e-6, atol=1e-5)
    out.sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad is not None
        assert not parameter.grad[:3].any()
        assert parameter.grad[3:].any()


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("grouped", [True, False], ids=["few rows", "many rows"])
def test_without_gradients_few_rows_take_the_grouped_kernel_on_cpu(
    routing: str, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = module.grouped_experts
    monkeypatch.setattr(module, "grouped_experts", lambda *args: (calls.append(args), original(*args))[1])
    if not grouped:
        monkeypatch.setattr(module, "_CACHED_ELEMENTS", 0)
    (x, weights, fc1, fc2), index, _ = problem(routing)
    given = Dispatched(x, weights, count(index, EXPERTS), Order.of(index), None)
    with torch.no_grad():
        found = module.run_experts(given, fc1, fc2)
    assert bool(calls) == (grouped and index.numel() > 0)
    torch.testing.assert_close(found, plain(x, weights, fc1, fc2, index), rtol=1e-6, atol=1e-5)
    calls.clear()
    module.run_experts(given, fc1.requires_grad_(), fc2)
    assert not calls, "training is as it was"
