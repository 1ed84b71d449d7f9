"""`cantata inspect` as a command, on the embedded data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cantata.cli import main
from cantata.tools.inspect import spark

QUICK = ("data.window=2", "--rows", "3", "--samples", "2")

SHAPE = {
    "stage": str,
    "name": str,
    "packing": {"rows": int, "sequence_length": int, "row_tokens": int, "tokens": int, "efficiency": float},
    "modalities": {"text": float, "image": float, "video": float},
    "seconds": float,
    "tokens_per_second": float,
    "sources": dict,
    "held_out": {"emoji": int, "plays": int},
    "notes": list,
    "page": str,
}
SOURCE = {
    "samples": int,
    "share": float,
    "read": int,
    "kept": int,
    "dropped": {},
    "tokens": int,
    "target_tokens": int,
    "target_weight": float,
    "images": int,
    "lengths": dict,
}


def shape_of(value: Any, schema: Any) -> Any:
    if isinstance(schema, dict):
        assert isinstance(value, dict)
        return {key: shape_of(item, schema.get(key, type(item))) for key, item in value.items()}
    return type(value)


def figures(capsys: pytest.CaptureFixture[str], to: Path, *arguments: str) -> dict[str, Any]:
    code = main(["inspect", "pretrain", *QUICK, "--json", "--to", str(to / "page.html"), *arguments])
    assert code == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def broken_data(folder: Path) -> tuple[str, ...]:
    """Overrides for a file of good, unreadable and too long samples."""
    lines = [{"text": f"caption number {number}"} for number in range(20)]
    lines[3] = {"text": "gone", "image": "none.png"}
    lines[8] = {"text": "x y z " * 400}
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ("data=image_text", f"data.sources.image_text.dataset.path={path}", "data.streams=1")


def test_json_has_stable_names(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = figures(capsys, tmp_path, "name=trial")
    assert shape_of(found, SHAPE) == SHAPE
    emoji = found["sources"]["emoji"]
    assert shape_of(emoji, SOURCE) == SOURCE
    assert set(emoji["lengths"]) == {"min", "median", "mean", "p95", "max", "edges", "counts"}
    assert sum(emoji["lengths"]["counts"]) == emoji["read"] == emoji["kept"]
    packing = found["packing"]
    assert (packing["rows"], packing["row_tokens"]) == (3, 3 * 512)
    assert packing["tokens"] == sum(source["tokens"] for source in found["sources"].values())
    assert packing["efficiency"] == packing["tokens"] / packing["row_tokens"] > 0.8
    assert sum(found["modalities"].values()) == pytest.approx(1)
    assert emoji["images"] == 2
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_people_read_a_summary(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["inspect", "pretrain", *QUICK, f"out={tmp_path}", "name=trial"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "cantata inspect pretrain: trial",
        "in 3 rows used",
        "tokens/s",
        "plays (held out)",
        "grinning face",
    ):
        assert words in shown
    assert (tmp_path / "inspect.html").is_file()
    assert not (tmp_path / "config.yaml").exists()


def test_what_is_left_out_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = broken_data(tmp_path)
    source = figures(capsys, tmp_path, *data)["sources"]["image_text"]
    reasons = source["dropped"]
    assert set(reasons) == {"missing file", "too long"}
    assert source["kept"] == source["read"] - sum(drop["count"] for drop in reasons.values())
    assert source["lengths"]["max"] > 512
    page = (tmp_path / "page.html").read_text()
    for reason, drop in reasons.items():
        assert f"({reason})" in page
        assert f"image_text:{drop['examples'][0]}" in page


def test_what_would_stop_training_is_a_note(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = (*broken_data(tmp_path), "data.sources.image_text.on_error=raise")
    [*_, note] = figures(capsys, tmp_path, *data)["notes"]
    assert note.startswith("training would stop")
    assert "missing file" in note
    data = (*broken_data(tmp_path), "data.sources.image_text.max_skipped=0.01")
    [note] = figures(capsys, tmp_path, *data)["notes"]
    assert "more than its max_skipped=0.01 would stop training" in note


def test_a_row_too_short_for_anything_still_gives_a_page(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = figures(capsys, tmp_path, *broken_data(tmp_path), "train.sequence_length=2")
    assert found["packing"]["rows"] == 0
    assert "the last" in found["notes"][0]
    assert "No sample of it could be read." in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "cantata inspect: the following arguments are required: STAGE"),
        (("pretrian",), "pretrian is no stage that can be inspected; nearest: pretrain"),
        (("pretrain", "--rows", "0"), "cantata inspect: argument --rows: '0' must be a number above 0"),
        (("pretrain", "--samples", "two"), "cantata inspect: argument --samples: 'two' must be"),
        (("pretrain", "data.windw=3"), "override 'data.windw=3': data.windw is not a known key"),
        (("pretrain", "data=text"), "configs/data/text.yaml: data.sources.text.dataset.path must be given"),
        (
            ("pretrain", "data=text", "data.sources.text.dataset.path=none.txt"),
            "data.sources.text.dataset: none.txt: no such file",
        ),
        (("pretrain", "collator.processor.patch_size=16"), "collator"),
        (
            ("pretrain", *QUICK, "--to", "/dev/null/page.html"),
            "/dev/null/page.html: the page cannot be written",
        ),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {line}")
    assert shown.err.count("\n") == 1


def test_a_histogram_in_a_line() -> None:
    assert spark([0, 1, 0, 1000]) == " ▁ █"
    assert len(spark([1] * 32)) == 16
    assert spark([0] * 32).strip() == ""
