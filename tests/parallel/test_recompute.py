"""Recomputing changes memory and nothing else."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cantata.parallel.materialize import RandomInit, materialize
from cantata.parallel.recompute import Recompute, apply_recompute
from tests.distributed.standin import HIDDEN, StandIn, build_on_meta


class CountOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def model_with(mode: Recompute) -> StandIn:
    model = build_on_meta()
    materialize(model, RandomInit(model, 3), torch.device("cpu"))
    for block in model.blocks:
        apply_recompute(block, mode)
    return model


def run(model: StandIn) -> tuple[list[Tensor], int, Counter[str], Counter[str]]:
    """Gradients, bytes kept for backward, and the operators that forward and backward ran."""
    x_TD = torch.randn(16, HIDDEN, generator=torch.Generator().manual_seed(0)).requires_grad_()
    kept: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    forward, backward = CountOperators(), CountOperators()
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor), forward:
        y_TD, total = x_TD, torch.zeros(())
        for block in model.blocks:
            y_TD, stats = block(y_TD)
            total = total + stats.z_sum / len(y_TD) * 1e-2
    with backward:
        (y_TD.square().sum() + total).backward()
    assert x_TD.grad is not None
    gradients = [x_TD.grad, *(p.grad for block in model.blocks for p in block.parameters())]
    return gradients, sum(kept.values()), forward.counts, backward.counts


@pytest.fixture(scope="module")
def plain() -> Any:
    return run(model_with(Recompute.none))


@pytest.mark.parametrize("mode", [Recompute.selective, Recompute.full])
def test_gradients_are_equal_to_the_bit(mode: Recompute, plain: Any) -> None:
    gradients = run(model_with(mode))[0]
    assert len(gradients) == len(plain[0])
    assert all(torch.equal(a, b) for a, b in zip(gradients, plain[0], strict=True))


def test_names_stay_as_they_are() -> None:
    names = [name for name, _ in model_with(Recompute.none).named_parameters()]
    for mode in (Recompute.selective, Recompute.full):
        model = model_with(mode)
        assert [name for name, _ in model.named_parameters()] == names
        assert not [key for key in model.state_dict() if "checkpoint" in key]


@pytest.mark.parametrize("mode", [Recompute.selective, Recompute.full])
def test_backward_never_routes_again(mode: Recompute, plain: Any) -> None:
    _, _, forward, backward = run(model_with(mode))
    assert forward["aten::topk"] == 2
    assert backward["aten::topk"] == 0
    assert backward["aten::sin"] == 2, "the cheap part must have been computed again"


def test_selective_repeats_no_product_and_full_repeats_them(plain: Any) -> None:
    products = ("aten::mm", "aten::addmm", "aten::bmm")
    of = {mode: run(model_with(mode))[3] for mode in (Recompute.selective, Recompute.full)}
    alone = sum(plain[3][name] for name in products)
    assert sum(of[Recompute.selective][name] for name in products) == alone
    assert sum(of[Recompute.full][name] for name in products) > alone


def test_kept_bytes_shrink(plain: Any) -> None:
    kept = {mode: run(model_with(mode))[1] for mode in (Recompute.selective, Recompute.full)}
    assert kept[Recompute.full] < plain[1] / 2
    assert kept[Recompute.selective] < plain[1]
