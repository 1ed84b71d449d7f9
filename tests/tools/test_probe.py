"""`cantata probe`: classes of a file, what is asked of which model, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

from cantata import cli
from cantata.core.errors import ConfigError
from cantata.core.types import Segments
from cantata.infer.probe import ProbeSettings, packed
from cantata.models.aimv2.processor import PatchReader
from cantata.models.hub import save_to_hub
from cantata.tools.open_encoder import OpenedEncoder
from cantata.tools.probe import Classes, measure, read_classes
from tests.models.aimv2.small import VISION, contrastive, encoder, pair_processor

COLOURS = ("red", "green", "blue")
SETTINGS = ProbeSettings(steps=1, batch_size=2, learning_rate=1e-3, weight_decay=0.0, seed=0)
READER = PatchReader(16, 4, False, 16)


def encoded(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, images: list[bytes], labels: list[object]) -> str:
    parquet.write_table(arrow.table({"image": images, "colour": labels}), path)
    return str(path)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    colours = [COLOURS[i % 3] for i in range(30)]
    path = tmp_path_factory.mktemp("data") / "colours.parquet"
    return write(path, [encoded(colour) for colour in colours], list(colours))


def test_images_and_the_numbers_of_their_classes(file: str) -> None:
    found = read_classes(file, "image", "colour", 0.2, READER)
    assert found.names == sorted(COLOURS)
    assert len(found.train.images) + len(found.test.images) == 30
    assert 0 < len(found.test.images) < 15
    for part in (found.train, found.test):
        for image, number in zip(part.images, part.classes_I.tolist(), strict=True):
            brightest = image.patches_PC.reshape(-1, 3, 16).sum((0, 2)).argmax()
            assert COLOURS[brightest] == found.names[number]


def test_classes_need_not_be_words(tmp_path: Path) -> None:
    labels: list[object] = [i % 2 for i in range(20)]
    path = write(tmp_path / "numbers.parquet", [encoded("red")] * 20, labels)
    assert read_classes(path, "image", "colour", 0.3, READER).names == ["0", "1"]


def test_files_that_cannot_be_asked(file: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no image is in held_out; change --held-out-share=0"):
        read_classes(file, "image", "colour", 0.0, READER)
    with pytest.raises(ConfigError, match="has no column 'shape'"):
        read_classes(file, "image", "shape", 0.2, READER)
    broken = write(tmp_path / "broken.parquet", [b"no image"] * 9, ["red"] * 9)
    with pytest.raises(ConfigError, match=r"broken\.parquet: row 0 of train: "):
        read_classes(broken, "image", "colour", 0.2, READER)


def opened(pairs: bool, tokenizer: bool = True) -> OpenedEncoder:
    if not pairs:
        model = encoder(VISION)
        return OpenedEncoder(VISION, model.vision, READER, None)
    whole = contrastive()
    reader = pair_processor() if tokenizer else READER
    return OpenedEncoder(whole.vision_config, whole.vision, reader, whole)


@pytest.fixture(scope="module")
def classes(file: str) -> Classes:
    return read_classes(file, "image", "colour", 0.2, READER)


def test_zero_shot_asks_for_the_classes_in_the_text(classes: Classes) -> None:
    """The same as by hand: the text with the name in it that is nearest to the image."""
    model = opened(pairs=True)
    found = measure(model, classes, "a {label} circle", SETTINGS)
    assert model.pairs is not None
    assert 0 <= found <= 1
    rights = 0
    with torch.no_grad():
        texts = [pair_processor().text_ids(f"a {name} circle") for name in classes.names]
        features = torch.cat(
            [
                model.pairs.text_features(torch.tensor(t), torch.arange(len(t)), Segments((len(t),)))
                for t in texts
            ]
        )
        for image, number in zip(classes.test.images, classes.test.classes_I.tolist(), strict=True):
            own = model.pairs.image_features(packed([image], torch.device("cpu")))
            rights += int((own @ features.T).argmax()) == number
    assert found == rights / len(classes.test.images)


@pytest.mark.parametrize(
    ("pairs", "tokenizer", "text", "message"),
    [
        (False, True, "{label}", "wants a contrastive model with its tokenizer"),
        (True, False, "{label}", "wants a contrastive model with its tokenizer"),
        (True, True, "emoji", r"--zero-shot 'emoji' has no \{label\} in it"),
        (True, True, "{label} " * 30, "long text"),
    ],
)
def test_what_cannot_be_asked_by_text(
    pairs: bool, tokenizer: bool, text: str, message: str, classes: Classes
) -> None:
    with pytest.raises(ConfigError, match=message):
        measure(opened(pairs, tokenizer), classes, text, SETTINGS)


def test_the_command(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = encoder(VISION)
    save_to_hub(model, model.hub_layout(), tmp_path / "hub", 10**9)
    given = ["probe", str(tmp_path / "hub"), "--data", file, "--label", "colour", "--held-out-share", "0.2"]
    few = ["--steps", "40", "--batch-size", "8", "--lr", "1e-2"]
    assert cli.main([*given, *few, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["accuracy"] == 1.0, "a colour is plain to see"
    assert shown["classes"] == 3
    assert shown["train_images"] + shown["test_images"] == 30
    assert cli.main([*given, *few]) == 0
    out = capsys.readouterr().out
    assert "100.0% of" in out
    assert "3 classes of colour" in out
    for option in ("--steps", "--batch-size"):
        assert cli.main([*given, option, "0"]) == 2
        assert f"{option}=0 must be at least 1" in capsys.readouterr().err
