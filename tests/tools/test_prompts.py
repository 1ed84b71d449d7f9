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
    one, three, five = (f"{file}, line {number}" for number in (1, 3, 5))
    assert read_prompts(file) == [
        Prompt("a", origin=one),
        Prompt("b", (red,), origin=three),
        Prompt("c", (red, red), origin=five),
    ]
    assert [len(sample.images) for sample in encode(read_prompts(file), PROCESSOR, is_chat=True)] == [0, 1, 2]


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_at_newlines_alone(tmp_path: Path, start: str, end: str) -> None:
    texts = ["a\u2028b", "c\u2029d", "e\x85f"]
    lines = end.join(json.dumps({"prompt": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "p.jsonl").write_bytes((start + lines).encode())
    assert [prompt.text for prompt in read_prompts(tmp_path / "p.jsonl")] == texts


def test_a_file_that_cannot_be_read_is_named_with_its_line(files: Path) -> None:
    for key, name in (("image", "broken.png"), ("video", "gone.mp4"), ("pdf", "broken.png")):
        lines = [{"prompt": "a"}, {"prompt": "b", key: name}]
        (files / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
        with pytest.raises(ConfigError) as error:
            encode(read_prompts(files / "p.jsonl"), PROCESSOR, is_chat=True)
        assert f"{files / 'p.jsonl'}, line 2: {files / name}: " in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "holds no prompt"),
        ("{", "line 1: no JSON"),
        ('"text"', 'line 1: wanted is {"prompt": "text"}'),
        ('{"prompt": 3}', "line 1: wanted is"),
        ('{"prompt": "\\ud800"}', "p.jsonl, line 1: the text is no valid Unicode"),
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
    images, videos, pdfs = (tuple(files / path for path in kind) for kind in prompt[1:4])
    given = Prompt("x", images, videos, pdfs)
    with pytest.raises(ConfigError) as error:
        encode([given], PROCESSOR, is_chat=True)
    assert message in str(error.value)


def test_media_are_read_as_the_shipped_configuration_says() -> None:
    video: Any = media_options("video", VideoOptions)
    assert (video.sampling.value, video.num_frames) == ("uniform", 8)
    assert media_options("pdf", PdfOptions).scale == 2.0
