"""What the page leaves out, said."""

from __future__ import annotations

from pathlib import Path

from cantata.tools.report.notes import notes
from cantata.tools.report.run import read_runs
from tests.tools.report.runs import make_counts, make_run, record, write_lines


def told(path: Path) -> list[str]:
    return notes(*read_runs([path]))


def test_a_page_that_shows_all_says_little(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    (path / "samples" / "step-00000000.jsonl").unlink()
    (path / "samples" / "step-00000012.jsonl").unlink()
    assert told(path) == ["never known: mfu"]


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    rows = [record(step, 1.0) | {"mfu": 0.5, "name": "text"} for step in range(1, 1001)]
    write_lines(path / "metrics.jsonl", rows)
    make_counts(path / "experts" / "counts.npy", 1000, intervals=50)
    samples = [{"sample": f"s:{n}", "caption": "c", "truth": "t"} for n in range(15)]
    for step in range(1, 8):
        write_lines(path / "samples" / f"step-{step:08d}.jsonl", samples)
    (path / "samples" / "step-00000012.jsonl").unlink()
    (path / "samples" / "step-00000000.jsonl").unlink()
    assert told(path) == [
        "metrics.jsonl: 1,000 values are no numbers and left out",
        "1,000 lines are thinned: charts show the lowest and the highest value of each of 300 intervals, "
        "of layers 80",
        "expert load: 12 of 50 intervals are shown",
        "samples: 12 of 15 are shown, of 5 of 7 evaluations",
    ]


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    (path / "experts" / "counts.npy").write_bytes(b"?")
    (path / "samples" / "step-00000012.png").write_bytes(b"?")
    shown = "\n".join(told(path))
    for words in ("counts.npy cannot be read", "step-00000012.png cannot be read", "x.png lies outside"):
        assert words in shown
