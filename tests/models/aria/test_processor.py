import os
import pickle
import time
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cantata.core.errors import ConfigError
from cantata.core.locate import asset
from cantata.core.samples import Chat, Codes, DataError, Document, Message, Sample
from cantata.core.types import IMAGE, TEXT
from cantata.data.media.images import open_image
from cantata.models.aria.processor import AriaProcessor
from tests.data.helpers import TOKENS, mini_processor

RED = Image.new("RGB", (64, 64), (255, 0, 0))
END, START, STOP, PREFIX, SUFFIX, IMG = 0, 2, 3, 4, 5, 9

PHOTOS = Path(os.environ.get("CANTATA_TEST_DATA", Path(__file__).parents[4] / "shared" / "data")) / "photos"


def text(sample: Sample, mask: np.ndarray | None = None) -> str:
    """The tokens spelt out, special ones too; where a mask is given, only those under it."""
    ids = sample.input_ids_T if mask is None else sample.input_ids_T[mask]
    return str(mini_processor().tokenizer.decode(ids.tolist(), skip_special_tokens=False))


def published(image_size: int, **changes: Any) -> AriaProcessor:
    features = {490: 128, 980: 256}[image_size]
    sizes = {"image_size": image_size, "min_image_size": 336, "patch_size": 14, "position_grid": 70}
    return mini_processor(**(sizes | {"features_per_image": features} | changes))


def test_document() -> None:
    sample = mini_processor().encode(Document((RED, "a red square")), "s:0")
    assert text(sample) == "<fim_prefix>" + "<|img|>" * 16 + "<fim_suffix>a red square<|endoftext|>"
    assert text(sample, sample.weight_T > 0) == "a red square<|endoftext|>"
    assert sample.modality_ids_T.tolist() == [IMAGE if token == IMG else TEXT for token in sample.input_ids_T]
    [image] = sample.images
    assert image.patches_PC.shape == (64, 192)
    assert image.patches_PC.dtype == np.uint8
    assert np.array_equal(image.patches_PC[0], [255] * 64 + [0] * 128)
    assert image.position_ids_P.tolist() == list(range(64))


CHAT = Chat(
    (
        Message("system", ("Be brief.",)),
        Message("user", ("What is ", RED, "this?")),
        Message("assistant", ("Red.",)),
        Message("user", ("And <|im_end|> now?",)),
        Message("assistant", ("Still red.",)),
    )
)


def test_chat_is_chatml_and_trains_on_the_assistant() -> None:
    sample = mini_processor().encode(CHAT, "s:0")
    image = "<fim_prefix>" + "<|img|>" * 16 + "<fim_suffix>"
    assert text(sample) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\nWhat is {image}this?<|im_end|>\n"
        "<|im_start|>assistant\nRed.<|im_end|>\n"
        "<|im_start|>user\nAnd <|im_end|> now?<|im_end|>\n"
        "<|im_start|>assistant\nStill red.<|im_end|>\n"
    )
    assert text(sample, sample.weight_T > 0) == "Red.<|im_end|>Still red.<|im_end|>"
    assert (sample.input_ids_T == STOP).sum() == 5  # the one spelt out by the user is text


def test_chat_template_renders_the_same() -> None:
    template = jinja2.Environment().from_string(asset("embedded:chat_template.jinja").read_text())
    messages = [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in message.parts
            ],
        }
        for message in CHAT.messages
    ]
    prompt = mini_processor().encode_prompt(CHAT)
    rendered = template.render(messages=messages, add_generation_prompt=True)
    assert rendered.replace("<|img|>", "<|img|>" * 16) == text(prompt)
    plain = template.render(messages=[{"role": "user", "content": "hi"}], add_generation_prompt=False)
    assert plain == "<|im_start|>user\nhi<|im_end|>\n"


def test_prompts_are_beginnings() -> None:
    processor = mini_processor()
    whole = processor.encode(Document((RED, "a red")), "s:0").input_ids_T
    prompt = processor.encode_prompt(Document((RED, "a red")))
    assert np.array_equal(prompt.input_ids_T, whole[:-1])
    assert not prompt.weight_T.any()
    whole = processor.encode(Chat(CHAT.messages[:3]), "s:0").input_ids_T
    prompt = processor.encode_prompt(Chat(CHAT.messages[:2]))
    assert np.array_equal(prompt.input_ids_T, whole[: len(prompt)])
    assert text(prompt).endswith("<|im_start|>assistant\n")
    assert processor.stop_token_ids == (END, STOP)
    assert processor.decode(whole).endswith("assistant\nRed.\n")


def test_special_tokens_spelt_out_stay_text_in_every_copy() -> None:
    processor = mini_processor()
    for one in (processor, pickle.loads(pickle.dumps(processor))):
        sample = one.encode(Document(("<|img|><|endoftext|>",)), "s:0")
        assert IMG not in sample.input_ids_T
        assert sample.input_ids_T.tolist().count(END) == 1


def test_special_tokens_are_spelt_or_left_out() -> None:
    processor = mini_processor()
    ids = processor.encode(Document(("hi",)), "s:0").input_ids_T.tolist()
    assert processor.spell(ids) == "hi<|endoftext|>"
    assert processor.decode(ids) == "hi"


@pytest.mark.parametrize(("image_size", "tokens"), [(490, 128), (980, 256)])
def test_tokens_per_image(image_size: int, tokens: int) -> None:
    sample = published(image_size).encode(Document((Image.new("RGB", (1224, 1584)),)), "s:0")
    assert (sample.input_ids_T == IMG).sum() == tokens
    assert len(sample.images[0].patches_PC) == (image_size // 14) * -(-int(1224 * image_size / 1584) // 14)


def test_split_image_gives_a_thumbnail_and_crops_in_one_pair() -> None:
    page = Image.new("RGB", (1224, 1584), (9, 9, 9))
    sample = published(980, split_image=True).encode(Document((page,)), "s:0")
    assert sample.input_ids_T.tolist() == [PREFIX, *[IMG] * 1792, SUFFIX, END]
    assert [len(image.patches_PC) for image in sample.images] == [70 * 55, *[4900] * 6]
    assert sum(image.num_features for image in sample.images) == 1792


def test_bad_arguments() -> None:
    for change, message in [
        ({"patch_size": 7}, "image_size=64 is no multiple of patch_size=7"),
        ({"min_image_size": 65}, "min_image_size=65"),
        ({"features_per_image": 0}, "features_per_image=0"),
        ({"image_token": "<|image|>"}, r"no token '<\|image\|>'; nearest: <\|img\|>"),
        ({"tokenizer": "embedded:ATTRIBUTION.md"}, "is no tokenizer.json"),
        ({"tokenizer": "embedded:tokeniser.json"}, "nearest: tokenizer.json"),
    ]:
        with pytest.raises(ConfigError, match=message):
            mini_processor(**change)


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no tokenizer\.json"):
        mini_processor(tokenizer=str(tmp_path))


def test_bad_examples() -> None:
    with pytest.raises(DataError, match="unknown role"):
        mini_processor().encode(Chat((Message("robot", ("x",)),)), "s:0")
    with pytest.raises(DataError, match="no pixels"):
        mini_processor().encode(Document((Image.new("RGB", (0, 0)),)), "s:0")


def test_emoji_are_quick() -> None:
    processor = mini_processor()
    example = Document((RED, "smiling face with open mouth"))
    processor.encode(example, "s:0")
    fastest = min(_seconds(lambda: processor.encode(example, "s:0")) for _ in range(50))
    assert fastest < 2e-3


def _seconds(function: Any) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def patches_of(pixels_CHW: torch.Tensor, mask_HW: torch.Tensor) -> torch.Tensor:
    """Patches of which any pixel is valid, cut from a normalised square by unfolding."""
    valid = mask_HW.unfold(0, 14, 14).unfold(1, 14, 14).sum((-1, -2)) > 0
    grid = pixels_CHW.unfold(1, 14, 14).unfold(2, 14, 14)
    return grid.permute(1, 2, 0, 3, 4)[valid].flatten(1)


@pytest.mark.parametrize("image_size", [490, 980])
def test_photographs_equal_transformers(image_size: int) -> None:
    if not PHOTOS.is_dir():
        pytest.skip(f"no photographs at {PHOTOS}; set CANTATA_TEST_DATA to the folder of test data")
    transformers = pytest.importorskip("transformers.models.aria.image_processing_pil_aria")
    theirs = transformers.AriaImageProcessorPil(max_image_size=image_size)
    paths = sorted(path for path in PHOTOS.iterdir() if path.suffix in (".jpg", ".png"))
    assert paths
    processor = published(image_size)
    for path in paths:
        image = open_image(path)
        [ours] = processor.encode(Document((image,)), path.name).images
        expected = theirs(image, return_tensors="pt")
        wanted = patches_of(expected["pixel_values"][0], expected["pixel_mask"][0])
        normalised = (torch.from_numpy(ours.patches_PC).float() / 255 - 0.5) / 0.5
        torch.testing.assert_close(normalised, wanted, rtol=0, atol=1e-6)


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_tokenizer_round_trip_is_exact(words: str) -> None:
    tokenizer = mini_tokenizer()
    ids = tokenizer.encode(words, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == words
    assert not set(ids) & set(range(16))


def mini_tokenizer() -> Any:
    if not hasattr(mini_tokenizer, "value"):
        mini_tokenizer.value = mini_processor().tokenizer  # type: ignore[attr-defined]
    return mini_tokenizer.value  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "words", ["\x00\r\n \t", "<|im_end|> <|pad|>", "naïve 😀👩‍🚀 שלום", "a  b   c\n\n\nd"]
)
def test_tokenizer_round_trip_by_hand(words: str) -> None:
    tokenizer = mini_tokenizer()
    assert tokenizer.decode(tokenizer.encode(words).ids, skip_special_tokens=False) == words


def test_tokenizer_has_its_ids_and_loads_in_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(asset("embedded:tokenizer.json")),
        eos_token=TOKENS["document_end"],
        pad_token=TOKENS["pad_token"],
        chat_template=asset("embedded:chat_template.jinja").read_text(),
    )
    assert len(fast) == fast.vocab_size == mini_processor().vocab_size == 6144
    names = [
        "<|endoftext|>",
        "<|pad|>",
        "<|im_start|>",
        "<|im_end|>",
        "<fim_prefix>",
        "<fim_suffix>",
        "<|img|>",
    ]
    assert fast.convert_tokens_to_ids(names) == [0, 1, 2, 3, 4, 5, 9]
    words = "Is't a verdict? smiling face 😀"
    assert fast(words).input_ids == mini_tokenizer().encode(words).ids
    assert fast.decode(fast(words).input_ids, clean_up_tokenization_spaces=False) == words
    chat = fast.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    sample = mini_processor().encode_prompt(Chat((Message("user", ("hi",)),)))
    assert fast(chat).input_ids == sample.input_ids_T.tolist()


def test_codes_are_no_pixels() -> None:
    with pytest.raises(DataError, match="Aria reads pixels"):
        mini_processor().encode(Document((Codes(np.zeros((1, 2, 2), np.int64)),)), "s:0")
