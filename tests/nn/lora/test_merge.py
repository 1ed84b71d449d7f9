"""Merged weights give what the adapted modules give, and stay wide."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cantata.nn.lora import dora_weight, embedding_delta, experts_delta, linear_delta
from cantata.nn.lora.linear import LoRALinear
from cantata.nn.matmul import Linear
from tests.nn.lora.factors import DORA, PLAIN, adapted


def test_linear_and_dora_equal_the_layer() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 6)
    for settings in (PLAIN, DORA):
        module = adapted(Linear(6, 4), settings)
        assert isinstance(module, LoRALinear)
        given = module.lora_A, module.lora_B
        scaling = settings.scaling
        if settings.dora:
            merged = dora_weight(module.weight, *given, module.lora_magnitude, scaling)
        else:
            merged = module.weight + linear_delta(*given, scaling)
        torch.testing.assert_close(F.linear(x, merged, module.bias), module(x), rtol=1e-5, atol=1e-6)


def test_embedding_equals_the_layer() -> None:
    torch.manual_seed(0)
    module = adapted(torch.nn.Embedding(9, 4), PLAIN)
    merged = module.weight + embedding_delta(module.lora_A, module.lora_B, PLAIN.scaling)
    torch.testing.assert_close(merged, module(torch.arange(9)))


def test_one_expert_and_all_of_them_agree() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 6, 2), torch.randn(3, 2, 8)
    whole = experts_delta(a, b, 0.5)
    torch.testing.assert_close(whole, 0.5 * torch.einsum("eir,ero->eio", a, b))
    torch.testing.assert_close(experts_delta(a[1], b[1], 0.5), whole[1])


def test_half_precision_is_widened_first() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 6).bfloat16(), torch.randn(4, 2).bfloat16()
    delta = linear_delta(a, b, 0.5)
    assert delta.dtype == torch.float32
    assert torch.equal(delta, b.float() @ a.float() * 0.5)
    assert embedding_delta(a, b, 1.0).dtype == torch.float32
    assert experts_delta(a, a.t(), 1.0).dtype == torch.float32
    weight = torch.randn(4, 6).bfloat16()
    assert dora_weight(weight, a, b, torch.ones(4), 1.0).dtype == torch.float32
