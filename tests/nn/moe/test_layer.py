"""The MoE layer against every token's experts, one by one."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cantata.nn.mlp import SwiGLU
from cantata.nn.moe.experts import Experts
from cantata.nn.moe.layer import MoELayer
from tests.nn.moe.small import one_sample, small_router


def test_equals_a_loop_over_tokens() -> None:
    torch.manual_seed(0)
    router = small_router(8, 5, 2)
    layer = MoELayer(router, Experts(5, 8, 12), SwiGLU(8, 24))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(7, 8)
    out, stats = layer(x, one_sample(torch.zeros(7, dtype=torch.int64)))
    rows = []
    for token in x:
        top = torch.topk(router.weight @ token, 2)
        row = layer.shared_experts(token)
        for expert, weight in zip(top.indices.tolist(), top.values.softmax(0), strict=True):
            gate, up = (token @ layer.experts.fc1[expert]).chunk(2)
            row = row + weight * ((F.silu(gate) * up) @ layer.experts.fc2[expert])
        rows.append(row)
    expected = torch.stack(rows)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert int(stats.tokens_per_expert_ME.sum()) == 14
    parameters = list(layer.parameters())
    grad = torch.randn(7, 8)
    fast = torch.autograd.grad(out, parameters, grad)
    slow = torch.autograd.grad(expected, parameters, grad)
    for found, reference in zip(fast, slow, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-5)
