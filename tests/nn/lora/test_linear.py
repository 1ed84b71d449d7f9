"""The adapted linear layer against W + scaling B A, and against PEFT's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cantata.nn import matmul
from cantata.nn.lora import LoRALinear, adapt, dora_magnitude, magnitude_change, row_norms
from cantata.nn.lora import settings as settings_module
from cantata.nn.lora.linear import adapted_linear
from cantata.nn.lora.settings import LoRASettings
from cantata.nn.matmul import Linear
from tests.nn.lora.factors import DORA, DROPPED, PLAIN, RSLORA, adapted, assert_equal_to_a_millionth

SHAPE = (2, 5, 6)


def layer(settings: LoRASettings, bias: bool = True) -> LoRALinear:
    torch.manual_seed(0)
    made = adapted(Linear(6, 4, bias=bias), settings)
    assert isinstance(made, LoRALinear)
    return made


def dense(module: LoRALinear, x: Tensor) -> Tensor:
    """The update is made whole, and the norm counts as a constant."""
    scaling = module.settings.alpha / module.settings.r
    weight = module.weight + scaling * module.lora_B @ module.lora_A
    if module.settings.dora:
        magnitude = (1 + module.lora_magnitude) * module.weight.norm(dim=1).detach()
        weight = weight * (magnitude / weight.norm(dim=1).detach())[:, None]
    return F.linear(x, weight, module.bias)


def results(module: LoRALinear, x: Tensor, y: Tensor) -> list[Tensor]:
    given = [x, *module.parameters()]
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, given, grad)]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)).requires_grad_()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("settings", [PLAIN, DORA])
def test_equals_the_layer_whose_update_is_made_whole(settings: LoRASettings, bias: bool, x: Tensor) -> None:
    module = layer(settings, bias)
    assert_equal_to_a_millionth(results(module, x, module(x)), results(module, x, dense(module, x)))


def test_rslora_scales_by_the_root_of_the_rank(x: Tensor) -> None:
    module, plain = layer(RSLORA), layer(PLAIN)
    base = F.linear(x, module.weight, module.bias)
    torch.testing.assert_close((module(x) - base) / 3**0.5, plain(x) - base, rtol=1e-5, atol=1e-6)


def test_dropout_zeroes_inputs_of_a_alone_and_scales_the_others(
    monkeypatch: pytest.MonkeyPatch, x: Tensor
) -> None:
    drawn = []
    original = settings_module.draw_kept

    def spy(*args: object) -> Tensor:
        drawn.append(original(*args))  # type: ignore[arg-type]
        return drawn[-1]

    monkeypatch.setattr(settings_module, "draw_kept", spy)
    module = layer(DROPPED)
    y = module(x)
    (kept,) = drawn
    assert 0 < int(kept.sum()) < kept.numel()
    low = x * kept / (1 - 0.4)
    expected = F.linear(x, module.weight, module.bias) + 2.0 * low @ module.lora_A.t() @ module.lora_B.t()
    assert_equal_to_a_millionth(results(module, x, y), results(module, x, expected))
    module.eval()
    torch.testing.assert_close(module(x), dense(module, x))
    assert len(drawn) == 1


def test_b_of_zeros_changes_no_bit(x: Tensor) -> None:
    module = layer(DROPPED)
    with torch.no_grad():
        module.lora_B.zero_()
    assert torch.equal(module(x), F.linear(x, module.weight, module.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_that_has_learned_nothing_changes_no_bit(x: Tensor, dtype: torch.dtype) -> None:
    module = layer(DORA, bias=False).to(dtype)
    with torch.no_grad():
        module.lora_B.zero_()
        module.lora_magnitude.zero_()
    x = x.detach().to(dtype)
    assert torch.equal(module(x), matmul.linear(x, module.weight))


def test_dora_in_half_precision_hears_of_small_changes() -> None:
    """A magnitude of its own would move in steps of 0.4%."""
    module = layer(DORA, bias=False).bfloat16()
    x = torch.ones(1, 6, dtype=torch.bfloat16)
    with torch.no_grad():
        module.lora_B.zero_()
        module.lora_magnitude.fill_(0.02)
        before = module(x).float()
        module.lora_magnitude.fill_(0.03)
        ratio = module(x).float() / before
    assert ratio.mean() == pytest.approx(1.03 / 1.02, abs=4e-3)
    weight = torch.randn(512, 64)
    found = magnitude_change(weight, dora_magnitude(weight, torch.full((512,), 1e-3).bfloat16()))
    torch.testing.assert_close(found, torch.full((512,), 1e-3), rtol=5e-3, atol=0)


@pytest.mark.parametrize("fast_half", [True, False])
def test_bf16_rounds_once_where_it_is_widened(monkeypatch: pytest.MonkeyPatch, fast_half: bool) -> None:
    monkeypatch.setattr(matmul, "_FAST_HALF_PRODUCTS", fast_half)
    torch.manual_seed(0)
    wide = layer(PLAIN)
    module = layer(PLAIN).bfloat16()
    # No engine casts them here.
    module.lora_A.data, module.lora_B.data = module.lora_A.data.float(), module.lora_B.data.float()
    with torch.no_grad():
        for mine, theirs in zip(wide.parameters(), module.parameters(), strict=True):
            mine.copy_(theirs)
    x = torch.randn(64, 6).bfloat16().requires_grad_()
    found = results(module, x, module(x))
    x_wide = x.detach().float().requires_grad_()
    expected = results(wide, x_wide, wide(x_wide))
    for a, b, like in zip(found, expected, [x, x, *module.parameters()], strict=True):
        assert a.dtype == like.dtype
        assert (a.float() - b).norm() <= 2**-6 * b.norm()


@pytest.mark.parametrize("settings", [PLAIN, DROPPED])
def test_a_frozen_base_gets_no_gradient_and_keeps_nothing(settings: LoRASettings) -> None:
    module = layer(settings)
    module.weight.requires_grad_(False)
    module.bias.requires_grad_(False)
    x = torch.randn(7, 6)
    kept: list[tuple[tuple[int, ...], int]] = []

    def remember(tensor: Tensor) -> Tensor:
        if all(tensor is not parameter for parameter in (module.weight, module.lora_A, x)):
            kept.append((tuple(tensor.shape), tensor.element_size()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        y = module(x)
    assert sorted(kept) == sorted([((4, 3), 4), ((7, 3), 4), *([((7, 6), 1)] if settings.dropout else [])])
    y.sum().backward()
    assert module.weight.grad is None
    assert module.lora_A.grad is not None
    assert module.lora_B.grad is not None


def test_no_product_is_made_for_what_is_frozen(x: Tensor) -> None:
    """With x alone trained, backward makes three products: through B, through W and through A."""
    module = layer(PLAIN)
    module.requires_grad_(False)
    y = module(x)
    with torch.profiler.profile() as profile:
        y.sum().backward()
    assert sum(e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm_")) == 3


def test_row_norms_equal_the_formula_in_every_precision() -> None:
    torch.manual_seed(0)
    weight, a, b = torch.randn(5, 7), torch.randn(2, 7), torch.randn(5, 2)
    before = weight.clone()
    torch.testing.assert_close(row_norms(weight, a, b, 0.5), (weight + 0.5 * b @ a).norm(dim=1))
    assert torch.equal(weight, before)
    half = row_norms(weight.bfloat16(), a, b, 0.5)
    torch.testing.assert_close(half, (weight.bfloat16().float() + 0.5 * b @ a).norm(dim=1))
    assert row_norms(weight.double(), a, b, 0.5).dtype == torch.float64


@pytest.mark.parametrize(("settings", "bias"), [(PLAIN, True), (RSLORA, False), (DORA, True), (DORA, False)])
def test_equals_pefts(settings: LoRASettings, bias: bool, x: Tensor) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    ours = layer(settings, bias)
    base = torch.nn.Sequential(torch.nn.Linear(6, 4, bias=bias))
    base[0].load_state_dict({name: p for name, p in ours.state_dict().items() if "lora" not in name})
    config = peft.LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        target_modules=["0"],
        use_rslora=settings.rslora,
        use_dora=settings.dora,
    )
    theirs = peft.get_peft_model(base, config)
    inner = theirs.base_model.model[0]
    with torch.no_grad():
        inner.lora_A["default"].weight.copy_(ours.lora_A)
        inner.lora_B["default"].weight.copy_(ours.lora_B)
        if settings.dora:
            magnitude = dora_magnitude(ours.weight, ours.lora_magnitude)
            inner.lora_magnitude_vector["default"].weight.copy_(magnitude)
    y, expected = ours(x), theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    grads = torch.autograd.grad(y.square().sum(), [x, ours.lora_A, ours.lora_B])
    factors = [x, inner.lora_A["default"].weight, inner.lora_B["default"].weight]
    for a, b in zip(grads, torch.autograd.grad(expected.square().sum(), factors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_no_inputs_give_zero_gradients() -> None:
    module = layer(DROPPED)
    module(torch.randn(0, 6)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


def test_adapts_the_same_layer_twice_with_the_same_dropout_after_the_same_seed(x: Tensor) -> None:
    module = adapt(Linear(6, 4), DROPPED)
    assert isinstance(module, LoRALinear)
    torch.nn.init.normal_(module.lora_A)
    torch.nn.init.normal_(module.lora_B)
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs.append(module(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_gradients_pass_torchs_own_check() -> None:
    torch.manual_seed(0)
    given = [
        torch.randn(shape, dtype=torch.float64).requires_grad_()
        for shape in ((3, 4), (5, 4), (5,), (2, 4), (5, 2))
    ]
    kept = torch.rand(3, 4) > 0.3
    assert torch.autograd.gradcheck(lambda *args: adapted_linear(*args, kept), given)
