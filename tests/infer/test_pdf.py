"""What pages cost as a prompt, against the encoded prompt and against the original's figures."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from PIL import Image

from cantata.core.errors import ConfigError
from cantata.core.samples import Video
from cantata.data.media.pdf import PageSize, PdfOptions, page_sizes
from cantata.infer.pdf import Limits, Question, example_of, measure, page_parts, require_fit
from cantata.models.aria.processor import AriaProcessor
from cantata.models.aria.reading import read_as
from tests.data.helpers import mini_processor
from tests.data.media.test_pdf import DOCUMENTS, document

OPTIONS = PdfOptions(pages="all", scale=2.0, max_pages=256, max_pixels=40_000_000)
PUBLISHED = Limits(max_model_len=38400, max_positions=65536, max_new_tokens=4096)
SIZES = {490: 128, 980: 256}
SPELLING = {
    "pages": "pages={}",
    "image_size": "size={}",
    "whole": "whole",
    "max_model_len": "len={}",
    "max_new_tokens": "new={}",
}
LETTER = PageSize(1, 1224, 1584)


def aria(**changes: Any) -> AriaProcessor:
    """Aria's image geometry with the embedded tokenizer."""
    shape = {"min_image_size": 336, "patch_size": 14, "position_grid": 70}
    return mini_processor(
        **(shape | {"image_size": 980, "features_per_image": 256, "split_image": True} | changes)
    )


def letters(count: int) -> tuple[PageSize, ...]:
    return tuple(LETTER._replace(number=number) for number in range(1, count + 1))


def question(pages: tuple[PageSize, ...], *media: Any, is_chat: bool = True) -> Question:
    return Question(media, pages, "Summarize it.", is_chat)


def test_a_letter_page_costs_what_it_costs_the_authors() -> None:
    [page] = page_sizes(document([(612, 792)]), OPTIONS)
    assert page == LETTER
    processor = aria()
    for image_size, is_split, crops, tokens in (
        (980, True, 7, 1792),
        (980, False, 1, 256),
        (490, True, 7, 896),
        (490, False, 1, 128),
    ):
        reading = read_as(processor, SIZES, image_size, is_split)
        [cost] = measure(question((page,)), reading, PUBLISHED).pages
        assert cost == (1, 1224, 1584, crops, tokens)


@pytest.mark.parametrize(("name", "count"), [("icml-slides", 9), ("zero-infinity-slides", 23)])
def test_the_slides_cost_what_they_cost_the_authors(name: str, count: int) -> None:
    """16:9 is nearest to 2:1, of which the smaller grid is taken: two crops and the thumbnail."""
    if not DOCUMENTS.is_dir():
        pytest.skip(f"{DOCUMENTS} is absent")
    pages = page_sizes(DOCUMENTS / f"{name}.pdf", OPTIONS)
    budget = measure(question(tuple(pages)), aria(), PUBLISHED)
    assert budget.pages == tuple((number, 1920, 1080, 3, 768) for number in range(1, count + 1))
    assert budget.fits


@pytest.mark.parametrize("is_chat", [True, False])
@pytest.mark.parametrize("split_image", [True, False])
def test_the_prompt_has_as_many_tokens_as_measured(is_chat: bool, split_image: bool) -> None:
    processor = mini_processor(split_image=split_image)
    media = (Image.new("RGB", (200, 70)), Video((Image.new("RGB", (9, 9)),) * 3))
    pages = [PageSize(5, 122, 158), PageSize(3, 90, 300)]
    images = [Image.new("RGB", page[1:]) for page in pages]
    parts = (*media, *page_parts(zip((5, 3), images, strict=True)), "Why <|img|>?")
    asked = Question(media, tuple(pages), "Why <|img|>?", is_chat)
    sample = processor.encode_prompt(example_of(parts, is_chat=is_chat))
    budget = measure(asked, processor, PUBLISHED)
    assert budget.prompt_tokens == len(sample)
    assert sum(page.crops for page in budget.pages) == len(sample.images) - 3 - (4 if split_image else 1)
    assert budget.tokens == len(sample) + 4096


def test_pages_are_called_by_their_numbers() -> None:
    spelt = list(page_parts([(5, "x"), (7, "y")]))
    assert spelt == ["Page 5: ", "x", "\n", "Page 7: ", "y", "\n"]


def test_nineteen_letter_pages_fit_with_their_answer() -> None:
    assert measure(question(letters(19)), aria(), PUBLISHED).fits
    assert not measure(question(letters(20)), aria(), PUBLISHED).fits


def refusal(asked: Question, processor: AriaProcessor, limits: Limits) -> str:
    with pytest.raises(ConfigError) as error:
        require_fit(measure(asked, processor, limits), asked, processor, SIZES, SPELLING)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_does_not_fit_is_answered_with_choices() -> None:
    asked, processor = question(letters(23)), aria()
    budget = measure(asked, processor, PUBLISHED)
    message = refusal(asked, processor, PUBLISHED)
    head, choices = message.split("; choose: ")
    assert head == (
        f"23 pages make a prompt of {budget.prompt_tokens:,} tokens, {budget.tokens:,} with an answer of "
        "4,096, and max_model_len is 38,400"
    )
    named = [re.sub(r" \(.*", "", choice) for choice in choices.split("; ")]
    assert named == ["pages=1-19", "size=490", "whole", "size=490 whole", f"len={budget.tokens}"]
    for name, image_size, is_split, count in (
        ("pages=1-19", 980, True, 19),
        ("size=490", 490, True, 23),
        ("whole", 980, False, 23),
        ("size=490 whole", 490, False, 23),
    ):
        cheaper = measure(
            question(letters(count)), read_as(processor, SIZES, image_size, is_split), PUBLISHED
        )
        assert f"{name} ({cheaper.tokens:,})" in choices


def test_choices_that_do_not_help_say_so() -> None:
    limits = dataclasses.replace(PUBLISHED, max_model_len=50_000, max_positions=2048, max_new_tokens=1)
    message = refusal(question(letters(12)), aria(), limits)
    assert "and the model's positions are 2,048" in message
    assert "pages=1 (1,8" in message
    assert re.search(r"size=490 \([\d,]+, still too many\); whole \([\d,]+, still too many\); ", message)
    assert re.search(r"size=490 whole \(1,[\d,]+\)", message)
    assert "no larger max_model_len: the model has 2,048 positions" in message


def test_not_even_one_page() -> None:
    limits = dataclasses.replace(PUBLISHED, max_model_len=1000, max_new_tokens=10)
    assert "not even the first one fits" in refusal(question(letters(1)), aria(), limits)


def test_a_shorter_answer_is_a_choice_where_the_pages_fit() -> None:
    asked = question(letters(20))
    prompt = measure(asked, aria(), PUBLISHED).prompt_tokens
    assert f"new={38400 - prompt}, a shorter answer" in refusal(asked, aria(), PUBLISHED)


def test_pages_in_another_order_are_counted_not_named() -> None:
    pages = letters(3)[::-1]
    limits = dataclasses.replace(PUBLISHED, max_model_len=4000, max_new_tokens=10)
    assert "choose: the first 2 pages of 3 (3," in refusal(question(pages), aria(), limits)


def test_a_prompt_that_fits_passes() -> None:
    asked = question(letters(2))
    require_fit(measure(asked, aria(), PUBLISHED), asked, aria(), SIZES, SPELLING)
    with pytest.raises(ConfigError, match="max_model_len=0 must be at least 1"):
        dataclasses.replace(PUBLISHED, max_model_len=0)
