"""Schedules at the steps where they turn."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cantata.core.errors import ConfigError
from cantata.train.schedule import Constant, Cosine, Linear, Schedule, WarmupStableDecay

SCHEDULES: list[Callable[[int, float], Schedule]] = [
    lambda warmup, ratio: Constant(warmup),
    lambda warmup, ratio: Linear(warmup, ratio),
    lambda warmup, ratio: Cosine(warmup, ratio),
    lambda warmup, ratio: WarmupStableDecay(warmup, 20, ratio),
]


@pytest.mark.parametrize("make", SCHEDULES)
def test_warm_up_is_a_line_that_starts_above_zero(make: Callable[[int, float], Schedule]) -> None:
    schedule = make(4, 0.1)
    assert [schedule(step, 100) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert make(0, 0.1)(0, 100) == 1.0


def test_cosine_and_linear_between_their_ends() -> None:
    cosine, linear = Cosine(10, 0.1), Linear(10, 0.1)
    assert cosine(60, 110) == pytest.approx(0.55)
    assert linear(60, 110) == pytest.approx(0.55)
    assert cosine(35, 110) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert linear(35, 110) == pytest.approx(0.775)
    assert (cosine(110, 110), linear(110, 110)) == pytest.approx((0.1, 0.1))


def test_warmup_stable_decay() -> None:
    schedule = WarmupStableDecay(warmup_steps=10, decay_steps=20, min_ratio=0.0)
    assert schedule(79, 100) == schedule(80, 100) == 1.0
    assert schedule(90, 100) == pytest.approx(0.5)
    assert schedule(100, 100) == 0.0
    long_decay = WarmupStableDecay(warmup_steps=10, decay_steps=1000, min_ratio=0.0)
    assert long_decay(10, 110) == 1.0
    assert long_decay(60, 110) == pytest.approx(0.5)


@given(
    make=st.sampled_from(SCHEDULES),
    warmup=st.integers(0, 50),
    ratio=st.floats(0, 1),
    max_steps=st.integers(1, 200),
    step=st.integers(0, 300),
)
def test_factors_stay_between_their_ends(
    make: Callable[[int, float], Schedule], warmup: int, ratio: float, max_steps: int, step: int
) -> None:
    schedule = make(warmup, ratio)
    factor = schedule(step, max_steps)
    assert 0.0 <= factor <= 1.0
    if step >= warmup:
        assert schedule(step + 1, max_steps) <= factor + 1e-12
        assert factor >= ratio - 1e-12


def test_bad_values_are_named() -> None:
    with pytest.raises(ConfigError, match=r"schedule\.warmup_steps=-1"):
        Cosine(-1, 0.1)
    with pytest.raises(ConfigError, match=r"schedule\.min_ratio=1\.5"):
        Linear(0, 1.5)
    with pytest.raises(ConfigError, match=r"schedule\.decay_steps=-2"):
        WarmupStableDecay(0, -2, 0.0)
