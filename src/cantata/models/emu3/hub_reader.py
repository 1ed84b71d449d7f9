"""Emu3's processor from the files that lie beside published weights: the reverse of `hub_processor`."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from cantata.core.errors import ConfigError
from cantata.models.chat_files import HubProcessor, find_template, token_names
from cantata.models.chat_processor import load_tokenizer
from cantata.models.emu3.config import Emu3Tokens
from cantata.models.emu3.hf import Emu3Layout
from cantata.models.emu3.hub_processor import PUBLISHED, ROLES, visual_name
from cantata.models.emu3.processor import Emu3Processor

VISION_WEIGHT = 0.5
"""Weight of images in the published loss (arXiv:2409.18869, section 2.4); generation does not read it."""


def read_processor(directory: Path, layout: Emu3Layout) -> HubProcessor[Emu3Processor]:
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
    template, _, notes = find_template(directory, "as Emu3-Chat's")
    try:
        processor = Emu3Processor(str(directory), tokens, 1.0, VISION_WEIGHT, template)
    except ConfigError as error:
        raise ConfigError(f"{directory}: {error}") from error
    no_images = "the model reads images as codes; add --tokenizer DIR, whose codes it learned"
    return HubProcessor(processor, no_images, notes)


def _names(directory: Path, tokenizer: Tokenizer, layout: Emu3Layout) -> dict[str, str]:
    """Spellings of the structure: as the folder's configs say, else the authors'."""
    given = token_names(directory)
    text = layout.text
    ids = {"bos": text.bos_token_id, "eos": text.eos_token_id, "pad": text.pad_token_id}
    names = {}
    for role, published in PUBLISHED.items():
        spelt = tokenizer.id_to_token(ids[role]) if role in ids else None
        names[role] = given.get(ROLES.get(role, f"{role}_token")) or spelt or published
    return names


def _id(directory: Path, tokenizer: Tokenizer, name: str) -> int:
    found = tokenizer.token_to_id(name)
    if found is None:
        raise ConfigError(
            f"{directory}: the tokenizer has no token {name!r}; it takes a tokenizer.json of Emu3 as "
            "transformers reads it"
        )
    return int(found)
