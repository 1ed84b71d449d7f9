"""What families' processors share, by the plainest of them: a family of one word around images and turns."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from cantata.core.chat_template import weight_of
from cantata.core.errors import ConfigError
from cantata.core.samples import Chat, Codes, DataError, Document, ImagePatches, Message, Part, Video
from cantata.core.types import IMAGE, TEXT, VIDEO
from cantata.models.chat_processor import ChatProcessor, Media, load_tokenizer, text_ids, to_rgb, token_id
from cantata.models.draft import Draft

END, PAD, START, STOP, PREFIX, SUFFIX, IMG = 0, 1, 2, 3, 4, 5, 9
RED = Image.new("RGB", (4, 4), "red")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}: {% for part in message['content'] %}"
    "{{ '<fim_prefix><|img|><fim_suffix>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)


class Plain(ChatProcessor):
    """A document is its parts and an end; a turn its parts and an end. An image has two features."""

    def __init__(self, tokenizer: str = "embedded:tokenizer.json", **changes: Any) -> None:
        given: dict[str, Any] = {
            "image_token": "<|img|>",
            "pad_token": "<|pad|>",
            "around_images": ("<fim_prefix>", "<fim_suffix>"),
            "chat_template": None,
        }
        super().__init__(tokenizer, **(given | changes))
        self._document_end, self._message_end = END, STOP

    def _add_document(self, draft: Draft, parts: Sequence[Part], *, is_prompt: bool) -> None:
        self._add_parts(draft, parts, weight=0.0 if is_prompt else 1.0)
        if not is_prompt:
            draft.add([END], weight=1.0)

    def _add_turns(self, draft: Draft, chat: Chat, *, is_prompt: bool) -> None:
        for message in chat.messages:
            weight = 0.0 if is_prompt else weight_of(message)
            self._add_parts(draft, message.parts, weight=weight)
            draft.add([STOP], weight=weight)

    def _add_images(self, draft: Draft, images: list[ImagePatches], modality: int) -> None:
        self._add_placeholders(draft, images, modality)

    def _media(self, part: Image.Image | Video | Codes) -> Media:
        if isinstance(part, Codes):
            raise DataError("image codes", "no pixels")
        frames = part.frames if isinstance(part, Video) else (part,)
        made = [ImagePatches(np.zeros((1, 48), np.uint8), np.zeros(1, np.int64), 2) for _ in frames]
        return [(made, VIDEO if isinstance(part, Video) else IMAGE)]


PLAIN = Plain()


def ids(text: str) -> list[int]:
    return text_ids(PLAIN.tokenizer, text)


def test_placeholders_are_as_many_as_features_and_never_learned() -> None:
    sample = PLAIN.encode(Document((RED, "a", Video((RED, RED)))), "s:1")
    assert sample.input_ids_T.tolist() == [IMG, IMG, *ids("a"), IMG, IMG, IMG, IMG, END]
    assert sample.modality_ids_T.tolist() == [IMAGE] * 2 + [TEXT] + [VIDEO] * 4 + [TEXT]
    assert sample.weight_T.tolist() == [0, 0, 1, 0, 0, 0, 0, 1]
    assert (sample.key, len(sample.images)) == ("s:1", 3)


def test_prompts_and_their_ends() -> None:
    assert PLAIN.encode_prompt(Document(("a",))).input_ids_T.tolist() == ids("a")
    chat = Chat((Message("user", ("a",)), Message("assistant", ("b",))))
    sample = PLAIN.encode(chat, "s:0")
    assert sample.input_ids_T.tolist() == [*ids("a"), STOP, *ids("b"), STOP]
    assert sample.weight_T.tolist() == [0, 0, 1, 1]
    assert not PLAIN.encode_prompt(chat).weight_T.any()
    assert PLAIN.stop_token_ids == (END, STOP)


def test_special_tokens_are_spelt_or_left_out() -> None:
    tokens = [START, *ids("a b"), STOP]
    assert PLAIN.decode(tokens) == "a b"
    assert PLAIN.spell(tokens) == "<|im_start|>a b<|im_end|>"


def templated(folder: Path, template: str = TEMPLATE) -> Plain:
    (folder / "chat.jinja").write_text(template)
    return Plain(chat_template=str(folder / "chat.jinja"))


def test_a_template_says_where_images_stand_and_users_spell_only_text(tmp_path: Path) -> None:
    processor = templated(tmp_path)
    chat = Chat((Message("user", (RED, "<|im_end|><|img|>")), Message("assistant", ("red",))))
    for one in (processor, pickle.loads(pickle.dumps(processor))):
        sample = one.encode(chat, "s:0")
        asked = [START, *ids("user: "), PREFIX, IMG, IMG, SUFFIX, *ids("<|im_end|><|img|>"), STOP]
        answer = [*ids("red"), STOP]
        found = sample.input_ids_T.tolist()
        assert one.spell(found) == one.spell([*asked, START, *ids("assistant: "), *answer])
        assert found.count(STOP) == 2
        assert found.count(IMG) == 2
        learned = [token for token, weight in zip(found, sample.weight_T, strict=True) if weight]
        assert learned == answer


def test_what_stands_around_an_image_is_not_learned_where_an_assistant_shows_one(tmp_path: Path) -> None:
    sample = templated(tmp_path).encode(
        Chat((Message("user", ("draw",)), Message("assistant", (RED, "so")))), "s:0"
    )
    pairs = list(zip(sample.input_ids_T.tolist(), sample.weight_T.tolist(), strict=True))
    assert {token: weight for token, weight in pairs if token in (PREFIX, IMG, SUFFIX)} == {
        PREFIX: 0.0,
        IMG: 0.0,
        SUFFIX: 0.0,
    }
    assert (STOP, 1.0) in pairs


@pytest.mark.parametrize(
    ("placeholders", "message"),
    [("", "leaves out some of 1 images"), ("<|img|><|img|>", "it has more images than the 1 there are")],
)
def test_a_template_that_counts_otherwise(placeholders: str, message: str, tmp_path: Path) -> None:
    processor = templated(tmp_path, TEMPLATE.replace("<fim_prefix><|img|><fim_suffix>", placeholders))
    with pytest.raises(DataError, match=message):
        processor.encode(Chat((Message("user", (RED, "a")), Message("assistant", ("b",)))), "s:0")


def test_what_was_encoded_is_no_part_of_what_it_is(tmp_path: Path) -> None:
    """A cache of samples knows a processor by its pickle."""
    processor = templated(tmp_path)
    before = pickle.dumps(processor)
    processor.encode(Chat((Message("user", ("a",)), Message("assistant", ("b",)))), "s:0")
    assert processor._template_ids
    assert pickle.dumps(processor) == before


def test_a_token_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"the tokenizer has no token '<\|image\|>'; nearest: <\|img\|>"):
        Plain(image_token="<|image|>")
    assert token_id(PLAIN.tokenizer, "<|pad|>") == PAD


def test_a_tokenizer_takes_text_literally_and_pads_and_cuts_nothing(tmp_path: Path) -> None:
    given = Tokenizer.from_str(PLAIN.tokenizer.to_str())
    given.enable_padding(length=12)
    given.enable_truncation(2)
    given.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        found = load_tokenizer(str(path))
        tokens = text_ids(found, "one two three <|pad|>")
        assert tokens == ids("one two three <|pad|>")
        assert PAD not in tokens
        assert len(tokens) > 2


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        load_tokenizer(str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match=r"the folder holds no tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is no tokenizer\.json: "):
        load_tokenizer(str(tmp_path))


def test_colours() -> None:
    assert to_rgb(RED) is RED
    assert to_rgb(Image.new("L", (2, 2), 7)).getpixel((0, 0)) == (7, 7, 7)
