"""Experts with adapters on one path and the other against experts whose updates are made whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, library

from cantata.nn import matmul
from cantata.nn.lora import LoRAExperts, LoRASettings, adapt
from cantata.nn.lora import settings as settings_module
from cantata.nn.lora.experts import aligned
from cantata.nn.moe.dispatch import Dispatched, Order
from cantata.nn.moe.experts import Experts
from cantata.nn.moe.looped import looped_experts, looped_experts_backward
from cantata.nn.moe.router import count
from tests.nn.lora.factors import PLAIN, adapted, assert_equal_to_a_millionth
from tests.nn.moe.test_experts import EXPERTS, ROUTINGS, path, problem

HIDDEN, WIDTH = 8, 4
WIDER = replace(PLAIN, r=4, alpha=2.0)
BOTH = {"fc1": replace(WIDER, r=8), "fc2": WIDER}
SOME = {"fc1": {"fc1": WIDER}, "fc2": {"fc2": WIDER}, "both": BOTH}
__all__ = ["path"]


def build(settings: Mapping[str, LoRASettings], hidden: int = HIDDEN, width: int = WIDTH) -> LoRAExperts:
    torch.manual_seed(0)
    base = Experts(EXPERTS, hidden, width)
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter)
    made = adapted(base, settings)
    assert isinstance(made, LoRAExperts)
    return made


def dispatched(x_ND: Tensor, weights_NK: Tensor | None, index_NK: Tensor) -> Dispatched:
    return Dispatched(x_ND, weights_NK, count(index_NK, EXPERTS), Order.of(index_NK), None)


def kept_rows(kept: Tensor | None, x: Tensor, dropout: float) -> Tensor:
    return x if kept is None else x * kept / (1 - dropout)


def dense(
    module: LoRAExperts, x_ND: Tensor, weights_NK: Tensor, index_NK: Tensor, kept: Mapping[str, Tensor]
) -> Tensor:
    """A loop over experts, with the updates made whole."""
    order = Order.of(index_NK)
    ends = [0, *count(index_NK, EXPERTS).cumsum(0).tolist()]
    delta, share = {}, {}
    for name in ("fc1", "fc2"):
        weight = getattr(module, name)
        given = module.settings.get(name)
        share[name] = 0.0 if given is None else given.dropout
        delta[name] = torch.zeros_like(weight)
        if given is not None:
            factors = getattr(module, f"{name}_lora_A"), getattr(module, f"{name}_lora_B")
            delta[name] = torch.einsum("eir,ero->eio", *factors) * given.alpha / given.r
    y_ND = torch.zeros_like(x_ND)
    for expert, (start, end) in enumerate(pairwise(ends)):
        token_r = order.token_R[start:end]
        x_rD = x_ND[token_r]
        low_rD = kept_rows(kept["fc1"][token_r], x_rD, share["fc1"]) if "fc1" in kept else x_rD
        gate_rF, up_rF = (x_rD @ module.fc1[expert] + low_rD @ delta["fc1"][expert]).chunk(2, -1)
        weights_r = weights_NK.flatten()[order.choice_R[start:end]]
        hidden_rF = torch.nn.functional.silu(gate_rF) * up_rF * weights_r[:, None]
        low_rF = kept_rows(kept["fc2"][start:end], hidden_rF, share["fc2"]) if "fc2" in kept else hidden_rF
        y_ND = y_ND.index_add(0, token_r, hidden_rF @ module.fc2[expert] + low_rF @ delta["fc2"][expert])
    return y_ND + 0 * sum(p.sum() for p in (x_ND, weights_NK, *module.parameters()))


def results(module: LoRAExperts, y_ND: Tensor, inputs: list[Tensor], grad_ND: Tensor) -> list[Tensor]:
    given = [*inputs, *module.parameters()]
    return [y_ND.detach(), *torch.autograd.grad(y_ND, given, grad_ND)]


def inputs_of(routing: str, hidden: int = HIDDEN) -> tuple[list[Tensor], Tensor, Tensor]:
    (x, weights, *_), index, grad = problem(routing, hidden)
    return [x.requires_grad_(), weights.requires_grad_()], index, grad


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every mask that dropout draws, in turn."""
    found: list[Tensor] = []
    original: Callable[..., Tensor] = settings_module.draw_kept

    def spy(*args: object) -> Tensor:
        found.append(original(*args))
        return found[-1]

    monkeypatch.setattr(settings_module, "draw_kept", spy)
    return found


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("some", SOME)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_equals_the_updates_made_whole(routing: str, some: str) -> None:
    module = build(SOME[some])
    assert len(list(module.parameters())) == 2 + 2 * len(SOME[some])
    inputs, index, grad = inputs_of(routing)
    found = results(module, module(dispatched(*inputs, index)), inputs, grad)
    expected = results(module, dense(module, *inputs, index, {}), inputs, grad)
    assert_equal_to_a_millionth(found, expected)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("some", SOME)
@pytest.mark.parametrize("routing", ["uneven", "idle first and last"])
def test_dropout_equals_the_same_masks_on_updates_made_whole(
    routing: str, some: str, drawn: list[Tensor]
) -> None:
    module = build({name: replace(given, dropout=0.4) for name, given in SOME[some].items()})
    inputs, index, grad = inputs_of(routing)
    found = results(module, module(dispatched(*inputs, index)), inputs, grad)
    kept = dict(zip(module.settings, drawn, strict=True))
    shapes = {"fc1": inputs[0].shape, "fc2": (index.numel(), WIDTH)}
    assert all(mask.shape == shapes[name] and not mask.all() and mask.any() for name, mask in kept.items())
    expected = results(module, dense(module, *inputs, index, kept), inputs, grad)
    assert_equal_to_a_millionth(found, expected)


@pytest.mark.usefixtures("path")
def test_eval_drops_nothing(drawn: list[Tensor]) -> None:
    module = build({name: replace(given, dropout=0.4) for name, given in BOTH.items()}).eval()
    inputs, index, _ = inputs_of("even")
    assert_equal_to_a_millionth([module(dispatched(*inputs, index))], [dense(module, *inputs, index, {})])
    assert not drawn


@pytest.mark.usefixtures("path")
def test_b_of_zeros_changes_no_bit() -> None:
    module = build({name: replace(given, dropout=0.4) for name, given in BOTH.items()})
    with torch.no_grad():
        module.fc1_lora_B.zero_()
        module.fc2_lora_B.zero_()
    base = Experts(EXPERTS, HIDDEN, WIDTH)
    base.load_state_dict({"fc1": module.fc1, "fc2": module.fc2})
    inputs, index, grad = inputs_of("uneven")
    outputs = [experts(dispatched(*inputs, index)) for experts in (module, base)]
    assert torch.equal(*outputs)
    of_base = [torch.autograd.grad(y, inputs, grad) for y in outputs]
    for a, b in zip(*of_base, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("path")
def test_a_frozen_base_gets_no_gradient_and_the_others_the_same() -> None:
    module = build(BOTH)
    inputs, index, grad = inputs_of("uneven")
    expected = results(module, module(dispatched(*inputs, index)), inputs, grad)
    module.fc1.requires_grad_(False)
    module.fc2.requires_grad_(False)
    kept: list[tuple[int, ...]] = []

    def remember(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        y_ND = module(dispatched(*inputs, index))
    rows = index.numel()
    weights = [tuple(p.shape) for p in module.parameters()]
    assert sorted(kept) == sorted([*weights, *(tuple(i.shape) for i in inputs), (rows, 2 * WIDTH)])
    y_ND.backward(grad)
    assert module.fc1.grad is None
    assert module.fc2.grad is None
    trained = [*inputs, *(p for p in module.parameters() if p.requires_grad)]
    found = [y_ND.detach(), *(p.grad for p in trained)]
    for a, b in zip(found, [*expected[:3], *expected[5:]], strict=True):
        assert a is not None
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["fc1_lora_A", "fc2_lora_B"])
def test_a_frozen_factor_gets_none(name: str) -> None:
    module = build(BOTH)
    module.get_parameter(name).requires_grad_(False)
    inputs, index, grad = inputs_of("uneven")
    module(dispatched(*inputs, index)).backward(grad)
    assert {key for key, p in module.named_parameters() if p.grad is None} == {name}


def test_ranks_that_do_not_fit_the_kernel_are_padded() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 8, 3), torch.randn(2, 3, 8)
    wide_a, wide_b = aligned(a, b)
    assert wide_a.shape == (2, 8, 4)
    assert wide_b.shape == (2, 4, 8)
    torch.testing.assert_close(wide_a @ wide_b, a @ b)
    half = [t.bfloat16() for t in (a, b)]
    assert aligned(*half)[0].shape[2] == 8
    assert aligned(wide_a, wide_b)[0] is wide_a


@pytest.mark.parametrize("fast_half", [True, False])
def test_bf16_equals_fp32_within_its_roundings(monkeypatch: pytest.MonkeyPatch, fast_half: bool) -> None:
    monkeypatch.setattr(matmul, "_FAST_HALF_PRODUCTS", fast_half)
    module = build(BOTH, 64, 48)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())
    half = build(BOTH, 64, 48)
    half.load_state_dict(module.state_dict())
    # The factors stay in fp32, as no engine casts them here.
    half.fc1.data, half.fc2.data = half.fc1.data.bfloat16(), half.fc2.data.bfloat16()
    (x, weights), index, grad = inputs_of("uneven", 64)
    x = x.detach().bfloat16().requires_grad_()
    found = results(half, half(dispatched(x, weights, index)), [x, weights], grad.bfloat16())
    x_wide = x.detach().float().requires_grad_()
    expected = results(
        module, module(dispatched(x_wide, weights, index)), [x_wide, weights], grad.bfloat16().float()
    )
    for a, b, like in zip(found, expected, [x, x, weights, *half.parameters()], strict=True):
        assert a.dtype == like.dtype
        assert (a.float() - b).norm() <= 2**-6 * b.norm()


def test_factors_are_read_through_local_as_the_weights_are() -> None:
    """As spread experts do: this process computes with a part of each parameter."""
    module = build(BOTH)
    seen: list[Tensor] = []

    def local(weight: Tensor) -> Tensor:
        seen.append(weight)
        return weight

    module.local = local
    inputs, index, _ = inputs_of("even")
    module(dispatched(*inputs, index))
    assert {id(weight) for weight in seen} == {id(p) for p in module.parameters()}


def test_adapting_keeps_local() -> None:
    base = Experts(EXPERTS, HIDDEN, WIDTH)
    base.local = torch.Tensor.contiguous
    assert adapt(base, BOTH).local is base.local


def test_operators_keep_torchs_rules() -> None:
    (x, weights, fc1, fc2), index, grad = problem("idle first and last")
    routing = (count(index, EXPERTS), *Order.of(index))
    checks = ("test_schema", "test_faketensor")
    pair1 = [torch.randn(EXPERTS, 8, 2), torch.randn(EXPERTS, 2, 8), torch.rand(x.shape) > 0.5]
    pair2 = [torch.randn(EXPERTS, 4, 3), torch.randn(EXPERTS, 3, 8), torch.rand(index.numel(), 4) > 0.5]
    nothing = [None, None, None]
    for low in (pair1 + pair2, nothing + pair2, [*pair1[:2], None, *nothing]):
        library.opcheck(looped_experts, (x, weights, fc1, fc2, *routing, low), test_utils=checks)
        _, inner = looped_experts(x, weights, fc1, fc2, *routing, low)
        needed = [True, True, False, True, low[0] is not None, low[3] is not None]
        given = (grad, inner, needed, x, weights, fc1, fc2, *routing, low)
        library.opcheck(looped_experts_backward, given, test_utils=checks)
