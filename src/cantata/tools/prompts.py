"""Prompts of a command line or a file: text, images, videos and documents to what a model is asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from PIL import Image

from cantata.core.config import read_config
from cantata.core.errors import ConfigError
from cantata.core.locate import configs_dir
from cantata.core.samples import DataError, Part, Processor, Sample, Video
from cantata.core.schema import convert
from cantata.core.suggest import hint
from cantata.data.media.images import open_image
from cantata.data.media.pdf import PageSize, PdfOptions, page_sizes, read_pdf
from cantata.data.media.video import VideoOptions, read_video
from cantata.infer.pdf import example_of, page_parts

T = TypeVar("T")

_KEYS = ("prompt", "image", "video", "pdf")


class Prompt(NamedTuple):
    """What a user asks: files stand before the text."""

    text: str
    images: tuple[Path, ...] = ()
    videos: tuple[Path, ...] = ()
    pdfs: tuple[Path, ...] = ()
    origin: str = ""
    """Where it was given, for messages: a file and its line, or `--prompt N`."""

    @property
    def has_media(self) -> bool:
        return bool(self.images or self.videos or self.pdfs)


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a JSON Lines file: `{"prompt": ..., "image": ..., "video": ..., "pdf": ...}` a line.

    A file, or a list of files, is named from the folder of `path`. Raises `ConfigError` that names the line.
    """
    try:
        # Strings in JSON may hold line ends of Unicode, at which `str.splitlines` splits.
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    prompts = [
        _parsed(line, f"{path}, line {i}", path.parent) for i, line in enumerate(lines, 1) if line.strip()
    ]
    if not prompts:
        raise ConfigError(f"{path} holds no prompt")
    return prompts


def encode(
    prompts: Iterable[Prompt], processor: Processor, *, is_chat: bool, pdf: PdfOptions | None = None
) -> list[Sample]:
    """The prompts as the model takes them: a user's turn to be answered, or a text to go on with.

    `pdf` says how documents are read; None: as the shipped data configuration says.
    Raises `ConfigError` where a file cannot be read, or the chat template refuses a prompt; it names the
    prompt's origin.
    """
    samples = []
    for number, prompt in enumerate(prompts, 1):
        example = example_of(_parts(prompt, pdf), is_chat=is_chat)
        name = prompt.origin or f"prompt {number}"
        try:
            samples.append(processor.encode_prompt(example, name))
        except DataError as error:
            raise ConfigError(f"{name}: {error}") from error
    return samples


def check_text(text: str, where: str) -> None:
    """Raise `ConfigError` for half a surrogate pair, or a byte of the command line that is no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: the text is no valid Unicode ({error})") from error


def read_media(prompt: Prompt) -> Iterator[Image.Image | Video]:
    """The images, then the videos, that stand before a prompt's pages. Raises `ConfigError`."""
    for path in prompt.images:
        yield _read(prompt, path, open_image)
    for path in prompt.videos:
        yield _read(prompt, path, partial(read_video, options=media_options("video", VideoOptions)))


def sizes_of_pages(prompt: Prompt, pdf: PdfOptions) -> list[PageSize]:
    """The pages of all its documents, unread. Raises `ConfigError`."""
    read = partial(page_sizes, options=pdf)
    return [size for path in prompt.pdfs for size in _read(prompt, path, read)]


def _parts(prompt: Prompt, pdf: PdfOptions | None) -> Iterator[Part]:
    yield from read_media(prompt)
    if prompt.pdfs:
        options = pdf or media_options("pdf", PdfOptions)
        read = partial(read_pdf, options=options)
        images = [page for path in prompt.pdfs for page in _read(prompt, path, read)]
        numbers = [size.number for size in sizes_of_pages(prompt, options)]
        yield from page_parts(zip(numbers, images, strict=True))
    yield prompt.text


def _read(prompt: Prompt, path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except DataError as error:
        where = f"{prompt.origin}: {path}" if prompt.origin else str(path)
        raise ConfigError(f"{where}: {error}") from error


def media_options(kind: str, options: type[T]) -> T:
    """How the shipped data configuration reads videos or documents: `video` or `pdf`."""
    shipped = read_config(configs_dir() / "data" / "mixer.yaml")
    values = shipped["sources"]["mixer"]["dataset"][kind]
    converted: T = convert(values, options, (kind,), lambda node, key, runtime: node)
    return converted


def _parsed(line: str, where: str, folder: Path) -> Prompt:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: no JSON ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise ConfigError(f'{where}: wanted is {{"prompt": "text"}}, perhaps with {", ".join(_KEYS[1:])}')
    for key in record:
        if key not in _KEYS:
            raise ConfigError(f"{where}: {key!r} is none of {', '.join(_KEYS)}{hint(key, _KEYS)}")
    check_text(record["prompt"], where)
    images, videos, pdfs = (_files(record.get(key), f"{where}, {key}", folder) for key in _KEYS[1:])
    return Prompt(record["prompt"], images, videos, pdfs, where)


def _files(value: Any, where: str, folder: Path) -> tuple[Path, ...]:
    listed = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(file, str) and file for file in listed):
        raise ConfigError(f"{where}: wanted is a path or a list of paths")
    return tuple(folder / file for file in listed)
