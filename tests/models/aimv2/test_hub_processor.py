"""Processor files beside published weights: transformers makes the same pixels and tokens of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cantata.core.samples import Document
from cantata.models.aimv2.hub_processor import write_processor
from cantata.models.aimv2.vision import normalised_patches
from tests.data.helpers import mini_processor
from tests.models.aimv2.small import NATIVE, VISION, cut, pair_processor, picture, processor


def test_squares_are_made_alike(tmp_path: Path) -> None:
    """Of an image whose shorter side already fits: elsewhere we round a crop that they resize twice."""
    transformers = pytest.importorskip("transformers")
    assert write_processor(processor(), VISION, tmp_path, with_text=False) == []
    theirs: Any = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    image = picture(3, 24, 16)
    made = theirs(images=image, return_tensors="pt")["pixel_values"][0]
    expected, positions = cut(made, VISION)
    ours = processor().patches(image)
    assert np.array_equal(ours.position_ids_P, positions.numpy())
    found = normalised_patches(torch.from_numpy(ours.patches_PC))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert not (tmp_path / "tokenizer.json").exists()


def test_native_images_are_neither_resized_nor_cropped(tmp_path: Path) -> None:
    [note] = write_processor(processor(NATIVE), NATIVE, tmp_path, with_text=False)
    assert "multiples of 4 pixels yourself" in note
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert not written["do_resize"]
    assert not written["do_center_crop"]
    assert not {"size", "crop_size"} & written.keys()


def test_a_pairs_text_is_made_alike(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    reader = pair_processor()
    [note] = write_processor(reader, replace(VISION, use_head=True), tmp_path, with_text=True)
    assert "begins with <|im_start|> and ends with <|endoftext|>" in note
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = reader.encode(Document((picture(0, 16, 16), "a red circle")), "s:0").input_ids_T.tolist()
    assert tokenizer("<|im_start|>a red circle<|endoftext|>")["input_ids"] == ours
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (ours[0], ours[-1])
    assert (tokenizer.pad_token_id, tokenizer.model_max_length) == (reader.pad_token_id, 20)


def test_an_encoder_alone_has_no_tokenizer(tmp_path: Path) -> None:
    assert write_processor(pair_processor(), VISION, tmp_path, with_text=False) == []
    assert [path.name for path in tmp_path.iterdir()] == ["preprocessor_config.json"]


def test_another_familys_processor_has_no_files(tmp_path: Path) -> None:
    [note] = write_processor(mini_processor(), VISION, tmp_path, with_text=True)
    assert note == "no processor files: AriaProcessor has none for AIMv2"
    assert not list(tmp_path.iterdir())
