"""The chunked loss against `cross_entropy` of whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cantata.nn import linear_cross_entropy as module
from cantata.nn.linear_cross_entropy import linear_cross_entropy


def plain(x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    losses = F.cross_entropy((x @ weight.T).float(), labels, reduction="none")
    return losses.sum(), losses.detach()


@pytest.mark.parametrize("rows", [1, 13, 64])
@pytest.mark.parametrize("chunk", [1, 250, 10**6])
@pytest.mark.parametrize("strip", [1, 100, 10**6])
def test_equals_the_plain_twin(monkeypatch: pytest.MonkeyPatch, rows: int, chunk: int, strip: int) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(module, "_STRIP_ELEMENTS", strip)
    torch.manual_seed(0)
    x, weight, labels = torch.randn(rows, 8), torch.randn(50, 8), torch.randint(50, (rows,))
    results = []
    for function in (linear_cross_entropy, plain):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss_sum, loss_N = function(*leaves, labels)
        (loss_sum / 7).backward()
        results.append([loss_sum.detach(), loss_N, *(leaf.grad for leaf in leaves)])
    for fast, slow in zip(*results, strict=True):
        # 1e-6 of the largest value: a row's loss is the difference of numbers many times its size.
        assert float((fast - slow).abs().max()) <= 1e-6 * max(1.0, float(slow.abs().max()))


@pytest.mark.parametrize("chunk", [250, 10**6])
def test_weighted_rows_equal_the_plain_sum(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    x, weight, labels = torch.randn(30, 8), torch.randn(50, 8), torch.randint(50, (30,))
    row_weight_N = torch.rand(30) * 2
    results = []
    for fast in (True, False):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        if fast:
            loss_sum, loss_N = linear_cross_entropy(*leaves, labels, row_weight_N)
        else:
            _, loss_N = plain(*leaves, labels)
            losses_N = F.cross_entropy(leaves[0] @ leaves[1].t(), labels, reduction="none")
            loss_sum = (losses_N * row_weight_N).sum()
        loss_sum.backward()
        results.append([loss_sum.detach(), loss_N.detach(), *(leaf.grad for leaf in leaves)])
    for found, wanted in zip(*results, strict=True):
        assert float((found - wanted).abs().max()) <= 1e-6 * max(1.0, float(wanted.abs().max()))


def test_extreme_logits_stay_finite_and_right() -> None:
    x = torch.tensor([[400.0, 0.0], [0.0, 400.0], [-300.0, 300.0]])
    weight = torch.eye(2)
    labels = torch.tensor([1, 1, 0])
    loss_sum, loss_N = linear_cross_entropy(x, weight, labels)
    torch.testing.assert_close(loss_N, torch.tensor([400.0, 0.0, 600.0]))
    torch.testing.assert_close(loss_sum, torch.tensor(1000.0))


def test_no_targets_give_zero_loss_and_gradients() -> None:
    x, weight = torch.randn(0, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    loss_sum, loss_N = linear_cross_entropy(x, weight, torch.zeros(0, dtype=torch.int64))
    loss_sum.backward()
    assert loss_sum.item() == 0
    assert loss_N.shape == (0,)
    assert weight.grad is not None
    assert weight.grad.count_nonzero() == 0


def test_bf16_is_as_close_to_fp64_as_rounding_its_inputs_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 300)
    torch.manual_seed(0)
    x, weight = torch.randn(40, 16).bfloat16(), torch.randn(50, 16).bfloat16()
    labels = torch.randint(50, (40,))
    results = []
    for function, dtype in ((linear_cross_entropy, torch.bfloat16), (plain, torch.float64)):
        leaves = [value.detach().to(dtype).requires_grad_() for value in (x, weight)]
        loss_sum, _ = function(*leaves, labels)
        loss_sum.backward()
        results.append([loss_sum.detach(), *(leaf.grad for leaf in leaves)])
        assert all(leaf.grad.dtype == dtype for leaf in leaves)
    for found, exact in zip(*results, strict=True):
        assert float((found.double() - exact).abs().max() / exact.abs().max()) < 0.01


def test_logits_never_exist_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of the graph is as large as the logits, and the weight's gradient is exact all the same."""
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 64)
    shapes = []
    original = module._softmax_minus_one_hot_

    def spy(logits: Tensor, labels: Tensor) -> Tensor:
        shapes.append(tuple(logits.shape))
        return original(logits, labels)

    monkeypatch.setattr(module, "_softmax_minus_one_hot_", spy)
    x, weight = torch.randn(10, 4), torch.randn(32, 4)
    linear_cross_entropy(x, weight, torch.zeros(10, dtype=torch.int64))
    assert shapes == [(2, 32)] * 5


def test_without_gradients_none_are_made() -> None:
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    with torch.no_grad():
        loss_sum, _ = linear_cross_entropy(x, weight, torch.zeros(4, dtype=torch.int64))
    assert not loss_sum.requires_grad


def test_a_second_backward_is_refused() -> None:
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    loss_sum, _ = linear_cross_entropy(x, weight, torch.zeros(4, dtype=torch.int64))
    loss_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="ran twice"):
        loss_sum.backward()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunk", [250, 10**6])
def test_a_product_of_low_rank_is_added(monkeypatch: pytest.MonkeyPatch, chunk: int, frozen: bool) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    x, weight, labels = torch.randn(30, 8), torch.randn(50, 8), torch.randint(50, (30,))
    low, low_weight = torch.randn(30, 3), torch.randn(50, 3)
    row_weight_N = torch.rand(30) * 2
    results = []
    for fast in (True, False):
        leaves = [value.clone().requires_grad_() for value in (x, weight, low, low_weight)]
        leaves[1].requires_grad_(not frozen)
        if fast:
            loss_sum, loss_N = linear_cross_entropy(*leaves[:2], labels, row_weight_N, *leaves[2:])
        else:
            logits = leaves[0] @ leaves[1].t() + leaves[2] @ leaves[3].t()
            losses_N = F.cross_entropy(logits, labels, reduction="none")
            loss_sum, loss_N = (losses_N * row_weight_N).sum(), losses_N
        (loss_sum / 7).backward()
        assert (leaves[1].grad is None) == frozen
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        results.append([loss_sum.detach(), loss_N.detach(), *gradients])
    for found, wanted in zip(*results, strict=True):
        assert float((found - wanted).abs().max()) <= 1e-6 * max(1.0, float(wanted.abs().max()))
