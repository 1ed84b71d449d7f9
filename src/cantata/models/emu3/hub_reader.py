"""Emu3's processor from the files that lie beside published weights: the reverse of `hub_processor`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from cantata.core.chat_sandbox import read_template
from cantata.core.errors import ConfigError
from cantata.models.chat_processor import load_tokenizer
from cantata.models.emu3.config import Emu3Tokens
from cantata.models.emu3.hf import Emu3Layout
from cantata.models.emu3.hub_processor import PUBLISHED, ROLES, visual_name
from cantata.models.emu3.processor import Emu3Processor
from cantata.models.hub import read_json

VISION_WEIGHT = 0.5
"""Weight of images in the published loss (arXiv:2409.18869, section 2.4); generation does not read it."""


class HubProcessor(NamedTuple):
    """What a published folder's files give."""

    processor: Emu3Processor
    no_images: str
    """Why images cannot be read as the model learned them."""
    notes: list[str]
    """What the files leave open, and what stands for it."""


def read_processor(directory: Path, layout: Emu3Layout) -> HubProcessor:
    """The processor that transformers' tokenizer files in `directory` describe.

    Raises `ConfigError` where there is no tokenizer, or it lacks a token.
    """
    tokenizer = load_tokenizer(str(directory))
    names = _names(directory, tokenizer, layout)
    offset = _id(directory, tokenizer, visual_name(0))
    size = 1
    while tokenizer.token_to_id(visual_name(size)) == offset + size:
        size += 1
    tokens = Emu3Tokens(
        **{role: _id(directory, tokenizer, name) for role, name in names.items()},
        visual_offset=offset,
        codebook_size=size,
    )
    try:
        template, notes = str(directory), list[str]()
        read_template(template)
    except ConfigError:
        template = None
        notes = [f"{directory} holds no chat template; conversations are as Emu3-Chat's"]
    try:
        processor = Emu3Processor(str(directory), tokens, 1.0, VISION_WEIGHT, template)
    except ConfigError as error:
        raise ConfigError(f"{directory}: {error}") from error
    no_images = "the model reads images as codes; add --tokenizer DIR, whose codes it learned"
    return HubProcessor(processor, no_images, notes)


def _names(directory: Path, tokenizer: Tokenizer, layout: Emu3Layout) -> dict[str, str]:
    """Spellings of the structure: as the folder's configs say, else the authors'."""
    path = directory / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    extra = config.get("extra_special_tokens")
    given = config | (extra if isinstance(extra, dict) else {})
    text = layout.text
    ids = {"bos": text.bos_token_id, "eos": text.eos_token_id, "pad": text.pad_token_id}
    names = {}
    for role, published in PUBLISHED.items():
        spelt = tokenizer.id_to_token(ids[role]) if role in ids else None
        names[role] = _name(given.get(ROLES.get(role, f"{role}_token"))) or spelt or published
    return names


def _id(directory: Path, tokenizer: Tokenizer, name: str) -> int:
    found = tokenizer.token_to_id(name)
    if found is None:
        raise ConfigError(
            f"{directory}: the tokenizer has no token {name!r}; it takes a tokenizer.json of Emu3 as "
            "transformers reads it"
        )
    return int(found)


def _name(value: Any) -> str | None:
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else None
