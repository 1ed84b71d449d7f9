"""What was written beside weights, read again: the same tokens and patches, or a line on what is missing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cantata.core.errors import ConfigError
from cantata.core.samples import Chat, Document, Example, Message
from cantata.models.aria.config import AriaProjectorConfig
from cantata.models.aria.hf import AriaLayout
from cantata.models.aria.hub_processor import write_processor
from cantata.models.aria.hub_reader import read_processor
from cantata.models.aria.processor import AriaProcessor
from tests.data.helpers import mini_processor
from tests.models.aria.small import small_layout

SIZES = {
    "image_size": 490,
    "min_image_size": 336,
    "patch_size": 14,
    "position_grid": 70,
    "features_per_image": 128,
}
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
EXAMPLES: list[Example] = [
    Document(("Is't naïve? ", PHOTO, " <|im_end|> 😀")),
    Chat((Message("system", ("Be brief.",)), Message("user", (PHOTO, "What?\n", PHOTO)))),
    Chat((Message("user", ("  hi ",)), Message("assistant", ("ho",)), Message("user", ("<|img|>",)))),
]


def layout(side: int = 980, patch: int = 14, **queries: int) -> AriaLayout:
    small = small_layout(vocab_size=6144, eos_token_id=0, pad_token_id=1)
    vision = replace(small.vision, image_size=side, patch_size=patch)
    known = {int(key[1:]): value for key, value in queries.items()} or {1225: 128, 4900: 256}
    return small._replace(vision=vision, projector=AriaProjectorConfig(known, 0.02))


def folder(path: Path, **changes: Any) -> AriaProcessor:
    processor = mini_processor(**(SIZES | changes))
    write_processor(processor, layout().projector, path)
    return processor


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def assert_same(found: AriaProcessor, expected: AriaProcessor) -> None:
    assert found.stop_token_ids == expected.stop_token_ids
    assert (found.pad_token_id, found.image_token_id) == (expected.pad_token_id, expected.image_token_id)
    for example in EXAMPLES:
        ours, theirs = found.encode_prompt(example), expected.encode_prompt(example)
        assert ours.input_ids_T.tolist() == theirs.input_ids_T.tolist()
        assert len(ours.images) == len(theirs.images)
        for one, other in zip(ours.images, theirs.images, strict=True):
            assert np.array_equal(one.patches_PC, other.patches_PC)
            assert np.array_equal(one.position_ids_P, other.position_ids_P)
            assert one.num_features == other.num_features


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"image_size": 980, "features_per_image": 256},
        {"message_end": "<fim_suffix>", "image_suffix": "<|pad|>"},
    ],
    ids=["490", "980", "names"],
)
def test_what_we_write(tmp_path: Path, changes: dict[str, Any]) -> None:
    expected = folder(tmp_path, **changes)
    found = read_processor(tmp_path, layout())
    assert (found.no_images, found.notes) == ("", [])
    assert_same(found.processor, expected)


def test_what_older_checkpoints_hold(tmp_path: Path) -> None:
    """No template but Aria's ChatML, token names as objects, image settings in the older file alone."""
    expected = folder(tmp_path)
    for name in ("processor_config.json", "chat_template.jinja", "generation_config.json"):
        (tmp_path / name).unlink()
    edit(tmp_path / "tokenizer_config.json", eos_token={"content": "<|endoftext|>"}, pad_token=None)
    found = read_processor(tmp_path, layout())
    assert found.no_images == ""
    assert found.notes == [f"{tmp_path} holds no chat template; conversations are ChatML, as Aria's"]
    assert_same(found.processor, expected)


def test_splitting_is_as_the_files_say(tmp_path: Path) -> None:
    folder(tmp_path)
    edit(tmp_path / "preprocessor_config.json", split_image=True)
    sample = read_processor(tmp_path, layout()).processor.encode_prompt(Document((PHOTO,)))
    assert len(sample.images) > 1


def test_a_transformers_save_with_nested_image_settings(tmp_path: Path) -> None:
    expected = folder(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    assert_same(read_processor(tmp_path, layout()).processor, expected)


def test_text_goes_without_image_settings(tmp_path: Path) -> None:
    expected = mini_processor()
    projector = AriaProjectorConfig({64: 16}, 0.02)
    assert write_processor(expected, projector, tmp_path)
    found = read_processor(tmp_path, layout(64, 8, n64=16))
    assert "holds no preprocessor_config.json or processor_config.json with max_image_size" in found.no_images
    chat = EXAMPLES[2]
    ids = found.processor.encode_prompt(chat).input_ids_T
    assert ids.tolist() == expected.encode_prompt(chat).input_ids_T.tolist()


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("tokenizer.json", None, "the folder holds no tokenizer.json"),
        ("tokenizer_config.json", {"eos_token": "</s>"}, "the tokenizer has no token '</s>'"),
        ("generation_config.json", {"eos_token_id": [0, 99999]}, "no token of the id 99999"),
        ("preprocessor_config.json", {"max_image_size": 700}, "images of 700 pixels have 2500 patches"),
    ],
)
def test_what_is_missing_is_one_line(tmp_path: Path, file: str, changes: Any, message: str) -> None:
    folder(tmp_path)
    if changes is None:
        (tmp_path / file).unlink()
    else:
        edit(tmp_path / file, **changes)
    with pytest.raises(ConfigError, match=message) as error:
        read_processor(tmp_path, layout())
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)
