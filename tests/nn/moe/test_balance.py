"""Balance losses against formulas written out, and the loss-free bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cantata.core.errors import ConfigError
from cantata.core.types import IMAGE, MODALITIES, TEXT, RouterStats
from cantata.nn.mlp import SwiGLU
from cantata.nn.moe.balance import balance_loss, update_expert_bias
from cantata.nn.moe.experts import Experts
from cantata.nn.moe.layer import MoELayer
from tests.nn.moe.small import balance, one_sample, small_router

LAYERS, EXPERTS, TOP_K = 2, 6, 2


def make_stats(tokens_M: list[int], seed: int) -> RouterStats:
    """Sums that routing this many tokens of each modality could have made."""
    generator = torch.Generator().manual_seed(seed)
    counts, mass = (torch.zeros(LAYERS, len(MODALITIES), EXPERTS) for _ in range(2))
    for layer in range(LAYERS):
        for modality, tokens in enumerate(tokens_M):
            for _ in range(tokens):
                counts[layer, modality, torch.randperm(EXPERTS, generator=generator)[:TOP_K]] += 1
                mass[layer, modality] += torch.randn(EXPERTS, generator=generator).softmax(0)
    z_sum, sequence_sum = torch.rand(2, LAYERS, generator=generator) * sum(tokens_M)
    return RouterStats(mass.requires_grad_(), z_sum, sequence_sum, counts.to(torch.int64))


def switch(mass_E: Tensor, counts_E: Tensor, groups: int) -> float:
    """`G / (k T^2) * sum(P n)`, one group after another."""
    size, tokens = EXPERTS // groups, float(counts_E.sum()) / TOP_K
    total = 0.0
    for group in range(groups):
        of_group = slice(group * size, (group + 1) * size)
        total += float(mass_E[of_group].sum() * counts_E[of_group].sum())
    return groups / (TOP_K * tokens**2) * total


@pytest.mark.parametrize("groups", [6, 3, 2, 1])
def test_every_term_equals_its_formula(groups: int) -> None:
    stats = make_stats([5, 3, 0], seed=0)
    coefficients: dict[str, Any] = {
        "aux": 0.5,
        "z": 0.3,
        "sequence": 0.2,
        "modality": {"text": 2.0, "image": 7.0},
    }
    found = balance_loss(stats, stats.tokens_per_expert_ME, balance(EXPERTS, groups=groups, **coefficients))
    wanted = 0.3 * float(stats.z_sum.sum()) + 0.2 * float(stats.sequence_sum.sum())
    for layer in range(LAYERS):
        mass_ME, counts_ME = stats.mass_ME[layer].detach(), stats.tokens_per_expert_ME[layer]
        aux = switch(mass_ME.sum(0), counts_ME.sum(0), groups)
        assert float(found.sums["aux_loss_L"][layer]) == pytest.approx(8 * aux, rel=1e-6)
        wanted += 0.5 * 8 * aux
        for modality, tokens, coefficient in ((TEXT, 5, 2.0), (IMAGE, 3, 7.0)):
            alone = switch(mass_ME[modality], counts_ME[modality], groups)
            assert float(found.sums["aux_loss_LM"][layer, modality]) == pytest.approx(
                tokens * alone, rel=1e-6
            )
            wanted += coefficient * tokens * alone
    assert found.loss_sum.item() == pytest.approx(wanted, rel=1e-6)
    assert not any(value.requires_grad for value in found.sums.values())


def test_shares_of_ranks_add_up_to_the_whole() -> None:
    """Each rank's own probabilities with everybody's counts: the loss and its gradient of all tokens."""
    config = balance(EXPERTS, aux=0.5, modality={"image": 3.0}, z=0.1)
    ranks = [make_stats(tokens, seed) for seed, tokens in enumerate(([5, 0, 0], [2, 4, 0], [0, 0, 0]))]
    counts = sum(stats.tokens_per_expert_ME for stats in ranks)
    whole = RouterStats(
        sum(stats.mass_ME.detach() for stats in ranks).requires_grad_(),
        sum(stats.z_sum for stats in ranks),
        sum(stats.sequence_sum for stats in ranks),
        counts,
    )
    together = balance_loss(whole, counts, config)
    together.loss_sum.backward()
    shares = [balance_loss(stats, counts, config) for stats in ranks]
    assert sum(share.loss_sum.item() for share in shares) == pytest.approx(together.loss_sum.item(), rel=1e-6)
    for share, stats in zip(shares, ranks, strict=True):
        share.loss_sum.backward()
        torch.testing.assert_close(stats.mass_ME.grad, whole.mass_ME.grad, rtol=1e-6, atol=1e-6)


def test_even_routing_costs_one_a_token_whatever_the_groups() -> None:
    counts = torch.full((1, 3, EXPERTS), 4)
    stats = RouterStats(torch.full((1, 3, EXPERTS), 2.0), torch.zeros(1), torch.zeros(1), counts)
    for groups in (1, 2, 6):
        found = balance_loss(stats, counts, balance(EXPERTS, groups=groups)).sums
        assert found["aux_loss_L"].tolist() == pytest.approx([36.0])
        assert found["aux_loss_LM"][0].tolist() == pytest.approx([12.0] * 3)


def test_text_alone_leaves_images_alone() -> None:
    stats = make_stats([5, 3, 0], seed=0)
    balance_loss(
        stats, stats.tokens_per_expert_ME, balance(EXPERTS, modality={"text": 1.0})
    ).loss_sum.backward()
    assert stats.mass_ME.grad is not None
    assert stats.mass_ME.grad[:, TEXT].abs().sum() > 0
    assert stats.mass_ME.grad[:, IMAGE].count_nonzero() == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aux": -1.0}, r"balance\.aux_loss_coef=-1\.0"),
        ({"z": float("nan")}, r"balance\.z_loss_coef=nan"),
        (
            {"modality": {"imgae": 1.0}},
            r"modality_aux_loss_coef\.imgae is none of text, image, video; .*image",
        ),
        ({"modality": {"text": -2.0}}, r"modality_aux_loss_coef\.text=-2\.0"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        balance(EXPERTS, **settings)
    with pytest.raises(ConfigError, match="aux_loss_groups=4 must divide num_experts"):
        balance(EXPERTS, groups=4).check(EXPERTS)


def make_layer(use_expert_bias: bool = True) -> MoELayer:
    router = small_router(8, 4, 1, bias=use_expert_bias)
    torch.nn.init.normal_(router.weight)
    return MoELayer(router, Experts(4, 8, 8), SwiGLU(8, 8))


def test_moves_against_the_load_and_stays_centred() -> None:
    layers = [make_layer(), make_layer(), make_layer()]
    layers[2].router.weight.requires_grad_(False)
    update_expert_bias(layers, torch.tensor([[7, 1, 1, 1], [2, 2, 2, 2], [7, 1, 1, 1]]), 0.1)
    # mean 2.5: signs (-, +, +, +), their mean 0.05 taken off.
    torch.testing.assert_close(layers[0].router.expert_bias_E, torch.tensor([-0.15, 0.05, 0.05, 0.05]))
    assert layers[1].router.expert_bias_E.tolist() == [0.0] * 4
    assert layers[2].router.expert_bias_E.tolist() == [0.0] * 4, "a frozen router stays as it is"


def test_repeated_it_balances() -> None:
    torch.manual_seed(0)
    layer, groups = make_layer(), one_sample(torch.zeros(400, dtype=torch.int64))
    x = torch.randn(400, 8) + 0.5

    def counts() -> torch.Tensor:
        return layer.router(x, groups).stats.tokens_per_expert_ME.sum(0)

    before = counts().max().item()
    for _ in range(300):
        update_expert_bias([layer], counts()[None], 0.02)
    assert counts().max().item() < 115 < before


def test_a_router_without_bias_is_refused() -> None:
    with pytest.raises(ValueError, match="without an expert bias"):
        update_expert_bias([make_layer(use_expert_bias=False)], torch.ones(1, 4), 0.1)
