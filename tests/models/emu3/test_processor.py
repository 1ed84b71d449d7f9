"""What Emu3 reads: the published form, weights, modalities, conversations, prompts, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cantata.core.errors import ConfigError
from cantata.core.samples import Chat, Codes, DataError, Document, Message, Sample, Video
from cantata.core.types import IMAGE, TEXT, VIDEO
from cantata.models.emu3 import Emu3Processor
from tests.models.emu3.small import TOKENS, grid, small_processor

PROCESSOR = small_processor()
V = TOKENS.visual_offset
IMG = Codes(np.array([[[0, 1, 2], [3, 4, 15]]]))
CLIP = Codes(np.array([[[1], [2]], [[3], [4]]]))
PUBLISHED_STYLE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}"
    "{% endif %}{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<image>' }}"
    "{% endif %}{% endfor %}{% for content in message['content'] %}{% if content['type'] == 'text' %}"
    "{{ content['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)


def text_ids(text: str) -> list[int]:
    ids: list[int] = PROCESSOR.tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def image_ids(size: str, *rows: list[int]) -> list[int]:
    """As the paper writes it; every row but the last token of a frame is codes and `eol`."""
    lines = [token for row in rows for token in ([V + code for code in row] + [TOKENS.eol])]
    return [TOKENS.boi, *text_ids(size), TOKENS.img, *lines, TOKENS.eof, TOKENS.eoi]


def ids(sample: Sample) -> list[int]:
    return list(sample.input_ids_T.tolist())


def spans(sample: Sample) -> list[tuple[str, float, int]]:
    """Stretches of one weight and modality, spelt."""
    found: list[list[Any]] = []
    arrays = (sample.input_ids_T, sample.weight_T, sample.modality_ids_T)
    for fields in zip(*(array.tolist() for array in arrays), strict=True):
        if found and found[-1][1:] == list(fields[1:]):
            found[-1][0].append(fields[0])
        else:
            found.append([[fields[0]], *fields[1:]])
    return [(PROCESSOR.spell(tokens), weight, modality) for tokens, weight, modality in found]


def test_an_image_after_its_text() -> None:
    sample = PROCESSOR.encode(Document(("a red circle", IMG)), "s:1")
    expected = [TOKENS.bos, *text_ids("a red circle"), *image_ids("2*3", [0, 1, 2], [3, 4, 15]), TOKENS.eos]
    assert ids(sample) == expected
    image = "<boi>2*3<img><visual 0><visual 1><visual 2><eol><visual 3><visual 4><visual 15><eol><eof><eoi>"
    assert spans(sample) == [
        ("<bos>", 0.0, TEXT),
        ("a red circle", 1.0, TEXT),
        (image, 0.5, IMAGE),
        ("<eos>", 0.5, TEXT),
    ]
    assert (sample.key, sample.images) == ("s:1", ())


def test_text_after_an_image_is_learned_up_to_its_end() -> None:
    sample = PROCESSOR.encode(Document((IMG, "a cat")), "s")
    assert [span[1:] for span in spans(sample)] == [(0.0, TEXT), (0.5, IMAGE), (1.0, TEXT)]
    assert spans(sample)[-1][0] == "a cat<eos>"


def test_frames_of_a_clip_end_each() -> None:
    sample = PROCESSOR.encode(Document((CLIP,)), "s")
    line = "<visual {}><eol><visual {}><eol><eof>"
    assert spans(sample)[1] == (f"<boi>2*1<img>{line.format(1, 2)}{line.format(3, 4)}<eoi>", 0.5, VIDEO)


@pytest.mark.parametrize(("text", "vision"), [(1.0, 0.0), (0.0, 1.0), (0.25, 0.75)])
def test_both_weights_are_free(text: float, vision: float) -> None:
    sample = small_processor(text_weight=text, vision_weight=vision).encode(Document(("a", IMG)), "s")
    is_vision = sample.modality_ids_T == IMAGE
    assert set(sample.weight_T[is_vision].tolist()) == {vision}
    assert set(sample.weight_T[~is_vision][1:-1].tolist()) == {text}
    assert sample.weight_T[-1] == vision, "the end weighs what is before it"


def test_what_a_prompt_leaves_out() -> None:
    """Nothing of it is learned; an image's prompt is the beginning of what training shows."""
    trained = ids(PROCESSOR.encode(Document(("a red circle", IMG)), "s"))
    prompt = PROCESSOR.encode_image_prompt("a red circle", 2, 3)
    assert ids(prompt) == trained[: len(prompt)]
    assert trained[len(prompt)] == V
    asked = PROCESSOR.encode_prompt(Document((IMG,)))
    assert ids(asked) == ids(PROCESSOR.encode(Document((IMG, "x")), "s"))[: len(asked)]
    assert not prompt.weight_T.any()
    assert not asked.weight_T.any()
    null = PROCESSOR.encode_image_prompt("", 10, 7)
    assert ids(null) == [TOKENS.bos, TOKENS.boi, *text_ids("10*7"), TOKENS.img]
    assert null.modality_ids_T.tolist() == [TEXT] + [IMAGE] * (len(null) - 1)


def test_a_conversation_is_emu3_chats() -> None:
    chat = Chat((Message("user", (IMG, "What is it?")), Message("assistant", ("A cat.",))))
    sample = PROCESSOR.encode(chat, "s")
    begin = [TOKENS.bos, *text_ids("You are a helpful assistant. USER: ")]
    image = image_ids("2*3", [0, 1, 2], [3, 4, 15])
    asked = [*begin, *image, *text_ids("What is it?. ASSISTANT:")]
    answer = [*text_ids(" A cat."), TOKENS.eos]
    assert ids(sample) == [*asked, *answer]
    assert sample.weight_T.tolist() == [0.0] * len(asked) + [1.0] * len(answer)
    assert ids(PROCESSOR.encode_prompt(Chat(chat.messages[:1]))) == asked


def test_turns_weigh_themselves_and_images_can_be_answers() -> None:
    chat = Chat(
        (
            Message("system", ("Draw.",)),
            Message("user", ("a cat",), weight=0.5),
            Message("assistant", (IMG,)),
            Message("user", ("thanks",)),
            Message("assistant", ("ok",), weight=0.0),
        )
    )
    sample = PROCESSOR.encode(chat, "s")
    assert [(text, weight) for text, weight, _ in spans(sample) if weight] == [
        ("a cat.", 0.5),
        (PROCESSOR.spell(image_ids("2*3", [0, 1, 2], [3, 4, 15])), 0.5),
        ("<eos>", 0.5),
    ]
    assert PROCESSOR.spell(ids(sample)).startswith("<bos>Draw. USER: a cat. ASSISTANT:<boi>")
    with pytest.raises(DataError, match="unknown role"):
        PROCESSOR.encode(Chat((Message("judge", ("x",)),)), "s")


def test_a_chat_template(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(PUBLISHED_STYLE)
    processor = small_processor(chat_template=str(tmp_path / "chat.jinja"))
    chat = Chat((Message("user", (IMG, "What <image> is it?")), Message("assistant", ("A cat",))))
    sample = processor.encode(chat, "s")
    image = PROCESSOR.spell(image_ids("2*3", [0, 1, 2], [3, 4, 15]))
    spelt = f"<bos>USER: {image}What <image> is it? ASSISTANT: A cat <eos>"
    assert processor.spell(ids(sample)) == spelt
    assert "".join(text for text, weight, _ in spans(sample) if weight) == "A cat <eos>"
    assert not processor.encode_prompt(chat).weight_T.any()
    again = pickle.loads(pickle.dumps(processor))
    assert ids(again.encode(chat, "s")) == ids(sample)


def test_a_chat_template_that_loses_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(PUBLISHED_STYLE.replace("<image>", ""))
    processor = small_processor(chat_template=str(tmp_path / "chat.jinja"))
    with pytest.raises(DataError, match="leaves out some of 1 images"):
        processor.encode(Chat((Message("user", (IMG, "x")), Message("assistant", ("y",)))), "s")


def test_text_is_only_ever_text() -> None:
    spelt = "<|im_end|><visual 3><eos><boi>"
    for processor in (PROCESSOR, pickle.loads(pickle.dumps(PROCESSOR))):
        sample = processor.encode(Document((spelt,)), "s")
        assert min(ids(sample)[1:-1]) > 15
        assert max(ids(sample)[1:-1]) < TOKENS.bos
        assert processor.decode(ids(sample)) == spelt


def test_decoding_leaves_images_and_their_sizes_out() -> None:
    tokens = ids(PROCESSOR.encode(Document(("5*5 is ", IMG, " 25", CLIP, "!")), "s"))
    assert PROCESSOR.decode(tokens) == "5*5 is  25!"
    assert PROCESSOR.decode([V, TOKENS.eol, TOKENS.pad, 6155]) == ""
    assert PROCESSOR.spell([TOKENS.pad, V + 7, *text_ids(" a b"), TOKENS.eoi]) == "<pad><visual 7> a b<eoi>"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Image.new("RGB", (4, 4)), "run `cantata tokenize` first"),
        (Video((Image.new("RGB", (4, 4)),)), "run `cantata tokenize` first"),
        (Codes(np.array([[[16]]])), "16 to 16 are not all of 0 to 15"),
        (Codes(np.array([[[-1, 3]]])), "-1 to 3 are not all of 0 to 15"),
        (Codes(np.zeros((1, 0, 3), np.int64)), r"their shape is \(1, 0, 3\)"),
        (Codes(np.zeros((2, 3), np.int64)), r"their shape is \(2, 3\)"),
    ],
)
def test_parts_that_are_no_codes_of_ours(part: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        PROCESSOR.encode(Document((part,)), "s")


def test_narrow_codes_do_not_wrap() -> None:
    narrow = Codes(np.array([[[3]]], dtype=np.uint8))
    assert V + 3 in ids(PROCESSOR.encode(Document((narrow,)), "s"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_weight": -1.0}, "text_weight=-1.0 must be at least 0"),
        ({"text_weight": 0.0, "vision_weight": 0.0}, "both 0: nothing would be learned"),
        ({"tokens": TOKENS.__class__(**{**vars(TOKENS), "eol": 300})}, "id 300 is .* ordinary text"),
        ({"tokens": TOKENS.__class__(**{**vars(TOKENS), "visual_offset": 6120})}, "ordinary text"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_processor(**changes)


def test_what_it_says_of_itself() -> None:
    assert (PROCESSOR.vocab_size, PROCESSOR.pad_token_id, PROCESSOR.stop_token_ids) == (6176, 1, (6145,))
    assert (PROCESSOR.patch_values, PROCESSOR.image_token_id) == (0, -1)
    assert isinstance(PROCESSOR, Emu3Processor)
    with pytest.raises(TypeError, match="reads images as tokens"):
        PROCESSOR.picture(None)  # type: ignore[arg-type]


def test_the_published_ids_add_up() -> None:
    """8 x 8 codes take 8 * 9 tokens and six around them besides the size."""
    sample = PROCESSOR.encode(Document(("", grid(1, 8, 8))), "s")
    assert len(sample) == 8 * 9 + 6 + len(text_ids("8*8"))
