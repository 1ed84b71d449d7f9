"""Thinning, means and axes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from cantata.tools.report.metrics import Series
from cantata.tools.report.series import axis_of, exact, round_marks, running_mean, short, thin


def series(values: list[float] | np.ndarray) -> Series:
    return Series(np.arange(1, len(values) + 1), np.asarray(values, np.float64))


def test_thinning_keeps_every_extreme_of_an_interval() -> None:
    random = np.random.default_rng(0)
    whole = series(random.normal(size=100_000))
    whole.values[[17, 50_321, 99_998]] = 50.0, -60.0, np.nan
    thinned = thin(whole, 300)
    assert 300 < len(thinned.steps) <= 3 * 300 + 2
    edges = np.linspace(1, 100_001, 301)
    for low, high in pairwise(edges):
        inside = (whole.steps >= low) & (whole.steps < high)
        kept = (thinned.steps >= low) & (thinned.steps < high)
        assert np.nanmin(thinned.values[kept]) == np.nanmin(whole.values[inside])
        assert np.nanmax(thinned.values[kept]) == np.nanmax(whole.values[inside])
        assert np.isnan(thinned.values[kept]).any() == np.isnan(whole.values[inside]).any()
    assert (thinned.steps[0], thinned.steps[-1]) == (1, 100_000)
    assert (np.diff(thinned.steps) > 0).all()
    assert np.array_equal(thinned.values, whole.values[thinned.steps - 1], equal_nan=True), (
        "no value is made up"
    )


def test_short_series_stay_whole() -> None:
    assert thin(series([1.0] * 20), 10).steps.tolist() == list(range(1, 21))
    assert len(thin(series([np.nan] * 21), 10).steps) <= 21


def test_intervals_are_of_steps_not_of_lines() -> None:
    """A run logged every step first, and every hundredth later."""
    steps = np.concatenate([np.arange(1, 1000), np.arange(1000, 100_000, 100)])
    thinned = thin(Series(steps, np.sin(steps / 500)), 50)
    assert (thinned.steps < 1000).sum() <= 4
    assert (np.histogram(thinned.steps, 50, (1, 100_000))[0] >= 1).all()


def test_a_running_mean_passes_over_gaps() -> None:
    found = running_mean(series([1.0, np.nan, 3.0, 5.0, 7.0]), 3)
    assert np.array_equal(found.values, [1.0, np.nan, 2.0, 4.0, 5.0], equal_nan=True)
    assert running_mean(series([1.0, 3.0]), 9).values.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("values", "from_zero", "ends"),
    [
        ([2.0, 4.0], False, (1.9, 4.1)),
        ([2.0, 4.0], True, (0.0, 4.2)),
        ([-2.0, 2.0], True, (-2.2, 2.2)),
        ([4.0], False, (3.8, 4.2)),
        ([0.0], False, (-1.0, 1.0)),
        ([0.0], True, (0.0, 1.0)),
    ],
)
def test_an_axis_takes_in_all_values(values: list[float], from_zero: bool, ends: tuple[float, float]) -> None:
    axis = axis_of(np.array(values), from_zero)
    assert not axis.is_log
    assert (axis.low, axis.high) == pytest.approx(ends)
    assert len(axis.marks()) >= 2


def test_values_far_apart_stand_on_a_logarithmic_axis() -> None:
    values = np.array([1e-5, 1e-3, 3e-2])
    axis = axis_of(values, from_zero=True)
    assert axis.is_log
    places = axis.place(values)
    assert 0 < places[0] < places[1] < places[2] < 1
    assert [text for _, text in axis.marks()] == ["1e-5", "1e-4", "0.001", "0.01"]
    assert not axis_of(values, from_zero=True, may_be_log=False).is_log
    assert not axis_of(np.array([0.0, 1e-5, 3.0]), from_zero=True).is_log


def test_marks_are_round() -> None:
    assert round_marks(0, 80) == [0, 20, 40, 60, 80]
    assert round_marks(2.31, 9.13) == [4, 6, 8]
    assert round_marks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])


@pytest.mark.parametrize(
    ("value", "on_axis", "told"),
    [
        (0.0, "0", "0"),
        (12_000.0, "12k", "12,000"),
        (1_500.0, "1500", "1,500"),
        (2.5e6, "2.5M", "2,500,000"),
        (0.00003, "3e-5", "3.000e-05"),
        (0.1 + 0.2, "0.3", "0.3"),
        (123456.78, "123.5k", "123,457"),
    ],
)
def test_numbers_are_short_on_axes_and_exact_in_keys(value: float, on_axis: str, told: str) -> None:
    assert (short(value), exact(value)) == (on_axis, told)
