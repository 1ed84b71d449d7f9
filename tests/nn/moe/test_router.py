"""The router against loops over tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cantata.core.types import IMAGE, MODALITIES, PADDING, TEXT, VIDEO, TokenGroups
from cantata.nn.moe.router import RouterStats, TopKRouter, count, limit_groups
from tests.nn.moe.small import one_sample, small_router

MODALITY = torch.tensor([TEXT, IMAGE, TEXT, VIDEO, IMAGE, TEXT, PADDING, PADDING])
SAMPLE = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])
GROUPS = TokenGroups(MODALITY, SAMPLE, 3)


def make_router(bias: bool = False, sequence: bool = False) -> TopKRouter:
    torch.manual_seed(0)
    router = small_router(6, 5, 2, bias=bias, sequence=sequence)
    torch.nn.init.normal_(router.weight)
    return router


def total(stats: RouterStats) -> Tensor:
    """Something that every differentiable sum takes part in."""
    return stats.mass_ME.square().sum() + stats.z_sum + stats.sequence_sum


def test_weights_are_a_softmax_over_the_chosen_logits() -> None:
    router, x = make_router(), torch.randn(8, 6)
    weights, index, _ = router(x, GROUPS)
    for token, logits in enumerate((x @ router.weight.T).tolist()):
        chosen = sorted(range(5), key=lambda e: -logits[e])[:2]
        assert index[token].tolist() == chosen
        mass = sum(math.exp(logits[e]) for e in chosen)
        expected = torch.tensor([math.exp(logits[e]) / mass for e in chosen])
        torch.testing.assert_close(weights[token], expected, rtol=1e-6, atol=1e-6)


def test_stats_equal_loops_that_skip_padding() -> None:
    router, x = make_router(sequence=True), torch.randn(8, 6)
    _, index, stats = router(x, GROUPS)
    counts = torch.zeros(len(MODALITIES), 5, dtype=torch.int64)
    mass, squares = torch.zeros(len(MODALITIES), 5), 0.0
    sample_mass, sample_counts = torch.zeros(3, 5), torch.zeros(3, 5)
    for token, (modality, sample) in enumerate(zip(MODALITY.tolist(), SAMPLE.tolist(), strict=True)):
        if modality == PADDING:
            continue
        logits = (x[token] @ router.weight.T).tolist()
        whole = sum(map(math.exp, logits))
        squares += math.log(whole) ** 2
        for expert in range(5):
            mass[modality, expert] += math.exp(logits[expert]) / whole
            sample_mass[sample, expert] += math.exp(logits[expert]) / whole
        for expert in index[token].tolist():
            counts[modality, expert] += 1
            sample_counts[sample, expert] += 1
    sequence = 0.0
    for sample, tokens in enumerate((3, 2, 1)):
        share, probability = sample_counts[sample] / (2 * tokens) * 5, sample_mass[sample] / tokens
        sequence += tokens * float(share @ probability)
    assert stats.tokens_per_expert_ME.dtype == torch.int64
    assert torch.equal(stats.tokens_per_expert_ME, counts)
    torch.testing.assert_close(stats.mass_ME, mass, rtol=1e-6, atol=1e-6)
    assert stats.z_sum.item() == pytest.approx(squares, rel=1e-6)
    assert stats.sequence_sum.item() == pytest.approx(sequence, rel=1e-6)


def test_an_even_router_has_a_sequence_loss_of_one_a_token() -> None:
    router = make_router(sequence=True)
    with torch.no_grad():
        router.weight.zero_()
    assert router(torch.randn(8, 6), GROUPS).stats.sequence_sum.item() == pytest.approx(6.0)


def test_padding_changes_neither_the_sums_nor_their_gradient() -> None:
    router, x = make_router(sequence=True), torch.randn(8, 6)
    gradients = []
    for keep in (slice(0, 8), MODALITY != PADDING):
        stats = router(x[keep], TokenGroups(MODALITY[keep], SAMPLE[keep], 3)).stats
        (gradient,) = torch.autograd.grad(total(stats), router.weight)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


def test_nothing_but_padding_gives_zeros() -> None:
    stats = make_router(sequence=True)(torch.randn(2, 6), one_sample(torch.full((2,), PADDING))).stats
    assert all(value.count_nonzero() == 0 for value in stats)


def test_a_frozen_router_leaves_balance_out_of_the_gradient() -> None:
    router, x = make_router(sequence=True), torch.randn(8, 6, requires_grad=True)
    assert router(x, GROUPS).stats.mass_ME.requires_grad
    router.weight.requires_grad_(False)
    weights, _, stats = router(x, GROUPS)
    assert not any(value.requires_grad for value in stats)
    assert weights.requires_grad, "the layer itself still passes gradient on"


def test_the_bias_picks_but_does_not_weigh() -> None:
    router, x = make_router(bias=True), torch.randn(8, 6)
    assert router.expert_bias_E is not None
    router.expert_bias_E[3] = 100.0
    weights, index, _ = router(x, GROUPS)
    assert (index == 3).any(-1).all()
    logits = x @ router.weight.T
    torch.testing.assert_close(weights, logits.gather(1, index).softmax(-1))
    assert torch.autograd.grad(weights[:, 0].sum(), router.weight)[0].abs().sum() > 0
    assert "expert_bias_E" in router.state_dict()
    assert "expert_bias_E" not in make_router().state_dict()


@pytest.mark.parametrize("top_groups", [1, 2, 3])
def test_a_token_stays_in_its_best_groups(top_groups: int) -> None:
    torch.manual_seed(1)
    router = small_router(6, 12, 3, num_groups=3, top_groups=top_groups)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(20, 6)
    weights, index, _ = router(x, one_sample(torch.zeros(20, dtype=torch.int64)))
    for token, logits in enumerate((x @ router.weight.T).tolist()):
        best = sorted(range(3), key=lambda g: -max(logits[4 * g : 4 * g + 4]))[:top_groups]
        open_experts = [e for e in range(12) if e // 4 in best]
        assert index[token].tolist() == sorted(open_experts, key=lambda e: -logits[e])[:3]
    torch.testing.assert_close(weights, (x @ router.weight.T).gather(1, index).softmax(-1))


def test_limited_scores_are_the_others_untouched() -> None:
    scores = torch.tensor([[1.0, 5.0, 2.0, 3.0, 4.0, 0.0]])
    inf = float("inf")
    assert limit_groups(scores, 3, 1).tolist() == [[1.0, 5.0, -inf, -inf, -inf, -inf]]
    assert limit_groups(scores, 3, 2).tolist() == [[1.0, 5.0, -inf, -inf, 4.0, 0.0]]


def test_count_equals_bincount() -> None:
    values = torch.randint(7, (3, 11))
    assert torch.equal(count(values, 9), torch.bincount(values.flatten(), minlength=9))
