"""The loss-free bias."""

from __future__ import annotations

import pytest
import torch

from cantata.nn.mlp import SwiGLU
from cantata.nn.moe.balance import update_expert_bias
from cantata.nn.moe.experts import Experts
from cantata.nn.moe.layer import MoELayer
from cantata.nn.moe.router import TopKRouter


def make_layer(use_expert_bias: bool = True) -> MoELayer:
    router = TopKRouter(8, 4, 1, aux_loss_coef=0.0, z_loss_coef=0.0, use_expert_bias=use_expert_bias)
    torch.nn.init.normal_(router.weight)
    return MoELayer(router, Experts(4, 8, 8), SwiGLU(8, 8))


def test_moves_against_the_load_and_stays_centred() -> None:
    layers = [make_layer(), make_layer()]
    update_expert_bias(layers, torch.tensor([[7, 1, 1, 1], [2, 2, 2, 2]]), 0.1)
    # mean 2.5: signs (-, +, +, +), their mean 0.05 taken off.
    torch.testing.assert_close(layers[0].router.expert_bias_E, torch.tensor([-0.15, 0.05, 0.05, 0.05]))
    assert layers[1].router.expert_bias_E.tolist() == [0.0] * 4


def test_repeated_it_balances() -> None:
    torch.manual_seed(0)
    layer, modality = make_layer(), torch.zeros(400, dtype=torch.int64)
    x = torch.randn(400, 8) + 0.5

    def counts() -> torch.Tensor:
        return layer.router(x, modality).stats.tokens_per_expert_ME.sum(0)

    before = counts().max().item()
    for _ in range(300):
        update_expert_bias([layer], counts()[None], 0.02)
    assert counts().max().item() < 115 < before


def test_a_router_without_bias_is_refused() -> None:
    with pytest.raises(ValueError, match="without an expert bias"):
        update_expert_bias([make_layer(use_expert_bias=False)], torch.ones(1, 4), 0.1)
