"""Aria's multi-page PDF prompt ("Page i: ", the page, a newline; then the question) and its cost in tokens.

Costs follow from the sizes of pages and images alone: nothing is rendered and no model runs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from PIL import Image

from cantata.core.errors import ConfigError
from cantata.core.samples import Chat, Document, Example, Message, Part, Video
from cantata.data.media.pdf import PageSize
from cantata.models.aria.processor import AriaProcessor
from cantata.models.aria.reading import num_crops, one_token_images, read_as

P = TypeVar("P")


class PageCost(NamedTuple):
    """What a page becomes."""

    number: int
    """From 1, in its document."""
    width: int
    """Pixels, as rendered."""
    height: int
    crops: int
    """Images that the vision tower gets, the thumbnail included."""
    tokens: int
    """Placeholders of all of them."""


@dataclass(frozen=True)
class Question:
    """A prompt whose pages are known by their sizes."""

    media: tuple[Image.Image | Video, ...]
    """What stands before the pages."""
    pages: tuple[PageSize, ...]
    text: str
    is_chat: bool
    """Whether it is a user's turn to be answered, or a text to go on with."""


@dataclass(frozen=True)
class Limits:
    """How long a prompt and its answer may be together, in tokens."""

    max_model_len: int
    """As configured."""
    max_positions: int
    """Of the model."""
    max_new_tokens: int
    """Set aside for the answer."""

    def __post_init__(self) -> None:
        if self.max_model_len < 1:
            raise ConfigError(f"max_model_len={self.max_model_len} must be at least 1")

    @property
    def tokens(self) -> int:
        return min(self.max_model_len, self.max_positions)


@dataclass(frozen=True)
class Budget:
    """The tokens of a prompt, page by page."""

    pages: tuple[PageCost, ...]
    prompt_tokens: int
    """Pages, other images, text and everything around them."""
    limits: Limits

    @property
    def tokens(self) -> int:
        """With the longest answer."""
        return self.prompt_tokens + self.limits.max_new_tokens

    @property
    def fits(self) -> bool:
        return self.tokens <= self.limits.tokens


def page_parts(pages: Iterable[tuple[int, P]]) -> Iterator[str | P]:
    """Numbered pages as they stand in a prompt."""
    for number, page in pages:
        yield from (f"Page {number}: ", page, "\n")


def example_of(parts: Iterable[Part], *, is_chat: bool) -> Example:
    """A user's turn, or a text to go on with."""
    return Chat((Message("user", tuple(parts)),)) if is_chat else Document(tuple(parts))


def measure(question: Question, processor: AriaProcessor, limits: Limits) -> Budget:
    """The tokens that `processor.encode_prompt` would make of the question. Raises `DataError` as it does."""
    features = processor.features_per_image
    dot = Image.new("RGB", (1, 1))
    small = [Video((dot,) * len(one.frames)) if isinstance(one, Video) else dot for one in question.media]
    parts = (*small, *page_parts((page.number, dot) for page in question.pages), question.text)
    sample = one_token_images(processor).encode_prompt(example_of(parts, is_chat=question.is_chat))
    pages = tuple(
        PageCost(*page, crops, crops * features)
        for page in question.pages
        for crops in [num_crops(processor, page.width, page.height)]
    )
    others = sum(
        len(one.frames) if isinstance(one, Video) else num_crops(processor, *one.size)
        for one in question.media
    )
    image_tokens = sum(page.tokens for page in pages) + others * features
    return Budget(pages, len(sample) - len(sample.images) + image_tokens, limits)


def require_fit(
    budget: Budget,
    question: Question,
    processor: AriaProcessor,
    sizes: Mapping[int, int],
    spelling: Mapping[str, str],
) -> None:
    """Raise `ConfigError` where prompt and answer are too long together: what would help, with its figures.

    Args:
        budget: of the question, as `processor` reads it.
        sizes: features by the image sizes to choose from.
        spelling: how the user writes `pages`, `image_size`, `whole` (pages are not split), `max_model_len`
            and `max_new_tokens`, with `{}` for the value.
    """
    if budget.fits:
        return
    limits = budget.limits
    choices = [_fewer_pages(budget, question, processor, spelling["pages"])]
    for image_size, is_split in _cheaper(processor, sizes):
        reading = read_as(processor, sizes, image_size, is_split)
        names = [spelling["image_size"].format(image_size)] if image_size != processor.image_size else []
        names += [spelling["whole"]] if is_split != processor.split_image else []
        choices.append(_priced(" ".join(names), measure(question, reading, limits)))
    longer = spelling["max_model_len"].format(budget.tokens)
    room = limits.tokens - budget.prompt_tokens
    if budget.tokens <= limits.max_positions:
        choices.append(longer)
    else:
        choices.append(f"no larger max_model_len: the model has {limits.max_positions:,} positions")
    if room > 0:
        choices.append(f"{spelling['max_new_tokens'].format(room)}, a shorter answer")
    pages = f"{len(budget.pages)} page" + ("s" if len(budget.pages) != 1 else "")
    is_own = limits.max_model_len <= limits.max_positions
    limit = "max_model_len is" if is_own else "the model's positions are"
    raise ConfigError(
        f"{pages} make a prompt of {budget.prompt_tokens:,} tokens, {budget.tokens:,} with an answer of "
        f"{limits.max_new_tokens:,}, and {limit} {limits.tokens:,}; choose: {'; '.join(choices)}"
    )


def _cheaper(processor: AriaProcessor, sizes: Mapping[int, int]) -> list[tuple[int, bool]]:
    """Smaller images, whole ones, and both at once."""
    smaller = [size for size in sizes if processor.min_image_size <= size < processor.image_size]
    found = [(size, processor.split_image) for size in smaller]
    if processor.split_image:
        found += [(processor.image_size, False), *((size, False) for size in smaller)]
    return found


def _fewer_pages(budget: Budget, question: Question, processor: AriaProcessor, spelling: str) -> str:
    def first(count: int) -> Budget:
        return measure(replace(question, pages=question.pages[:count]), processor, budget.limits)

    total = len(question.pages)
    fitting = bisect_right(range(total + 1), budget.limits.tokens, key=lambda count: first(count).tokens) - 1
    if fitting < 1:
        return "fewer pages do not help: not even the first one fits"
    numbers = [page.number for page in question.pages[:fitting]]
    if numbers == list(range(numbers[0], numbers[0] + fitting)):
        spelt = spelling.format(f"{numbers[0]}-{numbers[-1]}" if fitting > 1 else numbers[0])
    else:
        spelt = f"the first {fitting} pages of {total}"
    return _priced(spelt, first(fitting))


def _priced(choice: str, budget: Budget) -> str:
    still = "" if budget.fits else ", still too many"
    return f"{choice} ({budget.tokens:,}{still})"
