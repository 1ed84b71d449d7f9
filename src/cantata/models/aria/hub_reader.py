"""Aria's processor from the files that lie beside published weights: the reverse of `hub_processor`."""

from __future__ import annotations

import re
from math import isqrt
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cantata.core.errors import ConfigError
from cantata.models.aria.crops import Resampling
from cantata.models.aria.hf import AriaLayout
from cantata.models.aria.processor import AriaProcessor, TokenNames
from cantata.models.chat_files import HubProcessor, find_template, stop_ids, token_names
from cantata.models.chat_processor import load_tokenizer
from cantata.models.hub import read_json

_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
_IMAGE_KEYS = ("max_image_size", "min_image_size", "split_image")


def read_processor(directory: Path, layout: AriaLayout) -> HubProcessor[AriaProcessor]:
    """The processor that transformers' files in `directory` describe.

    Images are split as Aria's authors do, where the files say that they are split.

    Raises `ConfigError` where there is no tokenizer, it lacks a token, or image sizes are not the model's.
    """
    images, no_images = _image_settings(directory, layout)
    side = images["max_image_size"]
    patches = (side // layout.vision.patch_size) ** 2
    features = layout.projector.patch_to_query.get(patches)
    if features is None:
        known = ", ".join(map(str, layout.projector.patch_to_query))
        raise ConfigError(
            f"{directory}: images of {side} pixels have {patches} patches; the projector takes {known}"
        )
    template, source, notes = find_template(directory, "ChatML, as Aria's")
    names = _token_names(directory, layout, load_tokenizer(str(directory)), source)
    try:
        processor = AriaProcessor(
            tokenizer=str(directory),
            image_size=side,
            min_image_size=images["min_image_size"],
            patch_size=layout.vision.patch_size,
            position_grid=layout.vision.grid,
            features_per_image=features,
            split_image=images["split_image"],
            resampling=Resampling.pillow,
            image_token=names.image,
            image_prefix=names.image_prefix,
            image_suffix=names.image_suffix,
            message_start=names.message_start,
            message_end=names.message_end,
            document_end=names.document_end,
            pad_token=names.pad,
            chat_template=template,
        )
    except ConfigError as error:
        raise ConfigError(f"{directory}: {error}") from error
    return HubProcessor(processor, no_images, notes)


def _image_settings(directory: Path, layout: AriaLayout) -> tuple[dict[str, Any], str]:
    """Sizes and splitting; where no file says them, something that text can do without, and why."""
    for name in _IMAGE_FILES:
        if not (directory / name).is_file():
            continue
        content = read_json(directory / name)
        nested = content.get("image_processor")
        content = nested if isinstance(nested, dict) else content
        if content.keys() >= set(_IMAGE_KEYS):
            return {key: content[key] for key in _IMAGE_KEYS}, ""
    side = isqrt(max(layout.projector.patch_to_query)) * layout.vision.patch_size
    wanted = f"no {' or '.join(_IMAGE_FILES)} with {', '.join(_IMAGE_KEYS)}"
    reason = (
        f"{directory} holds {wanted}: how images were read is not known; add it, or give the run directory"
    )
    return {"max_image_size": side, "min_image_size": side, "split_image": False}, reason


def _token_names(directory: Path, layout: AriaLayout, tokenizer: Tokenizer, template: str) -> TokenNames:
    """The special tokens, by the ids of the configs; those around an image as the template writes them."""
    names = token_names(directory)
    image = _spelt(tokenizer, layout.image_token_id, directory)
    end = names.get("eos_token") or _spelt(tokenizer, layout.text.eos_token_id, directory)
    pad = names.get("pad_token") or _spelt(tokenizer, layout.text.pad_token_id, directory)
    others = [_spelt(tokenizer, stop, directory) for stop in stop_ids(directory)]
    message_end = next((name for name in others if name != end), "<|im_end|>")
    around = re.search(rf"(<[^<>]+>){re.escape(image)}(<[^<>]+>)", template)
    prefix, suffix = around.groups() if around else ("<fim_prefix>", "<fim_suffix>")
    return TokenNames(image, prefix, suffix, "<|im_start|>", message_end, end, pad)


def _spelt(tokenizer: Tokenizer, token_id: Any, directory: Path) -> str:
    name = tokenizer.id_to_token(token_id) if isinstance(token_id, int) and token_id >= 0 else None
    if name is None:
        raise ConfigError(f"{directory}: the tokenizer has no token of the id {token_id} that a config names")
    return str(name)
