"""Samples and pictures of a run."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from cantata.tools.report.samples import EVALUATIONS, SAMPLES, SHEET, SHEETS, Said, cut, read_samples
from tests.tools.report.runs import EVIL, make_samples, write_lines


def test_a_sample_has_what_was_said_at_each_evaluation(tmp_path: Path) -> None:
    make_samples(tmp_path)
    found = read_samples(tmp_path)
    [shown] = found.shown
    assert (shown.key, shown.truth) == (f"emoji:{EVIL}", EVIL)
    assert shown.said == [Said(0, EVIL, False), Said(12, "a cat\u202e", True)]
    assert len(shown.images) == 1
    assert shown.images[0].startswith("data:image/png;base64,")
    [sheet] = found.sheets
    assert (sheet.step, sheet.width, sheet.height) == (12, 30, 20)
    assert (found.samples, found.evaluations, found.pictures) == (1, 2, 1)


def test_nothing_outside_of_the_folder_is_read(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    folder = tmp_path / "samples"
    (folder / "pictures").mkdir(parents=True)
    (folder / "pictures" / "link.png").symlink_to(tmp_path / "x.png")
    names = ["../x.png", str(tmp_path / "x.png"), "pictures/link.png", "pictures/none.png"]
    write_lines(
        folder / "step-00000001.jsonl", [{"sample": "a", "truth": "b", "caption": "c", "images": names}]
    )
    found = read_samples(folder)
    assert found.shown[0].images == []
    assert [problem.count("lies outside") for problem in found.problems] == [1, 1, 1, 0]


def test_only_so_many_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    records = [{"sample": f"s:{n}", "truth": "t", "caption": "c"} for n in range(20)]
    for step in range(9):
        write_lines(tmp_path / f"step-{step:08d}.jsonl", records)
        Image.new("RGB", (2 * SHEET, 10)).save(tmp_path / f"step-{step:08d}.png")
    found = read_samples(tmp_path)
    assert (len(found.shown), found.samples, found.evaluations) == (SAMPLES, 20, 9)
    assert [said.step for said in found.shown[0].said] == [0, 2, 4, 6, 8]
    assert len(found.shown[0].said) == EVALUATIONS
    assert (len(found.sheets), found.pictures, found.sheets[-1].step) == (SHEETS, 9, 8)
    assert found.sheets[0].width == SHEET


def test_broken_lines_and_pictures_are_told(tmp_path: Path) -> None:
    (tmp_path / "step-00000001.jsonl").write_text(json.dumps({"sample": "a", "caption": "c"}) + "\n{\n[]\n")
    (tmp_path / "step-00000001.png").write_text("no picture")
    found = read_samples(tmp_path)
    assert [shown.truth for shown in found.shown] == [""]
    assert "2 broken lines left out" in found.problems[0]
    assert "step-00000001.png cannot be read" in found.problems[1]


def test_long_texts_are_cut_with_a_word() -> None:
    assert cut("x" * 1300) == "x" * 300 + " ... 1,000 more letters"
    assert cut("short") == "short"
