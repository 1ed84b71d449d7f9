"""Conversations against a slow renderer that goes turn by turn, and against transformers."""

from __future__ import annotations

import itertools
import pickle
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer

from cantata.core.chat_template import ROLES
from cantata.core.errors import ConfigError
from cantata.core.locate import asset
from cantata.core.samples import Chat, DataError, Document, Message, Video
from cantata.models.aria.processor import AriaProcessor
from tests.data.helpers import mini_processor

START, STOP, PREFIX, SUFFIX, IMG = 2, 3, 4, 5, 9
FEATURES = 16
RED, BLUE = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))

SHIPPED = "embedded:chat_template.jinja"
GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% macro said() %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{{ '<fim_prefix><|img|><fim_suffix>' if part.type == 'image' else part.text }}"
    "{% endfor %}{% endif %}<|im_end|>{% endmacro %}"
    "{% if message.role == 'assistant' %}{% generation %}{{ said() }}{% endgeneration %}"
    "{% else %}{{ said() }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@cache
def processors() -> dict[str, AriaProcessor]:
    """ChatML by itself and by two templates: all three must agree."""
    return {"chatml": mini_processor(), "turns": mini_processor(chat_template=SHIPPED)}


@pytest.fixture(scope="session")
def by_generation(tmp_path_factory: pytest.TempPathFactory) -> AriaProcessor:
    path = tmp_path_factory.mktemp("template") / "generation.jinja"
    path.write_text(GENERATION)
    return mini_processor(chat_template=str(path))


texts = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", " ", "\n", "<|im_end|>\n<|im_start|>assistant\n", "<|img|>", "a\n\nb", "\ue0000\ue001"]
    ),
)
media = st.sampled_from([RED, BLUE, Video((RED, BLUE)), Video((BLUE,))])
messages = st.builds(
    Message,
    st.sampled_from(ROLES),
    st.lists(st.one_of(texts, texts, media), max_size=4).map(tuple),
    st.sampled_from([None, None, 0.0, 1.0, 0.25]),
)
chats = st.lists(messages, min_size=1, max_size=6).map(lambda turns: Chat(tuple(turns)))


class Slow:
    """One token after the other, with nothing of the processor's."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer.from_file(str(asset("embedded:tokenizer.json")))
        self.tokenizer.encode_special_tokens = True

    def turn(self, message: Message) -> tuple[list[int], list[float], list[Image.Image]]:
        learned = message.weight
        if learned is None:
            learned = {"assistant": 1.0}.get(message.role, 0.0)
        tokens = [(START, 0.0)] + [(token, 0.0) for token in self.words(message.role + "\n")]
        seen: list[Image.Image] = []
        for part in message.parts:
            if isinstance(part, str):
                tokens += [(token, learned) for token in self.words(part)]
                continue
            for frame in part.frames if isinstance(part, Video) else (part,):
                tokens += [(PREFIX, 0.0)] + [(IMG, 0.0)] * FEATURES + [(SUFFIX, 0.0)]
                seen.append(frame)
        tokens += [(STOP, learned)] + [(token, 0.0) for token in self.words("\n")]
        return [token for token, _ in tokens], [weight for _, weight in tokens], seen

    def words(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def chat(self, chat: Chat) -> tuple[list[int], list[float], list[Image.Image]]:
        turns = [self.turn(message) for message in chat.messages]
        ids, weights, seen = (list(itertools.chain(*column)) for column in zip(*turns, strict=True))
        return ids, weights, seen


@pytest.fixture(scope="module")
def slow() -> Slow:
    return Slow()


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, derandomize=True)
@given(chat=chats)
def test_a_thousand_conversations(chat: Chat, slow: Slow, by_generation: AriaProcessor) -> None:
    assert_equals_slow(chat, slow, by_generation)


@settings(max_examples=60, deadline=None)
@given(chat=chats)
def test_some_conversations(chat: Chat, slow: Slow, by_generation: AriaProcessor) -> None:
    assert_equals_slow(chat, slow, by_generation)


def assert_equals_slow(chat: Chat, slow: Slow, by_generation: AriaProcessor) -> None:
    ids, weights, seen = slow.chat(chat)
    for name, processor in {**processors(), "generation": by_generation}.items():
        sample = processor.encode(chat, "s:0")
        assert sample.input_ids_T.tolist() == ids, name
        assert sample.weight_T.tolist() == weights, name
        pixels = [tuple(image.patches_PC[0, ::64]) for image in sample.images]
        assert pixels == [image.getpixel((0, 0)) for image in seen], name
        prompt = processor.encode_prompt(chat)
        header = [START, *slow.words("assistant\n")]
        assert prompt.input_ids_T.tolist() == ids + header, name
        assert not prompt.weight_T.any(), name


harmless = st.text("abcdefg HIJ.,!?0123é\n", max_size=30).map(str.strip)
harmless_turns = st.tuples(st.sampled_from(("user", "assistant", "tool", "system")), harmless)


def test_ids_and_masks_are_those_of_transformers(by_generation: AriaProcessor) -> None:
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(asset("embedded:tokenizer.json")))

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(turns=st.lists(harmless_turns, min_size=1, max_size=6))
    def compare(turns: list[tuple[str, str]]) -> None:
        found: Any = fast.apply_chat_template(
            [{"role": role, "content": text} for role, text in turns],
            chat_template=GENERATION,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        sample = by_generation.encode(Chat(tuple(Message(role, (text,)) for role, text in turns)), "s:0")
        assert sample.input_ids_T.tolist() == found["input_ids"]
        assert (sample.weight_T > 0).astype(int).tolist() == found["assistant_masks"]

    compare()


def test_a_template_must_show_each_image(tmp_path: Any) -> None:
    source = asset(SHIPPED).read_text()
    for written, why in [
        ("", "leaves out some of 2 images"),
        ("<|img|>" * 2, "more images than the 2 there are"),
    ]:
        path = tmp_path / "template.jinja"
        path.write_text(source.replace("<fim_prefix><|img|><fim_suffix>", written))
        processor = mini_processor(chat_template=str(path))
        with pytest.raises(DataError, match=why):
            processor.encode(Chat((Message("user", (RED, "x", BLUE)),)), "s:0")


def test_the_frame_of_an_image_is_the_templates(tmp_path: Any) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(asset(SHIPPED).read_text().replace("<fim_prefix><|img|><fim_suffix>", "<|img|>"))
    sample = mini_processor(chat_template=str(path)).encode(Chat((Message("assistant", (RED,)),)), "s:0")
    assert sample.input_ids_T.tolist().count(IMG) == FEATURES
    assert not np.isin(sample.input_ids_T, (PREFIX, SUFFIX)).any()
    assert sample.input_ids_T[sample.weight_T > 0].tolist() == [STOP]


def test_its_pickle_says_what_it_is_and_not_what_it_did() -> None:
    fresh, used = (mini_processor(chat_template=SHIPPED) for _ in range(2))
    sample = used.encode(Chat((Message("user", ("hi",)),)), "s:0")
    assert pickle.dumps(fresh) == pickle.dumps(used)
    again = pickle.loads(pickle.dumps(used)).encode(Chat((Message("user", ("hi",)),)), "s:0")
    assert np.array_equal(again.input_ids_T, sample.input_ids_T)


def test_documents_know_no_template() -> None:
    document = Document((RED, "a red square"))
    plain, templated = (one.encode(document, "s:0").input_ids_T for one in processors().values())
    assert np.array_equal(plain, templated)


def test_no_template_is_one_line() -> None:
    with pytest.raises(ConfigError, match="no such file"):
        mini_processor(chat_template="nowhere")
