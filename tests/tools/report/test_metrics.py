"""`metrics.jsonl` as series, however it ended."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cantata.tools.report.metrics import Restart, read_metrics
from tests.tools.report.runs import record, write_lines


def test_values_stand_at_their_steps(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 3.0, "eval/initial/loss": 4.0}, {"step": 5, "loss": 2, "eval/loss": 1.5}]
    found = read_metrics(write_lines(tmp_path / "m.jsonl", rows))
    assert (found.lines, found.last_step, found.broken) == (2, 5, 0)
    assert found.series["loss"].steps.tolist() == [1, 5]
    assert found.series["loss"].values.tolist() == [3.0, 2.0]
    assert found.series["eval/loss"].steps.tolist() == [0, 5]
    assert found.series["eval/loss"].values.tolist() == [4.0, 1.5]


@pytest.mark.parametrize("tail", [b'{"step": 3, "lo', b'{"step": 3, "loss": 1.0', b"\xff\xfe"])
def test_a_cut_last_line_is_counted(tmp_path: Path, tail: bytes) -> None:
    path = write_lines(tmp_path / "m.jsonl", [record(1, 3.0), record(2, 2.0)])
    path.write_bytes(path.read_bytes() + tail)
    found = read_metrics(path)
    assert (found.lines, found.last_step, found.broken, found.is_cut) == (2, 2, 1, True)


def test_what_is_no_line_of_metrics_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    bad = ["[]", "7", '{"loss": 1}', '{"step": true}', '{"step": 1.5}', '{"step": -1}', '{"step": 1e99}', ""]
    deep = "[" * 100_000
    path.write_text("\n".join([*bad, deep, json.dumps(record(9, 1.0))]) + "\n")
    found = read_metrics(path)
    assert (found.lines, found.last_step, found.broken, found.is_cut) == (1, 9, len(bad) + 1, False)


def test_steps_lived_again_replace_those_of_before(tmp_path: Path) -> None:
    first = [record(step, float(step)) for step in range(1, 8)]
    first[6]["eval/loss"] = 99.0
    again = [record(step, -float(step)) for step in range(5, 7)]
    found = read_metrics(write_lines(tmp_path / "m.jsonl", [*first, *again]))
    assert found.restarts == [Restart(5, 3)]
    assert found.series["loss"].steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert found.series["loss"].values.tolist() == [1, 2, 3, 4, -5, -6]
    assert "eval/loss" not in found.series, "step 7 has not been lived again"
    assert (found.lines, found.last_step) == (6, 6)


def test_a_run_begun_anew_has_one_first_evaluation(tmp_path: Path) -> None:
    rows = [record(1, 1.0) | {"eval/initial/loss": 5.0}, record(1, 2.0) | {"eval/initial/loss": 6.0}]
    held_out = read_metrics(write_lines(tmp_path / "m.jsonl", rows)).series["eval/loss"]
    assert (held_out.steps.tolist(), held_out.values.tolist()) == ([0], [6.0])


def test_what_is_not_finite_is_a_gap(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    values = ["1", "null", "NaN", "-Infinity", "1" + "0" * 400, "2"]
    path.write_text(
        "".join(f'{{"step": {n}, "loss": {value}, "mfu": null}}\n' for n, value in enumerate(values))
    )
    found = read_metrics(path)
    assert np.isnan(found.series["loss"].values).tolist() == [False, True, True, True, True, False]
    assert found.without_value() == {"loss": 4}
    assert found.never_known() == ["mfu"]
    assert found.series["loss"].last == 2


def test_what_is_no_number_is_counted(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": "low", "flag": True, "list": [1], "norm": 1.0}]
    found = read_metrics(write_lines(tmp_path / "m.jsonl", rows))
    assert (list(found.series), found.not_numbers) == (["norm"], 3)


def test_an_empty_file_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").touch()
    found = read_metrics(tmp_path / "m.jsonl")
    assert (found.series, found.lines, found.last_step) == ({}, 0, 0)
