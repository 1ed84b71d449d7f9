import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from cantata.core.errors import ConfigError
from cantata.core.locate import asset
from cantata.core.samples import DataError, Document
from cantata.data.sources import CaptionedImages, ImageTextFile, TextDocuments, document_spans
from cantata.data.split import Split
from tests.data.helpers import encoded


def picture(value: int) -> bytes:
    return encoded(Image.new("RGB", (4, 4), (value, 0, 0)))


def write_parquet(path: Path, images: list[object], group_size: int = 3) -> str:
    table = arrow.table({"picture": images, "name": [f"number {i}" for i in range(len(images))]})
    parquet.write_table(table, path, row_group_size=group_size)
    return str(path)


def captioned(path: str, split: Split = Split.all, share: float = 0.0) -> CaptionedImages:
    return CaptionedImages(path, "picture", "{name}!", split, share)


def test_every_row_over_row_groups(tmp_path: Path) -> None:
    dataset = captioned(write_parquet(tmp_path / "a.parquet", [picture(10 * i) for i in range(8)]))
    for index in (7, 0, 3, 2, 6):
        image, caption = dataset[index].parts
        assert image.getpixel((0, 0)) == (10 * index, 0, 0)
        assert caption == f"number {index}!"


def test_struct_images_and_broken_rows(tmp_path: Path) -> None:
    images = [{"bytes": picture(5), "path": None}, {"bytes": picture(5)[:40], "path": None}, None]
    dataset = captioned(write_parquet(tmp_path / "a.parquet", images))
    assert dataset[0].parts[0].getpixel((0, 0)) == (5, 0, 0)
    with pytest.raises(DataError, match="corrupt image"):
        dataset[1]
    with pytest.raises(DataError, match="missing image"):
        dataset[2]


def test_splits_part_the_embedded_emoji() -> None:
    sizes = [
        len(CaptionedImages("embedded:twemoji.parquet", "image", "{name} ({subgroup})", split, 0.05))
        for split in (Split.train, Split.held_out, Split.all)
    ]
    assert sizes[0] + sizes[1] == sizes[2] == 1906
    first = CaptionedImages("embedded:twemoji.parquet", "image", "{name} ({subgroup})", Split.all, 0)[1]
    assert first.parts[1] == "smiling face with open mouth (face-smiling)"
    assert first.parts[0].size == (64, 64)


def test_bad_files_are_config_errors(tmp_path: Path) -> None:
    (tmp_path / "not.parquet").write_text("hello")
    with pytest.raises(ConfigError, match="no readable parquet"):
        captioned(str(tmp_path / "not.parquet"))
    with pytest.raises(ConfigError, match="absent"):
        captioned(str(tmp_path / "absent.parquet"))
    with pytest.raises(ConfigError, match="absent"):
        TextDocuments(str(tmp_path / "absent.txt"), 10, Split.all, 0)
    with pytest.raises(ConfigError, match="folder"):
        ImageTextFile(str(tmp_path), Split.all, 0)
    path = write_parquet(tmp_path / "a.parquet", [picture(1)])
    with pytest.raises(ConfigError, match="no column 'title'; it has name, picture"):
        CaptionedImages(path, "picture", "{title}", Split.all, 0)


def test_documents_are_whole_paragraphs() -> None:
    text = b"\n\none one\none\n\ntwo\n \nthree\n\n\nfour four four four\nfour\n\nfive\n"
    pieces = [text[start:end] for start, end in document_spans(text, 16)]
    assert pieces == [b"one one\none\n\ntwo", b"three", b"four four four four", b"four\n\nfive"]
    assert document_spans(b" \n\n ", 5).shape == (0, 2)


def test_documents_hold_the_whole_text() -> None:
    path = "embedded:tinyshakespeare.txt"
    dataset = TextDocuments(path, 800, Split.all, 0)
    documents = [dataset[index].parts[0] for index in range(len(dataset))]
    assert "".join("".join(documents).split()) == "".join(asset(path).read_text().split())
    assert max(len(document.encode()) for document in documents) <= 800


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\n\n\xff\xfe\n\n" + "schön".encode())
    dataset = TextDocuments(str(path), 5, Split.all, 0)
    assert dataset[0] == Document(("fine",))
    assert dataset[2] == Document(("schön",))
    with pytest.raises(DataError, match="not UTF-8"):
        dataset[1]


def test_image_text_file(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(picture(255))
    lines = [
        json.dumps({"image": "red.png", "text": "red"}),
        "",
        json.dumps({"text": "nur Text: ä"}, ensure_ascii=False),
        json.dumps({"image": ["red.png", "red.png"], "text": "two"}),
        "{broken",
        json.dumps({"image": "gone.png", "text": "x"}),
        json.dumps({"image": 3, "text": "x"}),
        json.dumps(["x"]),
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    dataset = ImageTextFile(str(path), Split.all, 0)
    assert len(dataset) == 7
    assert dataset[0].parts[0].getpixel((0, 0)) == (255, 0, 0)
    assert dataset[1] == Document(("nur Text: ä",))
    assert len(dataset[2].parts) == 3
    reasons = ["invalid JSON", "missing file", "no image path", "no text"]
    for index, reason in enumerate(reasons, start=3):
        with pytest.raises(DataError, match=reason):
            dataset[index]


def test_image_paths_stay_inside_the_folder(tmp_path: Path) -> None:
    (tmp_path / "out.png").write_bytes(picture(1))
    (tmp_path / "set/deep").mkdir(parents=True)
    (tmp_path / "set/deep/in.png").write_bytes(picture(2))
    (tmp_path / "set/link.png").symlink_to(tmp_path / "out.png")
    (tmp_path / "behind").symlink_to(tmp_path / "set")
    inside = ["deep/in.png", "deep/../deep/in.png", str(tmp_path / "set/deep/in.png")]
    outside = ["../out.png", str(tmp_path / "out.png"), "link.png", "https://example.org/out.png"]
    lines = "\n".join(json.dumps({"text": "x", "image": name}) for name in [*inside, *outside])
    (tmp_path / "set/data.jsonl").write_text(lines)
    for folder in ("set", "behind"):
        dataset = ImageTextFile(str(tmp_path / folder / "data.jsonl"), Split.all, 0)
        for index in range(len(inside)):
            assert dataset[index].parts[0].getpixel((0, 0)) == (2, 0, 0)
        for index in range(len(inside), len(dataset)):
            with pytest.raises(DataError, match=r"path outside the root|remote file"):
                dataset[index]


def read_in_child(datasets: list[Any], index: int, answers: "multiprocessing.Queue[list[Any]]") -> None:
    answers.put([dataset[index].parts[-1] for dataset in datasets])


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_other_processes_open_their_own_file(method: str, tmp_path: Path) -> None:
    """A shared file offset would mix up two readers; a handle in the pickle would fail."""
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(f"paragraph {i}" for i in range(50)))
    datasets = [
        TextDocuments(str(path), 10, Split.all, 0),
        captioned(write_parquet(tmp_path / "a.parquet", [picture(i) for i in range(8)])),
    ]
    context = multiprocessing.get_context(method)
    assert [dataset[3].parts[-1] for dataset in datasets] == ["paragraph 3", "number 3!"]
    answers = context.Queue()
    child = context.Process(target=read_in_child, args=(datasets, 4, answers))
    child.start()
    assert answers.get(timeout=60) == ["paragraph 4", "number 4!"]
    child.join()
    assert [dataset[5].parts[-1] for dataset in datasets] == ["paragraph 5", "number 5!"]


def test_pickles_hold_no_data() -> None:
    dataset = CaptionedImages("embedded:twemoji.parquet", "image", "{name}", Split.all, 0)
    before = len(pickle.dumps(dataset))
    dataset[0]
    assert len(pickle.dumps(dataset)) == before < 100_000
