"""Which charts a page has: every value of `metrics.jsonl` in one of them, runs over one another."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from cantata.tools.report.lines import HELD_OUT, MEAN, OF_LAYER, RAW, TRAIN, Chart, Drawn, chart_of
from cantata.tools.report.metrics import EVAL, Metrics, Series
from cantata.tools.report.series import running_mean

SMOOTHED = 60
"""Steps from which on the loss gets a running mean, over a `SMOOTHING`th of them."""
SMOOTHING = 20

LOSSES, OPTIMIZER, SPEED = "Losses", "Optimizer", "Speed and memory"
EVALUATION, OTHERS, LAYERS = "Evaluation", "More values", "Experts, layer by layer"
DATA_SHARE = "data_share"
OF_GROUP = {
    "learning_rate": OPTIMIZER,
    "grad_norm": OPTIMIZER,
    "tokens_per_second_per_device": SPEED,
    "step_seconds": SPEED,
    DATA_SHARE: SPEED,
    "data_seconds": SPEED,
    "memory_gib": SPEED,
    "mfu": SPEED,
    "tokens": SPEED,
    "target_tokens": SPEED,
}
APART = {f"{EVAL}target_tokens"}
"""Held-out values that are not of the same kind as training's of that name."""
ORDER = (LOSSES, EVALUATION, OPTIMIZER, SPEED)
LOSS = re.compile(rf"({EVAL})?loss(/|$)")
LAYER = re.compile(r"(.+)/layer_(\d+)")


class Group(NamedTuple):
    """Charts under one heading."""

    title: str
    charts: list[Chart]
    is_folded: bool


def with_data_share(metrics: Metrics) -> dict[str, Series]:
    """The series, and the share of a step that waited for data."""
    found = dict(metrics.series)
    if "data_seconds" in found and "step_seconds" in found:
        waits, took = found["data_seconds"], found["step_seconds"]
        steps, ours, theirs = np.intersect1d(waits.steps, took.steps, return_indices=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = waits.values[ours] / took.values[theirs]
        found[DATA_SHARE] = Series(steps, np.where(np.isfinite(share), share, np.nan))
    return found


def charts_of(runs: Mapping[str, Metrics]) -> list[Group]:
    """Every value that was ever finite, of runs by label; charts share their steps."""
    series = {label: with_data_share(metrics) for label, metrics in runs.items()}
    alone = len(runs) == 1
    last = max([1, *(metrics.last_step for metrics in runs.values())])
    names = dict.fromkeys(name for found in series.values() for name, one in found.items() if len(one.finite))
    groups: dict[str, list[Chart]] = {title: [] for title in ORDER}
    layered = dict.fromkeys(match[1] for name in names if (match := LAYER.fullmatch(name)))
    for name in names:
        if LAYER.fullmatch(name) or _is_drawn_with_training(name, names):
            continue
        drawn = [
            one for run, label in enumerate(series) for one in _drawn(name, run, label, series[label], alone)
        ]
        groups.setdefault(_group(name), []).append(chart_of(name, drawn, last, alone))
    for base in layered:
        for run, label in enumerate(series):
            drawn = _layers(base, run, series[label])
            if drawn:
                groups.setdefault(LAYERS, []).append(
                    chart_of(base, drawn, last, alone, "" if alone else label)
                )
    return [Group(title, _sorted(charts), _is_folded(title)) for title, charts in groups.items() if charts]


def _group(name: str) -> str:
    if LOSS.match(name):
        return LOSSES
    if name.startswith(EVAL):
        return EVALUATION
    head, slash, _ = name.partition("/")
    return OF_GROUP.get(name) or (head.replace("_", " ").capitalize() if slash else OTHERS)


def _is_folded(title: str) -> bool:
    return title not in (*ORDER, OTHERS)


def _sorted(charts: list[Chart]) -> list[Chart]:
    known = {name: place for place, name in enumerate(("loss", *OF_GROUP))}
    return sorted(charts, key=lambda chart: known.get(chart.title, len(known)))


def _is_drawn_with_training(name: str, names: Iterable[str]) -> bool:
    return name.startswith(EVAL) and name.removeprefix(EVAL) in names and name not in APART


def _drawn(name: str, run: int, label: str, found: Mapping[str, Series], alone: bool) -> list[Drawn]:
    """A run's lines of a chart: training, its running mean, held out."""
    drawn = []

    def add(part: str, kind: str, series: Series, is_first: bool = False) -> None:
        of_run = label if is_first else f"{label}, {part}"
        drawn.append(Drawn(part if alone else of_run, run, kind, series))

    series, held = found.get(name), found.get(EVAL + name)
    if series is not None and len(series.finite):
        is_smoothed = name == "loss" and len(series.steps) >= SMOOTHED
        if name.startswith(EVAL):
            add("held out", HELD_OUT, series, is_first=True)
        else:
            add(
                "training" if LOSS.match(name) else "last",
                RAW if is_smoothed else TRAIN,
                series,
                is_first=True,
            )
        if is_smoothed:
            window = len(series.steps) // SMOOTHING
            add(f"mean of {window} lines", MEAN, running_mean(series, window))
    if EVAL + name not in APART and held is not None and len(held.finite):
        add("held out", HELD_OUT, held)
    return drawn


def _layers(base: str, run: int, found: Mapping[str, Series]) -> list[Drawn]:
    numbered = {
        int(match[2]): series
        for name, series in found.items()
        if (match := LAYER.fullmatch(name)) and match[1] == base and len(series.finite)
    }
    last = max([1, *numbered])
    return [
        Drawn(f"layer {layer}", run, OF_LAYER, series, layer / last)
        for layer, series in sorted(numbered.items(), key=lambda one: one[0])
    ]
