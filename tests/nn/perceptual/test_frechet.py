"""The Frechet distance from sums, against its formula with a general matrix root."""

from __future__ import annotations

import pytest
import torch

from cantata.nn.perceptual.frechet import Moments, frechet_distance


def features(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(6, 6, generator=generator)
    return torch.randn(count, 6, generator=generator) @ mixing + seed


def test_equals_the_formula() -> None:
    x, y = features(50, 1).double(), features(40, 2).double()
    product = torch.cov(x.T) @ torch.cov(y.T)
    root_trace = torch.linalg.eigvals(product).sqrt().real.sum()
    wanted = (x.mean(0) - y.mean(0)).square().sum() + x.T.cov().trace() + y.T.cov().trace() - 2 * root_trace
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(wanted.item(), rel=1e-9)


def test_moments_add_up() -> None:
    x, y = features(20, 1), features(20, 2)
    parts = [Moments.of(x[:7]), Moments.of(x[7:])]
    added = Moments(*(sum(part) for part in zip(*parts, strict=True)))
    assert frechet_distance(added, Moments.of(y)) == pytest.approx(
        frechet_distance(Moments.of(x), Moments.of(y)), rel=1e-9
    )


def test_a_shift_alone_is_its_square_and_the_same_set_is_at_0() -> None:
    x = features(30, 3)
    assert frechet_distance(Moments.of(x), Moments.of(x + 2.0)) == pytest.approx(6 * 4.0, rel=1e-5)
    assert frechet_distance(Moments.of(x), Moments.of(x)) == pytest.approx(0.0, abs=1e-6)


def test_fewer_images_than_features_have_a_distance() -> None:
    x, y = features(4, 1), features(4, 2)
    assert 0 < frechet_distance(Moments.of(x), Moments.of(y)) < float("inf")
