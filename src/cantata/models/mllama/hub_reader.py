"""Mllama's processor from the files that lie beside published weights: the reverse of `hub_processor`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from cantata.core.chat_sandbox import read_template
from cantata.core.errors import ConfigError
from cantata.models.chat_processor import load_tokenizer
from cantata.models.hub import read_json
from cantata.models.mllama.hf import MllamaLayout
from cantata.models.mllama.hub_processor import IMAGE_FILE
from cantata.models.mllama.processor import MllamaProcessor, TokenNames

PUBLISHED = TokenNames(
    image="<|image|>",
    begin="<|begin_of_text|>",
    header_start="<|start_header_id|>",
    header_end="<|end_header_id|>",
    message_end="<|eot_id|>",
    document_end="<|end_of_text|>",
    pad="<|finetune_right_pad_id|>",
)
"""How the authors' tokenizer spells the special tokens."""

TEXT_ALONE_TILE = (8, 1)
"""Sides of the tile and of the patch that a processor is told of where nothing has images."""

_HEADER = re.compile(r"""['"](<[^<>]+>)['"]\s*\+\s*\w+\[['"]role['"]\]\s*\+\s*['"](<[^<>]+>)""")
"""What a template writes around a role."""


class HubProcessor(NamedTuple):
    """What a published folder's files give."""

    processor: MllamaProcessor
    no_images: str
    """Why images cannot be read as the model learned them; empty where they can."""
    notes: list[str]
    """What the files leave open, and what stands for it."""


def read_processor(directory: Path, layout: MllamaLayout) -> HubProcessor:
    """The processor that transformers' files in `directory` describe.

    Raises `ConfigError` where there is no tokenizer, it lacks a token, or images are cut otherwise than the
    model's.
    """
    try:
        template, notes = str(directory), list[str]()
        source, _ = read_template(template)
    except ConfigError:
        template, source = None, ""
        notes = [f"{directory} holds no chat template; conversations are as Llama 3's"]
    names = _token_names(directory, layout, load_tokenizer(str(directory)), source)
    vision = layout.vision
    size, patch = (vision.image_size, vision.patch_size) if vision is not None else TEXT_ALONE_TILE
    try:
        processor = MllamaProcessor(
            tokenizer=str(directory),
            image_size=size,
            max_num_tiles=vision.max_num_tiles if vision is not None else 1,
            patch_size=patch,
            image_token=names.image,
            begin_token=names.begin,
            header_start=names.header_start,
            header_end=names.header_end,
            message_end=names.message_end,
            document_end=names.document_end,
            pad_token=names.pad,
            chat_template=template,
        )
    except ConfigError as error:
        raise ConfigError(f"{directory}: {error}") from error
    return HubProcessor(processor, _no_images(directory, layout), notes)


def _no_images(directory: Path, layout: MllamaLayout) -> str:
    """Why there are none; raises where the files cut images otherwise than the model wants them."""
    if layout.vision is None:
        return f"{directory} is a language model alone, without its vision tower"
    path = directory / IMAGE_FILE
    if not path.is_file():
        wanted = "how images were read is not known; add it, or give the run directory"
        return f"{directory} holds no {IMAGE_FILE}: {wanted}"
    images = read_json(path)
    size, tiles = images.get("size", {}).get("height"), images.get("max_image_tiles")
    for key, found, needed in (
        ("size.height", size, layout.vision.image_size),
        ("max_image_tiles", tiles, layout.vision.max_num_tiles),
    ):
        if found != needed:
            raise ConfigError(f"{path}: {key} is {found}; the model reads {needed}")
    return ""


def _token_names(directory: Path, layout: MllamaLayout, tokenizer: Tokenizer, template: str) -> TokenNames:
    """The special tokens, as the configs and the template spell them, else as the authors do."""
    config = _optional(directory / "tokenizer_config.json")
    extra = config.get("extra_special_tokens")
    given = config | (extra if isinstance(extra, dict) else {})
    end = _name(given.get("eos_token")) or PUBLISHED.document_end
    stops = _optional(directory / "generation_config.json").get("eos_token_id")
    spelt = [tokenizer.id_to_token(stop) for stop in stops] if isinstance(stops, list) else []
    # An instructed model's eos_token is the end of a turn, and the end of a document one of its other stops.
    if end == PUBLISHED.message_end:
        end = PUBLISHED.document_end
    turn_ends = [name for name in spelt if name is not None and name != end]
    message_end = PUBLISHED.message_end if PUBLISHED.message_end in turn_ends else next(iter(turn_ends), None)
    header = _HEADER.search(template)
    image = tokenizer.id_to_token(layout.image_token_id) or _name(given.get("image_token"))
    return TokenNames(
        image=image or PUBLISHED.image,
        begin=_name(given.get("bos_token")) or PUBLISHED.begin,
        header_start=header[1] if header else PUBLISHED.header_start,
        header_end=header[2] if header else PUBLISHED.header_end,
        message_end=message_end or PUBLISHED.message_end,
        document_end=end,
        pad=_name(given.get("pad_token")) or PUBLISHED.pad,
    )


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _name(value: Any) -> str | None:
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else None
