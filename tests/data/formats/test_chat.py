import contextlib
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cantata.core.samples import DataError
from cantata.data.formats.chat import alpaca, messages, sharegpt
from tests.data.formats.helpers import MEDIA, turns

ANSWER = {"role": "assistant", "content": "yes"}


def asked(content: Any, **record: Any) -> list[tuple[Any, ...]]:
    """What becomes of a user's content; the answer is left out."""
    told = turns(messages({"messages": [{"role": "user", "content": content}, ANSWER], **record}, MEDIA))
    assert told[-1] == ("assistant", "yes")
    return told[:-1]


def refused(record: dict[str, Any], reason: str, read: Any = messages) -> str:
    with pytest.raises(DataError) as caught:
        read(record, MEDIA)
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)
    return caught.value.detail


def test_plain_messages_and_roles() -> None:
    record = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": ""},
            {"role": "tool", "content": "42", "tool_call_id": "a"},
            {"role": "Assistant", "content": "Hello"},
        ]
    }
    assert turns(messages(record, MEDIA)) == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant",),
        ("tool", "42"),
        ("assistant", "Hello"),
    ]


@pytest.mark.parametrize(
    ("part", "loaded"),
    [
        ({"type": "image", "image": "a.png"}, ("image", "a.png")),
        ({"type": "image", "image": b"raw"}, ("image", b"raw")),
        ({"type": "image", "image": {"bytes": b"raw", "path": "a.png"}}, ("image", b"raw")),
        ({"type": "image", "bytes": None, "path": "a.png"}, ("image", "a.png")),
        ({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, ("image", "a.png")),
        (
            {"type": "image_url", "image_url": "data:image/png;base64,aGk="},
            ("image", "data:image/png;base64,aGk="),
        ),
        ({"type": "input_image", "image_url": "a.png", "detail": "auto"}, ("image", "a.png")),
        ({"type": "video", "video": "a.mp4", "fps": 2.0}, ("video", "a.mp4", {"fps": 2.0})),
        (
            {"type": "video", "path": "a.mp4", "num_frames": 9, "text": None},
            ("video", "a.mp4", {"num_frames": 9}),
        ),
        ({"type": "video", "video": ["1.png", "2.png"]}, ("video", ["1.png", "2.png"])),
        ({"type": "video_url", "video_url": {"url": "a.mp4"}}, ("video", "a.mp4")),
    ],
)
def test_typed_parts_with_their_own_file(part: dict[str, Any], loaded: tuple[Any, ...]) -> None:
    content = [{"type": "text", "text": "See <image>: "}, part, {"type": "input_text", "text": " ok"}]
    assert asked(content) == [("user", "See <image>: ", loaded, " ok")]


def test_pages_of_a_pdf_stand_in_a_row() -> None:
    pages = [("pdf", "a.pdf", {"pages": "1-2", "page": page}) for page in (1, 2)]
    assert asked([{"type": "pdf", "pdf": "a.pdf", "pages": "1-2"}, {"type": "text", "text": "?"}]) == [
        ("user", *pages, "?")
    ]
    assert asked("<pdf>?", pdf={"path": "a.pdf", "pages": "1-2"}) == [("user", *pages, "?")]


def test_aria_takes_images_in_the_order_of_typed_parts() -> None:
    image = {"type": "image", "text": None}
    content = [image, {"type": "text", "text": "or <image>? "}, image]
    record: dict[str, Any] = {"images": ["1.png", "2.png"], "video": {"path": None, "num_frames": None}}
    assert asked(content, **record) == [("user", ("image", "1.png"), "or <image>? ", ("image", "2.png"))]
    detail = refused(
        {"messages": [{"role": "user", "content": content}, ANSWER], "images": ["1.png"]},
        "wrong number of images",
    )
    assert detail == "2 places for 1 images"


def test_aria_video_with_its_frames() -> None:
    content = [{"type": "video", "text": None}, {"type": "text", "text": "?"}]
    asked_for = {"path": "a.mp4", "num_frames": 150}
    assert asked(content, video=asked_for, images=None) == [
        ("user", ("video", "a.mp4", {"num_frames": 150}), "?")
    ]
    for none in (0, -1, None):
        assert asked(content, video={"path": "a.mp4", "num_frames": none}) == [
            ("user", ("video", "a.mp4"), "?")
        ]


def test_placeholders_are_consumed_in_order() -> None:
    record = {
        "system": "Look.",
        "conversations": [
            {"from": "human", "value": "<image><video>Who?<image>"},
            {"from": "gpt", "value": "They."},
        ],
        "images": ["1.png", {"bytes": None, "path": "2.png"}],
        "videos": ["a.mp4"],
    }
    assert turns(sharegpt(record, MEDIA)) == [
        ("system", "Look."),
        ("user", ("image", "1.png"), ("video", "a.mp4"), "Who?", ("image", "2.png")),
        ("assistant", "They."),
    ]
    llava = {"id": "7", "image": "1.png", "conversations": record["conversations"]}
    assert refused(llava, "wrong number of images", sharegpt) == "2 places for 1 images"
    llava["conversations"] = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "They."}]
    assert turns(sharegpt(llava, MEDIA))[0] == ("user", ("image", "1.png"), "\nWho?")


@pytest.mark.parametrize("images", [None, [], ["1.png", "2.png"]])
def test_a_placeholder_without_its_file_is_never_text(images: Any) -> None:
    record = {"messages": [{"role": "user", "content": "<image>?"}, ANSWER], "images": images}
    refused(record, "wrong number of images")
    refused(
        {"messages": [{"role": "user", "content": "?"}, ANSWER], "videos": ["a.mp4"]},
        "wrong number of videos",
    )


def test_files_are_counted_before_they_are_read() -> None:
    record = {"messages": [{"role": "user", "content": "<image><image>"}, ANSWER], "images": ["gone"]}
    refused(record, "wrong number of images")
    record["images"] = ["gone", "gone"]
    refused(record, "missing file")


def test_loss_and_weight_of_a_message() -> None:
    def weight(**keys: Any) -> float | None:
        record = {"messages": [{"role": "user", "content": "?"}, ANSWER, {**ANSWER, **keys}]}
        return messages(record, MEDIA).messages[-1].weight

    assert weight() is None
    assert weight(loss=None, weight=None) is None
    assert (weight(loss=False), weight(loss=True)) == (0.0, 1.0)
    assert (weight(weight=0.5), weight(weight=2), weight(weight=0)) == (0.5, 2.0, 0.0)
    assert (weight(loss=True, weight=0.5), weight(loss=False, weight=0.5)) == (0.5, 0.0)
    for bad in ({"loss": "no"}, {"weight": -1}, {"weight": math.nan}, {"weight": "1"}, {"weight": True}):
        refused({"messages": [ANSWER, {**ANSWER, **bad}]}, "bad weight")
    user = {"conversations": [{"from": "human", "value": "I am", "loss": True}]}
    assert turns(sharegpt(user, MEDIA)) == [("user", "I am", 1.0)]


def test_nothing_to_learn() -> None:
    refused({"messages": [{"role": "user", "content": "?"}]}, "nothing to learn")
    refused({"messages": [{**ANSWER, "loss": False}]}, "nothing to learn")


def test_tools_calls_and_observations() -> None:
    record = {
        "tools": '[{"name": "add"}]',
        "conversations": [
            {"from": "system", "value": "Be exact."},
            {"from": "human", "value": "1 + 1?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "Two."},
        ],
    }
    assert turns(sharegpt(record, MEDIA)) == [
        ("system", 'Be exact.\n\nAvailable tools:\n[{"name": "add"}]'),
        ("user", "1 + 1?"),
        ("assistant", '{"name": "add", "arguments": {"a": 1}}'),
        ("tool", "2"),
        ("assistant", "Two."),
    ]


def test_alpaca() -> None:
    record = {
        "system": "Be brief.",
        "history": [["a?", "b"]],
        "instruction": "Add",
        "input": "1 2",
        "output": "3",
    }
    assert turns(alpaca(record, MEDIA)) == [
        ("system", "Be brief."),
        ("user", "a?"),
        ("assistant", "b"),
        ("user", "Add\n1 2"),
        ("assistant", "3"),
    ]
    assert turns(alpaca({"instruction": "Add", "input": "", "output": "3", "history": None}, MEDIA)) == [
        ("user", "Add"),
        ("assistant", "3"),
    ]
    refused({"instruction": math.nan, "output": "x"}, "bad text", alpaca)
    refused({"instruction": "x", "output": None}, "unknown format", alpaca)
    refused({"instruction": "x", "output": "y", "history": [["a"]]}, "bad text", alpaca)


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"role": "user", "content": None}, "bad text"),
        ({"role": "user", "content": math.nan}, "bad text"),
        ({"role": "user", "content": 3}, "bad text"),
        ({"role": "user", "content": {"a": 1}}, "bad text"),
        ({"role": "user", "content": ["a"]}, "bad text"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "bad text"),
        ({"role": "user", "content": "\ud800"}, "bad text"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "unsupported content"),
        ({"role": "user", "content": [{"text": "x"}]}, "unsupported content"),
        ({"role": "king", "content": "x"}, "unknown role"),
        ({"role": None, "content": "x"}, "unknown role"),
        ({"content": "x"}, "unknown role"),
        ("hello", "unknown format"),
        ({"role": "user", "content": [{"type": "image", "image": ""}]}, "missing image"),
    ],
)
def test_odd_turns(turn: Any, reason: str) -> None:
    refused({"messages": [turn, ANSWER]}, reason)


def test_odd_conversations() -> None:
    refused({"text": "x"}, "unknown format")
    refused({"messages": "x"}, "unknown format")
    refused({"messages": []}, "no messages")
    refused({"messages": [ANSWER], "audios": ["a.wav"]}, "unsupported content")
    refused({"messages": [ANSWER], "image": "a", "images": ["b"]}, "bad image reference")
    refused({"messages": [ANSWER], "system": 3}, "bad text")


TEXT = st.text(st.characters(codec="utf-8"), max_size=20).filter(lambda text: "<" not in text)
PIECES = st.lists(TEXT | st.sampled_from(["image", "video"]).map(lambda kind: (kind,)), max_size=6)
NAMES = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


@given(st.lists(st.tuples(st.sampled_from(sorted(NAMES)), PIECES), min_size=1, max_size=6))
def test_every_way_of_writing_a_conversation_reads_back_the_same(
    said: list[tuple[str, list[Any]]],
) -> None:
    said = [*said, ("assistant", ["done"])]
    files: dict[str, list[str]] = {"image": [], "video": []}
    expected, typed, owned, marked = [], [], [], []
    for role, pieces in said:
        turn: list[Any] = [role]
        typed_parts, owned_parts, text = [], [], ""
        for piece in pieces:
            if isinstance(piece, str):
                typed_parts.append({"type": "text", "text": piece})
                owned_parts.append({"type": "text", "text": piece})
                text += piece
                if piece and isinstance(turn[-1], str) and len(turn) > 1:
                    turn[-1] += piece
                elif piece:
                    turn.append(piece)
            else:
                [kind] = piece
                files[kind].append(f"{len(files[kind])}.{kind}")
                turn.append((kind, files[kind][-1]))
                typed_parts.append({"type": kind, "text": None})
                owned_parts.append({"type": kind, kind: files[kind][-1]})
                text += f"<{kind}>"
        expected.append(tuple(turn))
        typed.append({"role": role, "content": typed_parts})
        owned.append({"role": role, "content": owned_parts})
        marked.append({"from": NAMES[role], "value": text})
    attached = {"images": files["image"], "videos": files["video"]}
    assert turns(messages({"messages": owned}, MEDIA)) == expected
    assert turns(messages({"messages": typed, **attached}, MEDIA)) == expected
    assert turns(sharegpt({"conversations": marked, **attached}, MEDIA)) == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(
    [
        "role",
        "from",
        "content",
        "value",
        "type",
        "text",
        "image",
        "image_url",
        "video",
        "path",
        "bytes",
        "url",
        "loss",
        "weight",
        "tool_calls",
        "function",
        "name",
        "arguments",
        "messages",
        "conversations",
        "instruction",
        "input",
        "output",
        "history",
        "system",
        "tools",
        "images",
        "videos",
        "pdf",
    ]
)
SHAPED = st.recursive(
    JSON | st.sampled_from(["user", "assistant", "image", "video", "text", "<image>", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=20,
)


@given(st.dictionaries(KEYS, SHAPED, max_size=6), st.sampled_from([messages, sharegpt, alpaca]))
def test_whatever_a_record_holds_only_data_errors_come_out(record: dict[str, Any], read: Any) -> None:
    with contextlib.suppress(DataError):
        read(record, MEDIA)
