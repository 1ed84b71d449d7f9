"""Templates of many shapes: what is whose, what is learned, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from PIL import Image

from cantata.core.chat_template import ChatTemplate, Piece
from cantata.core.errors import ConfigError
from cantata.core.samples import Chat, DataError, Message, Video

SPECIAL = ("<s>", "</s>", "<|start|>", "<|end|>")
CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
GENERATION = CHATML.replace(
    "{{ m.content }}<|end|>\n",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% else %}"
    "{{ m.content }}<|end|>{% endif %}{{ '\n' }}",
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content|trim }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content|trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles!') }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role|upper }}: {{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
PARTS = (
    "{% for m in messages %}<|start|>{{ m.role }}:{% for p in m.content %}"
    "{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant:{% endif %}"
)


def template(folder: Path, source: str) -> ChatTemplate:
    (folder / "chat_template.jinja").write_text(source)
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
    return ChatTemplate(str(folder), SPECIAL)


def chat(*turns: str | tuple[str, float]) -> Chat:
    """Turns of user and assistant by turns, each a text or a text and its weight."""
    messages = []
    for number, turn in enumerate(turns):
        text, weight = (turn, None) if isinstance(turn, str) else turn
        messages.append(Message(("user", "assistant")[number % 2], (text,), weight))
    return Chat(tuple(messages))


def text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def learned(pieces: list[Piece]) -> list[tuple[str, float]]:
    """Learned stretches, neighbours of one weight joined."""
    found: list[tuple[str, float]] = []
    was_learned = False
    for piece in pieces:
        if piece.weight and was_learned and found[-1][1] == piece.weight:
            found[-1] = (found[-1][0] + piece.text, piece.weight)
        elif piece.weight:
            found.append((piece.text, piece.weight))
        was_learned = bool(piece.weight)
    return found


@pytest.mark.parametrize(
    ("source", "whole", "says"),
    [
        (
            CHATML,
            "<|start|>user\nhi <|end|><|end|>\n<|start|>assistant\nA<|end|>\n"
            "<|start|>user\n\n<|end|>\n<|start|>assistant\nB <|end|>\n",
            [("A<|end|>", 1.0), ("B <|end|>", 1.0)],
        ),
        (
            GENERATION,
            "<|start|>user\nhi <|end|><|end|>\n<|start|>assistant\nA<|end|>\n"
            "<|start|>user\n\n<|end|>\n<|start|>assistant\nB <|end|>\n",
            [("A<|end|>", 1.0), ("B <|end|>", 1.0)],
        ),
        (
            MISTRAL,
            "<s>[INST] hi <|end|> [/INST] A</s>[INST]  [/INST] B</s>",
            [(" A</s>", 1.0), (" B</s>", 1.0)],
        ),
        (
            PLAIN,
            "USER: hi <|end|>\n\nASSISTANT: A\n\nUSER: \n\n\nASSISTANT: B \n\n",
            [("A\n\n", 1.0), ("B \n\n", 1.0)],
        ),
    ],
)
def test_by_hand(source: str, whole: str, says: list[tuple[str, float]], tmp_path: Path) -> None:
    pieces = template(tmp_path, source).render(chat("hi <|end|>", "A", "\n", "B "))
    assert text(pieces) == whole
    assert learned(pieces) == says
    assert next(piece.text for piece in pieces if not piece.is_template) == "hi <|end|>"
    assert "hi" not in "".join(piece.text for piece in pieces if piece.is_template)


@pytest.mark.parametrize("source", [CHATML, GENERATION, PARTS])
def test_messages_weigh_themselves(source: str, tmp_path: Path) -> None:
    made = template(tmp_path, source)
    assert learned(made.render(chat(("a", 0.5), ("b", 0.0), ("c", 0.0), ("d", 2.0)))) == [
        ("a<|end|>", 0.5),
        ("d<|end|>", 2.0),
    ]
    assert learned(made.render(chat(("", 0.5), ""))) == [("<|end|>", 0.5), ("<|end|>", 1.0)]


def test_a_prompt_ends_with_the_header_and_is_not_learned(tmp_path: Path) -> None:
    for source in (CHATML, GENERATION):
        pieces = template(tmp_path, source).render(chat("a", "b", "c"), add_generation_prompt=True)
        assert text(pieces).endswith("c<|end|>\n<|start|>assistant\n")
        assert learned(pieces) == []


def test_images_stand_where_the_template_writes_them(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 2))
    said = Chat(
        (
            Message("user", ("<image>", image, Video((image, image)), "b"), 1.0),
            Message("assistant", (image,)),
        )
    )
    pieces = template(tmp_path, PARTS).render(said)
    assert (
        text(pieces)
        == "<|start|>user:<image><image><image><image>b<|end|>\n<|start|>assistant:<image><|end|>\n"
    )
    assert [piece.text for piece in pieces if not piece.is_template] == ["<image>", "b"]
    assert learned(pieces)[0] == ("<image><image><image><image>b<|end|>", 1.0)


def test_a_template_may_ask_whether_a_text_is_empty(tmp_path: Path) -> None:
    source = CHATML.replace("{{ m.content }}", "{{ m.content if m.content else '(nothing)' }}")
    assert learned(template(tmp_path, source).render(chat("a", ""))) == [("(nothing)<|end|>", 1.0)]


def test_what_users_write_cannot_pass_for_a_mark(tmp_path: Path) -> None:
    forged = "\ue0000\ue001\ue002x\ue003"
    for source in (CHATML, GENERATION, MISTRAL):
        pieces = template(tmp_path, source).render(chat(forged, forged, forged, forged))
        assert [piece.text for piece in pieces if not piece.is_template] == [forged] * 4
        assert all("\ue000" not in piece.text for piece in pieces if piece.is_template)


@pytest.mark.parametrize(
    ("said", "source", "why"),
    [
        (chat("a", "b <think> c"), CHATML.replace("m.content", "m.content.split('<think>')[0]"), "changes"),
        (chat("abcd" * 9, "b"), CHATML.replace("m.content", "m.content[:20]"), "changes what the turns say"),
        (chat(*"abcde"), CHATML.replace("in messages", "in messages[-4:]"), "leaves out"),
        (
            Chat((Message("system", ("x",)), *chat("a", "b").messages)),
            MISTRAL,
            "Only user and assistant roles",
        ),
        (Chat((Message("robot", ("x",)),)), CHATML, "unknown role"),
        (Chat((Message("user", (Image.new("RGB", (1, 1)), "x")),)), PLAIN, "leaves out"),
    ],
)
def test_refused_conversations(said: Chat, source: str, why: str, tmp_path: Path) -> None:
    made = template(tmp_path, source)
    with pytest.raises(DataError, match=why):
        made.render(said)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{% for m in messages %}", "chat template .*endfor"),
        ("hello", "leaves out or changes"),
        ("{{ messages[1].content }}", "leaves out or changes"),
        ("{{ ''.__class__.__mro__ }}", "refuses the conversation"),
        (CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif"), "no beginning of the whole"),
        (CHATML.replace("<|end|>\n{% endfor", "{{ '<|end|>' if loop.last }}\n{% endfor"), "no beginning"),
        (CHATML + "{% generation %}{% endgeneration %}", "1 generation blocks for 2 assistant turns"),
    ],
)
def test_templates_without_a_mask_are_one_line(source: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        template(tmp_path, source)
    assert "\n" not in str(caught.value)


def test_copies_render_the_same(tmp_path: Path) -> None:
    made = template(tmp_path, "{{ strftime_now('%H:%M:%S.%f') }}{{ {'a': '<é>'}|tojson }}" + CHATML)
    twin = pickle.loads(pickle.dumps(made))
    assert made.render(chat("a")) == twin.render(chat("a"))
    assert '{"a": "<é>"}<|start|>' in text(made.render(chat("a")))
