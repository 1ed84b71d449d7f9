"""Documents and conversations as Mllama reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cantata.core.errors import ConfigError
from cantata.core.samples import Chat, Codes, DataError, Document, Message, Video
from cantata.core.types import IMAGE, TEXT, VIDEO
from cantata.models.mllama import MllamaProcessor
from tests.models.aria.mixed import SQUARE, TALL, WIDE, picture
from tests.models.mllama.small import small_processor

BEGIN, START, HEAD_END, TURN_END, END, IMG = 6, 2, 7, 3, 0, 9


@pytest.fixture(scope="module")
def processor() -> MllamaProcessor:
    return small_processor()


def text(processor: MllamaProcessor, words: str) -> list[int]:
    return processor.tokenizer.encode(words, add_special_tokens=False).ids


def test_a_document(processor: MllamaProcessor) -> None:
    """Images that it begins with stand before its beginning, as in the authors' prompts."""
    sample = processor.encode(Document((WIDE, TALL, "which is wider?", SQUARE, "all")), "d:0")
    first, second = text(processor, "which is wider?"), text(processor, "all")
    assert sample.input_ids_T.tolist() == [IMG, IMG, BEGIN, *first, IMG, *second, END]
    weights = [0, 0, 0, *[1] * len(first), 0, *[1] * len(second), 1]
    assert sample.weight_T.tolist() == weights
    assert set(sample.modality_ids_T.tolist()) == {TEXT, IMAGE}
    assert [len(image.patches_PC) for image in sample.images] == [8, 12, 16]
    assert all(image.num_features == 1 for image in sample.images)


def test_a_prompt_is_a_document_without_its_end(processor: MllamaProcessor) -> None:
    prompt = processor.encode_prompt(Document((WIDE, "It shows")))
    assert prompt.input_ids_T.tolist() == [IMG, BEGIN, *text(processor, "It shows")]
    assert not prompt.weight_T.any()


def test_a_conversation(processor: MllamaProcessor) -> None:
    chat = Chat((Message("user", (SQUARE, "Who?")), Message("assistant", ("Romeo.",))))
    newlines = text(processor, "\n\n")
    user = [START, *text(processor, "user"), HEAD_END, *newlines, IMG, *text(processor, "Who?"), TURN_END]
    header = [START, *text(processor, "assistant"), HEAD_END, *newlines]
    said = [*text(processor, "Romeo."), TURN_END]
    sample = processor.encode(chat, "c:0")
    assert sample.input_ids_T.tolist() == [BEGIN, *user, *header, *said]
    assert sample.weight_T.tolist() == [0] * (1 + len(user) + len(header)) + [1] * len(said)
    prompt = processor.encode_prompt(Chat(chat.messages[:1]))
    assert prompt.input_ids_T.tolist() == [BEGIN, *user, *header]


def test_a_clip_is_an_image_a_frame(processor: MllamaProcessor) -> None:
    clip = Video((SQUARE, TALL))
    sample = processor.encode(Document(("A clip:", clip)), "d:0")
    assert sample.input_ids_T.tolist() == [BEGIN, *text(processor, "A clip:"), IMG, IMG, END]
    assert sample.modality_ids_T.tolist().count(VIDEO) == 2


def test_text_that_spells_a_special_token_stays_text(processor: MllamaProcessor) -> None:
    sample = processor.encode(Document(("<|img|><|im_end|>",)), "d:0")
    assert not sample.images
    assert IMG not in sample.input_ids_T
    assert TURN_END not in sample.input_ids_T


def test_codes_are_refused(processor: MllamaProcessor) -> None:
    with pytest.raises(DataError, match="Mllama reads pixels"):
        processor.encode(Document((Codes(np.zeros((1, 2, 2), np.int64)),)), "d:0")


@pytest.mark.parametrize("size", [(8, 8), (31, 9), (5, 40), (64, 64)])
def test_the_picture_is_what_the_tower_sees(processor: MllamaProcessor, size: tuple[int, int]) -> None:
    image = processor.encode(Document((picture(1, *size),)), "d:0").images[0]
    made = processor.picture(image)
    assert made.width * made.height == len(image.patches_PC) * 16
    again = processor.encode(Document((made,)), "d:0").images[0]
    assert np.array_equal(again.patches_PC, image.patches_PC)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_token": "<|image|>"}, "the tokenizer has no token '<|image|>'"),
        ({"patch_size": 3}, "image_size=8 is no multiple of patch_size=3"),
        ({"max_num_tiles": 0}, "max_num_tiles=0 must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        small_processor(**changes)
    assert message in str(error.value)
