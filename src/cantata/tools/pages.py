"""Documents in prompts: how they are read, what they cost, and what the model sees of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cantata.core.config import read_config
from cantata.core.errors import ConfigError, RunError
from cantata.core.locate import configs_dir
from cantata.core.samples import DataError, Sample
from cantata.core.schema import convert
from cantata.data.collate.packed import PackedCollator
from cantata.data.media.pdf import PdfOptions
from cantata.infer.gallery import GalleryConfig, gallery
from cantata.infer.pdf import Budget, Limits, Question, measure, require_fit
from cantata.models.aria.model import Aria
from cantata.models.aria.processor import AriaProcessor
from cantata.models.aria.reading import image_sizes, read_as
from cantata.tools.open_model import OpenedModel
from cantata.tools.prompts import Prompt, read_media, sizes_of_pages

RECIPE = "pdf_understanding"
"""The shipped configuration of documents in prompts."""
FLAGS = {
    "pages": "--pages {}",
    "image_size": "--image-size {}",
    "whole": "--no-split",
    "max_model_len": "--max-model-len {}",
    "max_new_tokens": "--max-new-tokens {}",
}
"""How `cantata generate` spells what makes a prompt fit."""


@dataclass(frozen=True)
class Reading:
    """How documents and images are read."""

    pdf: PdfOptions
    max_model_len: int
    """Tokens of a prompt with documents and its answer together, at most."""
    image_size: int | None
    """Pixels of a crop's longest side; None: as the model's files say."""
    split_image: bool | None
    """Whether images and pages are split into crops; None: as the model's files say."""
    choices: Mapping[str, str]
    """How the user writes them, see `cantata.infer.pdf.require_fit`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `cantata generate` takes for documents."""
    pages = parser.add_argument_group("how documents and images are read")
    pages.add_argument("--pages", metavar="P", help="of each PDF: 1-3,7 or 5- (default: all)")
    pages.add_argument(
        "--image-size", metavar="N", type=int, help="longest side of a crop in pixels: 490 or 980 (Aria)"
    )
    pages.add_argument(
        "--split",
        action=argparse.BooleanOptionalAction,
        help="split into crops, the whole before them (default: with --pdf; else as the model's files say)",
    )
    pages.add_argument(
        "--max-model-len",
        metavar="N",
        type=int,
        help=f"tokens of a prompt with PDFs and its answer (default: {_shipped()['max_model_len']})",
    )
    pages.add_argument("--gallery", metavar="FILE", type=Path, help="save the pages as the model sees them")


def refuse_unused(given: argparse.Namespace, prompts: Sequence[Prompt]) -> None:
    """Raise `ConfigError` where an argument would change nothing, as no prompt has what it is about."""
    of_pages = {"--pages": given.pages, "--max-model-len": given.max_model_len, "--gallery": given.gallery}
    of_images = {"--image-size": given.image_size, "--split or --no-split": given.split}
    of_text = {"--raw": given.raw, "--json": given.json, "--max-new-tokens": given.max_new_tokens}
    has_pages, has_media = any(prompt.pdfs for prompt in prompts), any(prompt.has_media for prompt in prompts)
    for is_used, arguments, what in (
        (has_pages, of_pages, "PDFs, and no prompt has one"),
        (has_media, of_images, "images, videos and PDFs, and no prompt has any"),
        (given.tokenizer is not None, {"--size": given.size}, "images as codes, which --tokenizer makes"),
        (given.out is not None, {"--guidance": given.guidance}, "drawing images, which --out asks for"),
        (given.out is None, of_text, "answers in text, and --out draws"),
    ):
        unused = [name for name, value in arguments.items() if value is not None]
        if unused and not is_used:
            raise ConfigError(f"cantata generate: {', '.join(unused)}: for {what}; leave it out")


def reading_of(given: argparse.Namespace, *, has_pages: bool) -> Reading:
    """What the arguments say, and where they are silent the shipped recipe."""
    shipped = _shipped()
    asked = {} if given.pages is None else {"pages": given.pages}
    split = shipped["split_image"] if given.split is None and has_pages else given.split
    max_model_len = shipped["max_model_len"] if given.max_model_len is None else given.max_model_len
    return Reading(
        convert(shipped["pdf"] | asked, PdfOptions, ("pdf",), lambda node, key, runtime: node),
        max_model_len,
        given.image_size,
        split,
        FLAGS,
    )


def reread(opened: OpenedModel, reading: Reading) -> OpenedModel:
    """The model with images read as asked. Raises `ConfigError` where it cannot read them so."""
    if reading.image_size is None and reading.split_image is None:
        return opened
    model, processor = _aria(opened)
    changed = read_as(
        processor,
        image_sizes(model),
        processor.image_size if reading.image_size is None else reading.image_size,
        processor.split_image if reading.split_image is None else reading.split_image,
    )
    return replace(opened, collator=PackedCollator(changed))


def check_pages(
    opened: OpenedModel,
    prompt: Prompt,
    reading: Reading,
    max_new_tokens: int,
    *,
    is_chat: bool,
    only_largest: bool = False,
) -> Budget:
    """Show on stderr what a prompt's pages cost.

    `only_largest`: the largest image size is the only one to choose from.
    Raises `ConfigError` where they cannot be read or do not fit.
    """
    model, processor = _aria(opened)
    pages = tuple(sizes_of_pages(prompt, reading.pdf))
    question = Question(tuple(read_media(prompt)), pages, prompt.text, is_chat)
    try:
        budget = measure(
            question, processor, Limits(reading.max_model_len, opened.max_positions, max_new_tokens)
        )
    except DataError as error:
        raise ConfigError(f"{prompt.origin or 'prompt'}: {error}") from error
    how = f"{processor.image_size} px, {'split into crops' if processor.split_image else 'whole'}"
    title = f"{', '.join(path.name for path in prompt.pdfs)}: {len(pages)} pages, {how}"
    Console(file=sys.stderr).print(budget_table(title, budget))
    sizes = image_sizes(model)
    if only_largest:
        sizes = {max(sizes): sizes[max(sizes)]}
    require_fit(budget, question, processor, sizes, reading.choices)
    return budget


def save_gallery(
    path: Path, opened: OpenedModel, sample: Sample, budget: Budget, config: GalleryConfig | None = None
) -> None:
    """Save the pages as the model sees them; `config` None: as the shipped recipe. Raises `RunError`."""
    if config is None:
        config = convert(_shipped()["gallery"], GalleryConfig, ("gallery",), lambda node, key, runtime: node)
    image = gallery(sample, budget, _aria(opened)[1], config)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: the gallery cannot be saved ({error})") from error
    sys.stderr.write(f"gallery: {path}, {image.width} x {image.height}\n")


def budget_table(title: str, budget: Budget) -> Table:
    """Page by page: pixels, crops, tokens, and tokens up to and with it."""
    table = Table(title=title, title_justify="left", show_edge=False)
    for heading in ("page", "pixels", "crops", "tokens", "cumulative"):
        table.add_column(heading, justify="right")
    so_far = 0
    for page in budget.pages:
        so_far += page.tokens
        pixels = f"{page.width} x {page.height}"
        table.add_row(str(page.number), pixels, str(page.crops), f"{page.tokens:,}", f"{so_far:,}")
    table.add_section()
    for label, tokens, total in (
        ("text, marks and other media", budget.prompt_tokens - so_far, budget.prompt_tokens),
        ("the answer, at most", budget.limits.max_new_tokens, budget.tokens),
    ):
        table.add_row("", label, "", f"{tokens:,}", f"{total:,}")
    verdict = "green" if budget.fits else "red"
    share = f"{budget.tokens / budget.limits.tokens:.0%}"
    table.add_row("", "limit", "", share, f"{budget.limits.tokens:,}", style=verdict)
    return table


def _aria(opened: OpenedModel) -> tuple[Aria, AriaProcessor]:
    model, processor = opened.model, opened.collator.processor
    if not isinstance(model, Aria) or not isinstance(processor, AriaProcessor):
        raise ConfigError(f"{type(model).__name__} reads no documents page by page; Aria does")
    return model, processor


def _shipped() -> dict[str, Any]:
    return read_config(configs_dir() / f"{RECIPE}.yaml")
