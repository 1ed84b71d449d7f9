"""Tokenizer and processor files: transformers reads from them what our processor does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cantata.core.locate import asset
from cantata.core.samples import Chat, Document, Message
from cantata.models.aria.config import AriaProjectorConfig
from cantata.models.aria.hub_processor import write_processor
from tests.data.helpers import mini_processor

PUBLISHED = AriaProjectorConfig({1225: 128, 4900: 256}, 0.02)


def written(directory: Path, **changes: Any) -> list[str]:
    """Write the files, and as much of a config.json as transformers asks for; returns the notes."""
    projector = PUBLISHED if changes else AriaProjectorConfig({64: 16}, 0.02)
    notes = write_processor(mini_processor(**changes), projector, directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "aria"}))
    return notes


def test_tokenizer_and_chat_template(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    notes = written(tmp_path)
    assert len(notes) == 1
    assert "this run's have 64" in notes[0]
    assert not (tmp_path / "processor_config.json").exists()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    processor = mini_processor()
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.image_token_id) == (0, 1, 9)
    words = "Is't a verdict? naïve 😀  a\n\n\tb"
    assert tokenizer(words).input_ids == processor.encode_prompt(Document((words,))).input_ids_T.tolist()
    assert tokenizer.decode(tokenizer(words).input_ids) == words
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    prompt = processor.encode_prompt(Chat((Message("user", ("hi",)),)))
    assert tokenizer(chat).input_ids == prompt.input_ids_T.tolist()
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert generation.eos_token_id == list(processor.stop_token_ids)


def test_images_that_were_split_are_told_of(tmp_path: Path) -> None:
    assert any("split_image is written as false" in note for note in written(tmp_path, split_image=True))


def test_the_template_spells_the_runs_tokens(tmp_path: Path) -> None:
    written(tmp_path, message_end="<|endoftext|>", image_prefix="<|im_start|>")
    template = (tmp_path / "chat_template.jinja").read_text()
    assert "'<|im_start|><|img|><fim_suffix>'" in template
    assert "<|im_end|>" not in template
    assert "'<|endoftext|>\\n'" in template


def test_a_template_of_the_users_is_written_as_it_is(tmp_path: Path) -> None:
    source = "{# mine #}" + asset("embedded:chat_template.jinja").read_text()
    (tmp_path / "mine.jinja").write_text(source)
    written(tmp_path, chat_template=str(tmp_path / "mine.jinja"))
    assert (tmp_path / "chat_template.jinja").read_text() == source


def test_images_become_the_same_patches(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 490, "min_image_size": 336, "patch_size": 14, "position_grid": 70}
    assert written(tmp_path, **sizes, features_per_image=128) == []
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert theirs.size_conversion == {490: 128, 980: 256}
    assert theirs.image_processor.max_image_size == 490
    assert theirs.image_processor.split_image is False
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((600, 400))
    ours = mini_processor(**sizes, features_per_image=128).encode_prompt(Document((image,)))
    # transformers' processor asks for 980 by itself, whatever its image processor is set to.
    text = "<fim_prefix><|img|><fim_suffix>"
    found = theirs(text=text, images=[image], max_image_size=490, return_tensors="np")
    assert found["input_ids"][0].tolist() == ours.input_ids_T.tolist()
    [patches] = ours.images
    assert int(found["pixel_mask"].sum()) == 490 * max(int(400 * 490 / 600), 336)
    first = (found["pixel_values"][0][:, :14, :14] + 1) * 127.5
    assert np.abs(first.reshape(-1) - patches.patches_PC[0]).max() <= 1.0
