"""Aria's tokenizer and processor as transformers reads them, to lie beside published weights."""

from __future__ import annotations

from math import isqrt
from pathlib import Path

from cantata.core.locate import asset
from cantata.models.aria.config import AriaProjectorConfig
from cantata.models.aria.processor import AriaProcessor
from cantata.models.chat_files import write_tokenizer
from cantata.models.hub import write_json

PUBLISHED_SIZES = (490, 980)
"""The image sizes that transformers' image processor takes, in pixels."""

_NO_SPLIT = (
    "split_image is written as false: transformers cuts crops at other places than this run, and leaves out "
    "the whole image before them"
)

_TEMPLATE = "embedded:chat_template.jinja"
_TEMPLATE_TOKENS = ("<fim_prefix>", "<|img|>", "<fim_suffix>", "<|im_start|>", "<|im_end|>")


def write_processor(processor: AriaProcessor, projector: AriaProjectorConfig, directory: Path) -> list[str]:
    """Write what `AutoTokenizer` and, at published image sizes, `AriaProcessor` load from `directory`.

    A generation there ends with a document or a turn. Images are not split: transformers cuts crops at
    other places than Aria's authors do, and leaves out the whole image before them.

    Returns lines on what could not be written.
    """
    write_tokenizer(processor, processor.token_names, _chatml(processor), directory)
    notes = [_NO_SPLIT] if processor.split_image else []
    if processor.image_size not in PUBLISHED_SIZES:
        sizes = " or ".join(map(str, PUBLISHED_SIZES))
        found = f"transformers takes images of {sizes} pixels, this run's have {processor.image_size}"
        return [*notes, f"no processor_config.json: {found}; of images, ask the run itself"]
    _write_image_processor(processor, projector, directory)
    return notes


def _chatml(processor: AriaProcessor) -> str:
    names = processor.token_names
    own = (names.image_prefix, names.image, names.image_suffix, names.message_start, names.message_end)
    template = asset(_TEMPLATE).read_text(encoding="utf-8")
    for shipped, name in zip(_TEMPLATE_TOKENS, own, strict=True):
        template = template.replace(shipped, name)
    return template


def _write_image_processor(processor: AriaProcessor, projector: AriaProjectorConfig, directory: Path) -> None:
    features = {
        str(isqrt(patches) * processor.patch_size): queries
        for patches, queries in projector.patch_to_query.items()
    }
    images = {
        "image_processor_type": "AriaImageProcessor",
        "max_image_size": processor.image_size,
        "min_image_size": processor.min_image_size,
        "split_image": False,
    }
    write_json(directory / "preprocessor_config.json", {**images, "processor_class": "AriaProcessor"})
    write_json(
        directory / "processor_config.json",
        {"processor_class": "AriaProcessor", "image_processor": images, "size_conversion": features},
    )
