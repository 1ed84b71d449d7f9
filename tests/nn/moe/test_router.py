"""The router against loops over tokens."""

from __future__ import annotations

import math

import pytest
import torch

from cantata.core.types import IMAGE, MODALITIES, PADDING, TEXT, VIDEO
from cantata.nn.moe.router import TopKRouter, count

MODALITY_IDS = torch.tensor([TEXT, IMAGE, TEXT, VIDEO, IMAGE, PADDING, PADDING, TEXT])


def make_router(aux: float = 0.0, z: float = 0.0, bias: bool = False) -> TopKRouter:
    torch.manual_seed(0)
    router = TopKRouter(6, 5, 2, aux_loss_coef=aux, z_loss_coef=z, use_expert_bias=bias)
    torch.nn.init.normal_(router.weight)
    return router


def test_weights_are_a_softmax_over_the_chosen_logits() -> None:
    router, x = make_router(), torch.randn(8, 6)
    weights, index, _ = router(x, MODALITY_IDS)
    for token, logits in enumerate((x @ router.weight.T).tolist()):
        chosen = sorted(range(5), key=lambda e: -logits[e])[:2]
        assert index[token].tolist() == chosen
        total = sum(math.exp(logits[e]) for e in chosen)
        expected = torch.tensor([math.exp(logits[e]) / total for e in chosen])
        torch.testing.assert_close(weights[token], expected, rtol=1e-6, atol=1e-6)


def test_stats_equal_loops_that_skip_padding() -> None:
    router, x = make_router(aux=0.3, z=0.07), torch.randn(8, 6)
    _, index, stats = router(x, MODALITY_IDS)
    counts = torch.zeros(len(MODALITIES), 5, dtype=torch.int64)
    mass, squares, tokens = [0.0] * 5, 0.0, 0
    for token, modality in enumerate(MODALITY_IDS.tolist()):
        if modality == PADDING:
            continue
        logits = (x[token] @ router.weight.T).tolist()
        total = sum(map(math.exp, logits))
        squares += math.log(total) ** 2
        tokens += 1
        for expert in range(5):
            mass[expert] += math.exp(logits[expert]) / total
        for expert in index[token].tolist():
            counts[modality, expert] += 1
    chosen = counts.sum(0).tolist()
    aux = 5 / (2 * tokens**2) * sum(p * n for p, n in zip(mass, chosen, strict=True))
    assert stats.tokens_per_expert_ME.dtype == torch.int64
    assert torch.equal(stats.tokens_per_expert_ME, counts)
    assert stats.aux_loss.item() == pytest.approx(aux, rel=1e-6)
    assert stats.z_loss.item() == pytest.approx(squares / tokens, rel=1e-6)
    assert stats.loss.item() == pytest.approx(0.3 * aux + 0.07 * squares / tokens, rel=1e-6)


def test_a_balanced_router_has_an_auxiliary_loss_of_one() -> None:
    router = make_router()
    with torch.no_grad():
        router.weight.zero_()
    stats = router(torch.randn(8, 6), MODALITY_IDS).stats
    assert stats.aux_loss.item() == pytest.approx(1.0)


def test_padding_changes_neither_the_loss_nor_its_gradient() -> None:
    router, x = make_router(aux=0.3, z=0.07), torch.randn(8, 6)
    gradients = []
    for keep in (slice(0, 8), MODALITY_IDS != PADDING):
        (gradient,) = torch.autograd.grad(router(x[keep], MODALITY_IDS[keep]).stats.loss, router.weight)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-7)


def test_nothing_but_padding_gives_zeros() -> None:
    stats = make_router(aux=0.3, z=0.07)(torch.randn(2, 6), torch.full((2,), PADDING)).stats
    assert stats.loss.item() == 0
    assert stats.tokens_per_expert_ME.count_nonzero() == 0


def test_the_bias_picks_but_does_not_weigh() -> None:
    router, x = make_router(bias=True), torch.randn(8, 6)
    assert router.expert_bias_E is not None
    router.expert_bias_E[3] = 100.0
    weights, index, _ = router(x, MODALITY_IDS)
    assert (index == 3).any(-1).all()
    logits = x @ router.weight.T
    torch.testing.assert_close(weights, logits.gather(1, index).softmax(-1))
    assert torch.autograd.grad(weights[:, 0].sum(), router.weight)[0].abs().sum() > 0
    assert "expert_bias_E" in router.state_dict()
    assert "expert_bias_E" not in make_router().state_dict()


def test_count_equals_bincount() -> None:
    values = torch.randint(7, (3, 11))
    assert torch.equal(count(values, 9), torch.bincount(values.flatten(), minlength=9))
