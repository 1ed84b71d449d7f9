"""`cantata generate --pdf`: budget, gallery and how pages are read, from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from cantata import cli
from cantata.data.media.pdf import PdfOptions
from cantata.tools import generate as tool
from cantata.tools.open_model import open_model
from cantata.tools.prompts import Prompt, encode
from tests.data.media.test_pdf import document
from tests.tools.test_export import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "run", "+model.projector.patch_to_query={16: 4, 64: 16}")
    (folder / "three.pdf").write_bytes(document([(40, 60), (60, 40), (40, 60)]))
    return folder / "run"


def command(run: Path, *arguments: object) -> int:
    given = ("--prompt", "What?", "--pdf", run.parent / "three.pdf", "--max-new-tokens", 4, *arguments)
    return cli.main(["generate", str(run), *map(str, given)])


def rows(shown: str) -> list[list[str]]:
    """The pages of the table."""
    cells = [[cell.strip() for cell in line.split("│")] for line in shown.splitlines() if "│" in line]
    return [row for row in cells if row[0].isdigit()]


def test_pages_are_split_and_shown_with_their_costs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(run) == 0
    shown = capsys.readouterr()
    assert shown.out.endswith("\n")
    # 80 x 120 pixels at 2x are nearest to 2:3 (7 crops), 120 x 80 to 3:2; 16 tokens a crop.
    assert rows(shown.err) == [
        ["1", "80 x 120", "7", "112", "112"],
        ["2", "120 x 80", "7", "112", "224"],
        ["3", "80 x 120", "7", "112", "336"],
    ]
    assert "three.pdf: 3 pages, 64 px, split into crops" in shown.err
    assert "2,048" in shown.err


def test_pages_sizes_and_whole_pages_are_chosen(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(run, "--pages", "2-", "--image-size", 32, "--no-split") == 0
    found = rows(capsys.readouterr().err)
    assert found == [["2", "120 x 80", "1", "4", "4"], ["3", "80 x 120", "1", "4", "8"]]


def test_pages_keep_the_numbers_of_their_document(run: Path) -> None:
    processor = open_model(run).collator.processor
    pdf = PdfOptions(pages="3,1", scale=1.0, max_pages=9, max_pixels=10**6)
    [sample] = encode([Prompt("x", pdfs=(run.parent / "three.pdf",))], processor, is_chat=False, pdf=pdf)
    text = processor.spell(sample.input_ids_T.tolist()).replace("<|img|>", "")
    assert text == "Page 3: <fim_prefix><fim_suffix>\nPage 1: <fim_prefix><fim_suffix>\nx"


def test_the_gallery_is_saved(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "pages.png"
    assert command(run, "--gallery", file) == 0
    with Image.open(file) as image:
        assert f"gallery: {file}, {image.width} x {image.height}" in capsys.readouterr().err
        assert image.width > 3 * 3 * 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-model-len", "300"), "and max_model_len is 300; choose: --pages 1-2 ("),
        (("--max-model-len", "0"), "max_model_len=0 must be at least 1"),
        (("--max-new-tokens", "2000"), "and the model's positions are 2,048; choose: fewer pages do not"),
        (("--image-size", "490"), "image_size=490: the model reads images of 32 or 64 pixels"),
        (("--pages", "9"), "three.pdf: no such page (9 of 3)"),
        (("--pages", "x"), "pdf.pages='x' is neither `all`"),
        (("--pdf", "none.pdf"), "none.pdf: missing PDF"),
        (("--prompt", "And?", "--gallery", "x.png"), "--gallery shows the pages of one prompt; 2 have a PDF"),
        (("--gallery", "x.unknown"), "x.unknown: the gallery cannot be saved"),
    ],
)
def test_what_is_wrong_is_one_line_before_weights_are_read(
    run: Path,
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tool, "load", None)
    assert command(run, *arguments) in (1, 2)
    shown = capsys.readouterr()
    [line] = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert shown.out == ""


def test_images_alone_are_read_as_asked(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (80, 120), "red").save(run.parent / "red.png")
    counts = []
    for more in ((), ("--split",), ("--split", "--image-size", "32")):
        arguments = ("--prompt", "x", "--image", str(run.parent / "red.png"), "--max-new-tokens", "1", *more)
        assert cli.main(["generate", str(run), *arguments]) == 0
        counts.append(int(capsys.readouterr().err.split(" prompt tokens")[0]))
    assert counts[1] - counts[0] == 6 * 16
    assert counts[2] - counts[0] == 7 * 4 - 16
