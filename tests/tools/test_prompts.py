"""Prompts with their files, from a command line or a file, and what is wrong with them in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cantata.core.errors import ConfigError
from cantata.data.media.pdf import PdfOptions
from cantata.data.media.video import VideoOptions
from cantata.tools.prompts import Prompt, encode, media_options, read_prompts
from tests.data.helpers import mini_processor
from tests.data.media.test_pdf import document

PROCESSOR = mini_processor()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    Image.new("RGB", (70, 70), "red").save(tmp_path / "red.png")
    (tmp_path / "two.pdf").write_bytes(document([(40, 60)] * 2))
    (tmp_path / "broken.png").write_bytes(b"no image")
    return tmp_path


def spelt(prompt: Prompt, *, is_chat: bool = True) -> str:
    [sample] = encode([prompt], PROCESSOR, is_chat=is_chat)
    return PROCESSOR.spell(sample.input_ids_T).replace("<|img|>" * 16, "<|img|>")


def test_a_prompt_is_a_users_turn_with_its_files_before_its_text(files: Path) -> None:
    prompt = Prompt("Why?", (files / "red.png",), (), (files / "two.pdf",))
    image = "<fim_prefix><|img|><fim_suffix>"
    body = f"{image}Page 1: {image}\nPage 2: {image}\nWhy?"
    assert spelt(prompt) == f"<|im_start|>user\n{body}<|im_end|>\n<|im_start|>assistant\n"
    assert spelt(prompt, is_chat=False) == body


def test_text_is_only_text() -> None:
    assert len(encode([Prompt("<|im_end|>")], PROCESSOR, is_chat=False)[0]) > 1


def test_a_file_of_prompts(files: Path) -> None:
    lines = [{"prompt": "a"}, {"prompt": "b", "image": "red.png"}, {"prompt": "c", "image": ["red.png"] * 2}]
    file = files / "prompts.jsonl"
    file.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    red = files / "red.png"
    assert read_prompts(file) == [Prompt("a"), Prompt("b", (red,)), Prompt("c", (red, red))]
    assert [len(sample.images) for sample in encode(read_prompts(file), PROCESSOR, is_chat=True)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "holds no prompt"),
        ("{", "line 1: no JSON"),
        ('"text"', 'line 1: wanted is {"prompt": "text"}'),
        ('{"prompt": 3}', "line 1: wanted is"),
        ('{"prompt": "x", "images": "y"}', "'images' is none of prompt, image, video, pdf; nearest: image"),
        ('{"prompt": "x", "image": [3]}', "line 1, image: wanted is a path"),
    ],
)
def test_lines_that_are_no_prompts(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(line)
    with pytest.raises(ConfigError) as error:
        read_prompts(tmp_path / "p.jsonl")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt("x", images=(Path("broken.png"),)), "broken.png: corrupt image"),
        (Prompt("x", images=(Path("gone.png"),)), "gone.png: missing image"),
        (Prompt("x", videos=(Path("gone.mp4"),)), "gone.mp4: missing video"),
        (Prompt("x", pdfs=(Path("broken.png"),)), "broken.png: corrupt PDF"),
    ],
)
def test_files_that_cannot_be_read(files: Path, prompt: Prompt, message: str) -> None:
    given = Prompt("x", *(tuple(files / path for path in kind) for kind in prompt[1:]))
    with pytest.raises(ConfigError) as error:
        encode([given], PROCESSOR, is_chat=True)
    assert message in str(error.value)


def test_media_are_read_as_the_shipped_configuration_says() -> None:
    video: Any = media_options("video", VideoOptions)
    assert (video.sampling.value, video.num_frames) == ("uniform", 8)
    assert media_options("pdf", PdfOptions).scale == 2.0
