"""Which charts there are, and what their lines say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cantata.tools.report.charts import EVALUATION, LAYERS, LOSSES, OPTIMIZER, OTHERS, SPEED, charts_of
from cantata.tools.report.lines import HEIGHT, WIDTH, Line
from cantata.tools.report.metrics import Metrics, Series, read_metrics
from tests.tools.report.runs import lines, record, write_lines


@pytest.fixture
def metrics(tmp_path: Path) -> Metrics:
    return read_metrics(write_lines(tmp_path / "m.jsonl", lines(12)))


def of_series(**series: list[float]) -> Metrics:
    found = {
        name: Series(np.arange(1, len(values) + 1), np.array(values, np.float64))
        for name, values in series.items()
    }
    return Metrics(found, lines=1, last_step=max(len(values) for values in series.values()))


def points(line: Line) -> dict[int, str]:
    pairs = [pair.split(" ") for pair in line.points.split(",")]
    return {int(step): value for step, value in pairs}


def test_every_value_has_a_chart_in_its_group(metrics: Metrics) -> None:
    groups = {group.title: [chart.title for chart in group.charts] for group in charts_of({"run": metrics})}
    assert groups == {
        LOSSES: ["loss", "loss/text"],
        EVALUATION: ["eval/accuracy"],
        OPTIMIZER: ["learning_rate", "grad_norm"],
        SPEED: [
            *("tokens_per_second_per_device", "step_seconds", "data_share", "data_seconds", "memory_gib"),
            *("tokens", "target_tokens"),
        ],
        "Experts": ["experts/load_max"],
        LAYERS: ["experts/load_max"],
    }
    folded = {group.title: group.is_folded for group in charts_of({"run": metrics})}
    assert [title for title, is_folded in folded.items() if is_folded] == ["Experts", LAYERS]


def test_held_out_stands_beside_training(metrics: Metrics) -> None:
    loss = charts_of({"run": metrics})[0].charts[0]
    assert [(line.label, line.kind, line.colour) for line in loss.lines] == [
        ("training", "train", 0),
        ("held out", "held", 1),
    ]
    assert points(loss.lines[1]) == {0: "9", 12: "2.5"}
    assert loss.lines[1].last == "2.5"
    assert loss.is_wide
    assert "held out from 9 to 2.5" in loss.spoken


def test_runs_lie_over_one_another_each_in_its_colour(metrics: Metrics) -> None:
    other = of_series(loss=[3.0, 2.0], perplexity=[5.0, 6.0])
    runs = {"one": metrics, "two": other} | {f"run {n}": of_series(loss=[1.0, 2.0]) for n in range(8)}
    groups = {group.title: group.charts for group in charts_of(runs)}
    labels = [line.label for line in groups[LOSSES][0].lines]
    assert labels[:3] == ["one", "one, held out", "two"]
    looks = {(line.colour, line.dash) for line in groups[LOSSES][0].lines if line.kind == "train"}
    assert len(looks) == len(runs)
    [perplexity] = groups[OTHERS]
    assert [(line.label, line.colour) for line in perplexity.lines] == [("two", 1)]
    # Alone in its chart, it keeps the colour of its run.
    assert {line.colour for line in groups[EVALUATION][0].lines} == {0}
    assert [chart.remark for chart in groups[LAYERS]] == ["one"]


def test_a_path_goes_through_its_points_and_breaks_at_gaps() -> None:
    [chart] = charts_of({"run": of_series(loss=[1.0, 3.0, np.nan, 2.0, np.nan, 2.0])})[0].charts
    [line] = chart.lines
    x = [round(step / 6 * WIDTH) for step in (1, 2, 4, 6)]
    low, high, middle = 955, 45, HEIGHT // 2
    assert line.path == f"M{x[0]} {low}h0L{x[1]} {high}M{x[2]} {middle}h0M{x[3]} {middle}h0"
    assert points(line) == {1: "1", 2: "3", 3: "-", 4: "2", 5: "-", 6: "2"}


def test_long_losses_get_a_running_mean() -> None:
    charts = charts_of({"run": of_series(loss=[float(step % 2) for step in range(200)])})[0].charts
    raw, mean = charts[0].lines
    assert (raw.kind, mean.kind, mean.label) == ("raw", "mean", "mean of 10 lines")
    assert mean.last == "0.5"


def test_the_share_of_waiting_is_told(metrics: Metrics) -> None:
    speed = {chart.title: chart for group in charts_of({"run": metrics}) for chart in group.charts}
    assert speed["data_share"].lines[0].last == "0.1"


def test_layers_are_lines_of_one_chart(metrics: Metrics) -> None:
    layers = charts_of({"run": metrics})[-1].charts[0]
    assert [(line.label, line.tint, line.last) for line in layers.lines] == [
        ("layer 0", 0.0, "1"),
        ("layer 1", 0.5, "2"),
        ("layer 2", 1.0, "3"),
    ]


@pytest.mark.parametrize("rows", [[], [record(1, None) | {"grad_norm": None}]])
def test_a_run_without_values_has_no_empty_charts(tmp_path: Path, rows: list[dict[str, float]]) -> None:
    groups = charts_of({"run": read_metrics(write_lines(tmp_path / "m.jsonl", rows))})
    assert all(line.path for group in groups for chart in group.charts for line in chart.lines)
    assert not {"loss", "mfu", "grad_norm"} & {chart.title for group in groups for chart in group.charts}


def test_one_step_is_a_dot() -> None:
    [chart] = charts_of({"run": of_series(loss=[2.0])})[0].charts
    assert chart.lines[0].dots == f"M{WIDTH} {HEIGHT // 2}h0"
    assert chart.x_marks[-1] == (1.0, "1")
