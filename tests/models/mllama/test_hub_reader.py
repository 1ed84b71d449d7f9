"""What was written beside weights, read again: the same tokens and tiles."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from cantata.core.errors import ConfigError
from cantata.core.samples import Chat, Document, Message
from cantata.models.mllama import MllamaProcessor
from cantata.models.mllama.hf import MllamaLayout
from cantata.models.mllama.hub_reader import PUBLISHED, read_processor
from tests.models.aria.mixed import SQUARE, WIDE
from tests.models.mllama.mixed import mixed_layout
from tests.models.mllama.small import IMAGE, small_processor, small_text

EXAMPLES = (
    Document((WIDE, "Is't naïve? <|im_end|>", SQUARE)),
    Chat((Message("user", (SQUARE, "What?")), Message("assistant", ("A cat",)))),
)


def assert_same(found: MllamaProcessor, expected: MllamaProcessor) -> None:
    assert found.token_names == expected.token_names
    assert found.stop_token_ids == expected.stop_token_ids
    for example in EXAMPLES:
        one, other = found.encode(example, "s"), expected.encode(example, "s")
        assert one.input_ids_T.tolist() == other.input_ids_T.tolist()
        assert one.weight_T.tolist() == other.weight_T.tolist()
        for image, same in zip(one.images, other.images, strict=True):
            assert np.array_equal(image.patches_PC, same.patches_PC)
            assert np.array_equal(image.position_ids_P, same.position_ids_P)


def test_what_we_write(tmp_path: Path) -> None:
    expected, layout = small_processor(), mixed_layout()
    layout.write_processor(expected, tmp_path)
    found = read_processor(tmp_path, layout)
    assert (found.no_images, found.notes) == ("", [])
    assert_same(found.processor, expected)


def test_without_its_images_or_its_template(tmp_path: Path) -> None:
    expected, layout = small_processor(), mixed_layout()
    layout.write_processor(expected, tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    assert "holds no preprocessor_config.json" in read_processor(tmp_path, layout).no_images
    alone = read_processor(tmp_path, layout._replace(vision=None))
    assert "without its vision tower" in alone.no_images
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"has no token '<\|start_header_id\|>'"):
        read_processor(tmp_path, layout)


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    layout = mixed_layout()
    layout.write_processor(small_processor(), tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_image_tiles": 2}))
    with pytest.raises(ConfigError, match="max_image_tiles is 2; the model reads 4"):
        read_processor(tmp_path, layout)


def test_an_instructed_models_folder_as_published(tmp_path: Path) -> None:
    """Its end of text is the end of a turn; the image token lies beyond the vocabulary."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(IMAGE - 6)}, unk_token="w0"))
    names = [PUBLISHED.begin, PUBLISHED.document_end, *PUBLISHED[2:5], PUBLISHED.pad, PUBLISHED.image]
    tokenizer.add_special_tokens(names)
    assert tokenizer.token_to_id(PUBLISHED.image) == IMAGE
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": PUBLISHED.begin}, "eos_token": PUBLISHED.message_end})
    )
    stops = [tokenizer.token_to_id(name) for name in (PUBLISHED.document_end, PUBLISHED.message_end)]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    found = read_processor(tmp_path, MllamaLayout(None, small_text(), IMAGE))
    assert found.processor.token_names == PUBLISHED
    assert list(found.processor.stop_token_ids) == stops
    assert found.notes == [f"{tmp_path} holds no chat template; conversations are as Llama 3's"]
