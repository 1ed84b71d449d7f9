"""From a series to a line of a chart: thinned, on axes with round marks."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cantata.tools.report.metrics import Series

BUCKETS = 300
"""Intervals of a thinned series: about a pixel or two of a chart."""
LOG_RATIO = 100.0
"""From this largest over smallest value on, positive values stand on a logarithmic axis."""
MARGIN = 0.05
"""Of the range, above and below a line."""
MARKS = 5
"""Round numbers on an axis, at most."""


def thin(series: Series, buckets: int = BUCKETS) -> Series:
    """At most about three points for each of `buckets` equal intervals of steps.

    An interval keeps its lowest and its highest value and one gap, if it has any; first and last points stay.
    """
    steps, values = series
    if len(steps) <= 2 * buckets:
        return series
    edges = np.linspace(steps[0], steps[-1] + 1, buckets + 1)
    cuts = np.searchsorted(steps, edges)
    kept = {0, len(steps) - 1}
    for start, end in pairwise(cuts):
        part = values[start:end]
        gaps = np.isnan(part)
        if gaps.any():
            kept.add(int(start + gaps.argmax()))
        if not gaps.all():
            kept |= {int(start + np.nanargmin(part)), int(start + np.nanargmax(part))}
    places = sorted(kept)
    return Series(steps[places], values[places])


def running_mean(series: Series, window: int) -> Series:
    """Each value's mean with those of up to `window` points before it, gaps left out."""
    known = np.isfinite(series.values)
    sums = np.cumsum(np.where(known, series.values, 0.0))
    counts = np.cumsum(known)
    sums[window:] -= sums[:-window].copy()
    counts[window:] -= counts[:-window].copy()
    with np.errstate(invalid="ignore"):
        return Series(series.steps, np.where(known, sums / counts, np.nan))


class Axis(NamedTuple):
    """What a chart shows from bottom to top."""

    low: float
    high: float
    is_log: bool = False

    def place(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """0 at the bottom, 1 at the top."""
        if self.is_log:
            return np.log(values / self.low) / math.log(self.high / self.low)
        return (values - self.low) / (self.high - self.low)

    def marks(self) -> list[tuple[float, str]]:
        """Round values on it: (place from 0 to 1, text)."""
        values = _decades(self.low, self.high) if self.is_log else round_marks(self.low, self.high)
        places = self.place(np.array(values, np.float64))
        return [(float(place), short(value)) for place, value in zip(places, values, strict=True)]


def axis_of(values: NDArray[np.float64], from_zero: bool, may_be_log: bool = True) -> Axis:
    """Of finite values, at least one; `from_zero` for what is read as an amount."""
    low, high = float(values.min()), float(values.max())
    if may_be_log and low > 0 and high / low > LOG_RATIO:
        slack = (high / low) ** MARGIN
        return Axis(low / slack, high * slack, is_log=True)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    slack = (high - low) * MARGIN or abs(high) * MARGIN or 1.0
    return Axis(0.0 if from_zero and low == 0 else low - slack, high + slack)


def round_marks(low: float, high: float, count: int = MARKS) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between two values."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    stride = max(1, -(-(last - first + 1) // MARKS))
    return [10.0**power for power in range(first, last + 1, stride)]


def short(value: float) -> str:
    """A value on an axis: 0.25, 12k, 3e-5."""
    size = abs(value)
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= (10 * unit if unit == 1e3 else unit):
            return f"{value / unit:.4g}{letter}"
    if 0 < size < 1e-3:
        mantissa, power = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(power)}"
    return f"{value:.6g}"


def exact(value: float) -> str:
    """A value as it is told: five figures, whole numbers in full."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1e5:
        return f"{value:,.0f}"
    return f"{value:.3e}" if 0 < abs(value) < 1e-3 else f"{value:.5g}"
