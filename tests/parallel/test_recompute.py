"""Recomputing changes memory and nothing else."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cantata.core.types import TEXT
from cantata.nn.lora import LoRASettings
from cantata.nn.matmul import Linear
from cantata.nn.mlp import SwiGLU
from cantata.nn.moe import experts as experts_module
from cantata.nn.moe.experts import Experts
from cantata.nn.moe.layer import MoELayer
from cantata.parallel import recompute as recompute_module
from cantata.parallel.materialize import RandomInit, materialize
from cantata.parallel.recompute import Recompute, apply_recompute
from tests.distributed.standin import HIDDEN, StandIn, build_on_meta
from tests.nn.lora.factors import adapted
from tests.nn.moe.small import one_sample, small_router


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


class AdaptedBlock(nn.Module):
    """A linear layer and an MoE layer with adapters that drop inputs, as a frozen base has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        settings = LoRASettings(r=4, alpha=8.0, dropout=0.3, rslora=False, dora=False)
        base = Linear(8, 8), Experts(6, 8, 4), small_router(8, 6, 2)
        for part in base:
            for parameter in part.parameters():
                nn.init.normal_(parameter)
                parameter.requires_grad_(False)
        linear, experts, router = base
        self.linear = adapted(linear, settings)
        made = adapted(experts, {"fc1": settings, "fc2": settings})
        assert isinstance(made, Experts)
        self.moe = MoELayer(router, made, SwiGLU(8, 4))

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.linear(x_TD)
        return self.moe(y_TD, one_sample(torch.full((len(x_TD),), TEXT)))[0]


def adapted_gradients(mode: Recompute) -> tuple[dict[str, Tensor], Counter[str]]:
    """Gradients of the factors, and the operators that backward ran."""
    block = AdaptedBlock()
    apply_recompute(block, mode)
    torch.manual_seed(2)
    x_TD = torch.randn(9, 8).requires_grad_()
    y_TD = block(x_TD)
    # Whatever is drawn between the two runs must not change what the second one drops.
    torch.rand(3)
    with CountOperators() as backward:
        y_TD.square().sum().backward()
    assert x_TD.grad is not None
    gradients = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    return gradients | {"x": x_TD.grad}, backward.counts


@pytest.mark.parametrize("path", ["looped", "grouped"])
@pytest.mark.parametrize("mode", [Recompute.selective, Recompute.full])
def test_adapters_drop_the_same_inputs_again(
    monkeypatch: pytest.MonkeyPatch, mode: Recompute, path: str
) -> None:
    if path == "grouped":
        monkeypatch.setattr(experts_module, "can_group", lambda *tensors: True)
    expected, once = adapted_gradients(Recompute.none)
    found, again = adapted_gradients(mode)
    assert sum("lora" in name for name in expected) == 6
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    large = ("cantata::experts", "aten::_grouped_mm", "aten::mm", "aten::addmm")
    if mode is Recompute.selective:
        assert all(again[name] == once[name] for name in large)
    else:
        assert sum(again[name] for name in large) > sum(once[name] for name in large)


def test_what_draws_after_a_kept_operator_that_drew_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention with dropout draws on accelerators; here any random operator is kept."""
    monkeypatch.setattr(recompute_module, "_COSTLY", frozenset({"aten::rand_like"}))

    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x * torch.rand_like(x)
            return torch.nn.functional.dropout(x.exp(), 0.5)

    gradients = []
    for mode in (Recompute.none, Recompute.selective):
        block = Noisy()
        apply_recompute(block, mode)
        torch.manual_seed(0)
        x = torch.linspace(0, 1, 50).requires_grad_()
        block(x).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
