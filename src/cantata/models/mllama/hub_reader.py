"""Mllama's processor from the files that lie beside published weights: the reverse of `hub_processor`."""

from __future__ import annotations

import re
from pathlib import Path

from tokenizers import Tokenizer

from cantata.core.errors import ConfigError
from cantata.models.chat_files import HubProcessor, find_template, stop_ids, token_names
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


def read_processor(directory: Path, layout: MllamaLayout) -> HubProcessor[MllamaProcessor]:
    """The processor that transformers' files in `directory` describe.

    Raises `ConfigError` where there is no tokenizer, it lacks a token, or images are cut otherwise than the
    model's.
    """
    template, source, notes = find_template(directory, "as Llama 3's")
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
    given = token_names(directory)
    end = given.get("eos_token") or PUBLISHED.document_end
    spelt = [tokenizer.id_to_token(stop) for stop in stop_ids(directory)]
    # An instructed model's eos_token is the end of a turn, and the end of a document one of its other stops.
    if end == PUBLISHED.message_end:
        end = PUBLISHED.document_end
    turn_ends = [name for name in spelt if name is not None and name != end]
    message_end = PUBLISHED.message_end if PUBLISHED.message_end in turn_ends else next(iter(turn_ends), None)
    header = _HEADER.search(template)
    image = tokenizer.id_to_token(layout.image_token_id) or given.get("image_token")
    return TokenNames(
        image=image or PUBLISHED.image,
        begin=given.get("bos_token") or PUBLISHED.begin,
        header_start=header[1] if header else PUBLISHED.header_start,
        header_end=header[2] if header else PUBLISHED.header_end,
        message_end=message_end or PUBLISHED.message_end,
        document_end=end,
        pad=given.get("pad_token") or PUBLISHED.pad,
    )
