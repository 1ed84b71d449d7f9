"""Packed weights against plain ones of the values that they unpack to, and what autograd keeps of them."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cantata.core.errors import ConfigError
from cantata.nn.lora import LoRASettings, PackedWeight, Packing, packed_bytes, require_library
from cantata.nn.matmul import Linear
from cantata.nn.moe.experts import Experts
from cantata.train.live_bytes import LiveBytes
from tests.nn.lora.factors import DORA, PLAIN, adapted, assert_equal_to_a_millionth
from tests.nn.lora.test_experts import BOTH, SOME, build, dispatched
from tests.nn.moe.test_experts import path, problem

__all__ = ["path"]
CPU = torch.device("cpu")
KINDS = [Packing.int8, Packing.nf4]
STEP = {Packing.int8: 1 / 254, Packing.nf4: 0.152}
"""The largest error, as a share of a block's largest value: half of the widest gap between two codes."""


def packed(weight: Tensor, packing: Packing) -> PackedWeight:
    made = PackedWeight.empty(weight.shape, weight.dtype, packing, CPU)
    made.copy_(weight)
    return made


def rest(module: nn.Module, packing: Packing, *names: str) -> tuple[nn.Module, nn.Module]:
    """A module over packed weights, and one over plain parameters of the same values."""
    plain, resting = copy.deepcopy(module), copy.deepcopy(module)
    for name in names:
        weight = packed(module.get_parameter(name).detach(), packing)
        delattr(resting, name)
        resting.register_buffer(name, weight, persistent=False)
        setattr(plain, name, nn.Parameter(weight.unpack(), requires_grad=False))
    return resting, plain


@pytest.mark.parametrize("packing", KINDS)
@pytest.mark.parametrize("shape", [(6, 5), (16, 64), (3, 10, 7)])
def test_no_value_is_off_by_more_than_half_a_step(shape: tuple[int, ...], packing: Packing) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    made = packed(weight, packing)
    assert made.shape == weight.shape
    assert made.codes_MB.nbytes + made.scales_MS.nbytes == packed_bytes(shape, packing)
    error = float((made.unpack() - weight).abs().max())
    assert 0 < error <= STEP[packing] * float(weight.abs().max()) * 1.001
    again = packed(made.unpack(), packing)
    torch.testing.assert_close(again.unpack(), made.unpack(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("packing", KINDS)
def test_an_expert_is_packed_alike_whoever_holds_it(packing: Packing) -> None:
    weight = torch.randn(4, 10, 7, generator=torch.Generator().manual_seed(1))
    whole = packed(weight, packing).unpack()
    assert torch.equal(whole[2:], packed(weight[2:], packing).unpack())


def test_what_it_rests_in_follows_from_its_kind() -> None:
    assert packed_bytes((128, 64), Packing.nf4) == 128 * 64 // 2 + 128 * 4
    assert packed_bytes((128, 64), Packing.int8) == 128 * 64 + 32 * 4


@pytest.mark.parametrize("packing", KINDS)
@pytest.mark.parametrize("settings", [None, PLAIN, DORA], ids=["no adapter", "lora", "dora"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_equals_one_of_the_unpacked_values(
    bias: bool, settings: LoRASettings | None, packing: Packing
) -> None:
    torch.manual_seed(0)
    base = Linear(10, 7, bias=bias)
    resting, plain = rest(base if settings is None else adapted(base, settings), packing, "weight")
    x = torch.randn(2, 5, 10, requires_grad=True)
    assert_equal_to_a_millionth(results(resting, resting, x), results(plain, plain, x))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("case", ["uneven", "idle first and last", "no token"])
@pytest.mark.parametrize("settings", [None, *SOME.values()], ids=["no adapter", *SOME])
def test_experts_equal_those_of_the_unpacked_values(
    settings: Mapping[str, LoRASettings] | None, case: str
) -> None:
    base = build(BOTH if settings is None else settings)
    if settings is None:
        base.__class__ = Experts  # type: ignore[assignment]
        for name in [name for name, _ in base.named_parameters() if "lora" in name]:
            delattr(base, name)
    resting, plain = rest(base, Packing.nf4, "fc1", "fc2")
    (x_ND, weights_NK, *_), index_NK, _ = problem(case)
    given = [x_ND.requires_grad_(), weights_NK.requires_grad_()]

    def run(module: nn.Module) -> list[Tensor]:
        return results(module, lambda x: module(dispatched(x, weights_NK, index_NK)), *given)

    assert_equal_to_a_millionth(run(resting), run(plain))


def results(module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, *others: Tensor) -> list[Tensor]:
    y = run(x)
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    return [y.detach(), *torch.autograd.grad(y, [x, *others, *learned], grad)]


@pytest.mark.parametrize("adapter", [True, False])
def test_forward_keeps_no_whole_weight(adapter: bool) -> None:
    """Three layers of 256 x 256 keep their outputs and what adapters add, and no 256 KiB of a weight."""
    torch.manual_seed(0)
    layers = [Linear(256, 256, bias=False) for _ in range(3)]
    both = [rest(adapted(layer, PLAIN) if adapter else layer, Packing.nf4, "weight") for layer in layers]
    x = torch.randn(4, 256, requires_grad=True)

    def kept(chain: list[nn.Module]) -> tuple[int, int]:
        with LiveBytes() as live:
            y = x
            for layer in chain:
                y = layer(y)
            return live.now, live.peak

    weight = 4 * 256 * 256
    now, peak = kept([resting for resting, _ in both])
    assert now < weight / 4
    assert weight <= peak < 1.5 * weight, "one at a time"


@pytest.mark.usefixtures("path")
def test_backward_of_experts_is_handed_packed_weights() -> None:
    base = build(BOTH, hidden=64, width=32)
    resting, plain = rest(base, Packing.nf4, "fc1", "fc2")
    (x_ND, weights_NK, *_), index_NK, _ = problem("uneven", hidden=64)

    def saved(module: nn.Module) -> int:
        kept = []

        def keep(tensor: Tensor) -> Tensor:
            is_packed = isinstance(tensor, PackedWeight)
            kept.append(packed_bytes(tensor.shape, tensor.packing) if is_packed else tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            module(dispatched(x_ND.requires_grad_(), weights_NK, index_NK))
        return sum(kept)

    whole = plain.fc1.nbytes + plain.fc2.nbytes
    at_rest = sum(packed_bytes(weight.shape, Packing.nf4) for weight in (plain.fc1, plain.fc2))
    assert saved(plain) - saved(resting) == whole - at_rest > 0.85 * whole


def test_other_dtypes_devices_and_operators_see_a_weight() -> None:
    weight = torch.randn(8, 64)
    made = packed(weight, Packing.int8)
    whole = made.unpack()
    assert torch.equal(made.to(torch.bfloat16), whole.to(torch.bfloat16))
    assert torch.equal(made.t() @ weight, whole.t() @ weight)
    copied = made.to(torch.float32, copy=True)
    assert not isinstance(copied, PackedWeight)
    assert torch.equal(copied, whole)
    assert isinstance(made.to("meta"), PackedWeight)
    assert isinstance(torch.empty_like(made, device="meta"), PackedWeight)
    assert isinstance(made.detach(), PackedWeight)
    assert torch.equal(F.linear(weight, made.to(torch.float32)), F.linear(weight, whole))


def test_half_precision_is_rounded_once() -> None:
    weight = torch.randn(8, 64)
    made = PackedWeight.empty(weight.shape, torch.bfloat16, Packing.nf4, CPU)
    made.copy_(weight)
    assert made.unpack().dtype == torch.bfloat16
    assert torch.equal(made.unpack(), packed(weight.bfloat16(), Packing.nf4).unpack())


def test_it_is_frozen() -> None:
    made = packed(torch.randn(8, 64), Packing.nf4)
    with pytest.raises(TypeError, match="frozen"):
        made.add_(1.0)


def test_without_the_library_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.import_module

    def without(name: str, *args: Any) -> Any:
        if name.startswith("bitsandbytes"):
            raise ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes")
        return original(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ConfigError, match=r"lora\.quantize_base needs bitsandbytes: pip install"):
        require_library()
