"""A chart as the page draws it: axes that fit its lines, and the lines as paths.

The page stretches a drawing of `WIDTH` by `HEIGHT` units to its box and writes the axes' texts beside it, so
that they keep their size on every screen.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cantata.tools.report.metrics import Series
from cantata.tools.report.series import Axis, axis_of, exact, round_marks, short, thin

WIDTH, HEIGHT = 4000, 1000
COLOURS = 8
"""Colours of runs; from then on they come again with another dash."""
DOTTED = 24
"""Up to so many points each one is seen."""
LAYER_BUCKETS = 80
TRAIN, RAW, MEAN, HELD_OUT, OF_LAYER = "train", "raw", "mean", "held", "layer"
"""Kinds of lines; `RAW` is training's where its running mean is drawn over it."""
COUNTS = r"tokens|target_tokens|images|questions"
AMOUNT = re.compile(
    rf"(^|/)({COUNTS}|\w*_seconds|\w*_per_device|memory_gib|mfu|usage|accuracy|\w*_share)($|/)"
)
"""Names of values that are read from zero."""
COUNT = re.compile(rf"(^|/)({COUNTS})$")
"""Names of what grows with the steps, or stays: never on a logarithmic axis."""


class Drawn(NamedTuple):
    """A series on its way into a chart."""

    label: str
    run: int
    kind: str
    series: Series
    tint: float | None = None


class Line(NamedTuple):
    """A line of a chart, and its key."""

    label: str
    kind: str
    colour: int
    dash: int
    tint: float | None
    """Place among layers from 0 to 1; None of other lines."""
    path: str
    """In `WIDTH` by `HEIGHT` units."""
    dots: str
    """Its points, where they are few."""
    points: str
    """`step value` pairs for those who point at them; `-` is a gap."""
    last: str


class Chart(NamedTuple):
    """One picture."""

    title: str
    remark: str
    lines: list[Line]
    y_marks: list[tuple[float, str]]
    """Place from 0 at the bottom to 1 at the top, and text."""
    x_marks: list[tuple[float, str]]
    spoken: str
    """For those who cannot see it."""
    is_wide: bool = False


def chart_of(title: str, drawn: Sequence[Drawn], last: int, alone: bool, remark: str = "") -> Chart:
    """Draw series, each with a finite value, over one another.

    Args:
        title: the value's name, which decides whether its axis begins at zero.
        last: the step at the right edge.
        alone: whether the page tells of one run; then held out has a colour of its own, else each run has.
    """
    values = np.concatenate([one.series.finite for one in drawn])
    axis = axis_of(values, AMOUNT.search(title) is not None, may_be_log=COUNT.search(title) is None)
    lines = [_line(one, axis, last, int(one.kind == HELD_OUT) if alone else one.run) for one in drawn]
    remarks = [remark, "log scale"] if axis.is_log else [remark]
    x_marks = [(step / last, short(step)) for step in round_marks(0, last) if step == int(step)]
    spoken = f"{title} over {last:,} steps: " + "; ".join(
        f"{one.label} {_spoken(one.series)}" for one in drawn
    )
    return Chart(
        title, ", ".join(filter(None, remarks)), lines, axis.marks(), x_marks, spoken, title == "loss"
    )


def _spoken(series: Series) -> str:
    found = series.finite
    return (
        f"from {exact(found[0])} to {exact(found[-1])}, between {exact(found.min())} and {exact(found.max())}"
    )


def _line(one: Drawn, axis: Axis, last: int, colour: int) -> Line:
    series = thin(one.series, LAYER_BUCKETS) if one.kind == OF_LAYER else thin(one.series)
    x = np.rint(series.steps / last * WIDTH).astype(int)
    y = np.rint((1 - axis.place(series.values)) * HEIGHT)
    path, dots, is_open = [], [], False
    for across, down in zip(x.tolist(), y.tolist(), strict=True):
        if down != down:
            is_open = False
            continue
        # A line of no length is a dot: a value between two gaps is seen.
        path.append(f"{'L' if is_open else 'M'}{across} {down:.0f}" + ("" if is_open else "h0"))
        dots.append(f"M{across} {down:.0f}h0")
        is_open = True
    points = ",".join(
        f"{step} {f'{value:.6g}' if value == value else '-'}"
        for step, value in zip(series.steps.tolist(), series.values.tolist(), strict=True)
    )
    known = one.series.last
    return Line(
        one.label,
        one.kind,
        colour % COLOURS,
        colour // COLOURS % 3,
        one.tint,
        "".join(path),
        "".join(dots) if len(dots) <= DOTTED else "",
        points,
        "-" if known is None else exact(known),
    )
