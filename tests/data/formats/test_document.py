from typing import Any

import pytest

from cantata.core.samples import DataError
from cantata.data.formats.base import merged
from cantata.data.formats.document import image, text
from tests.data.formats.helpers import MEDIA, parts


def test_media_first_then_text() -> None:
    assert parts(text({"text": "hello"}, MEDIA)) == ["hello"]
    assert parts(text({"caption": "red", "image": "1.png"}, MEDIA)) == [("image", "1.png"), "red"]
    record = {"text": "red", "images": ["1.png", "2.png"], "video": "a.mp4", "caption": "unread"}
    assert parts(text(record, MEDIA)) == [("image", "1.png"), ("image", "2.png"), ("video", "a.mp4"), "red"]


def test_interleaved_at_placeholders() -> None:
    record = {"text": "one <image> two <image>", "images": ["1.png", "2.png"]}
    assert parts(text(record, MEDIA)) == ["one ", ("image", "1.png"), " two ", ("image", "2.png")]
    record["images"] = ["1.png"]
    with pytest.raises(DataError, match="wrong number of images"):
        text(record, MEDIA)
    assert parts(text({"text": "<image> is HTML's"}, MEDIA)) == ["<image> is HTML's"]


def test_images_alone() -> None:
    assert parts(image({"image": "1.png", "text": "unread"}, MEDIA)) == [("image", "1.png")]
    with pytest.raises(DataError, match="empty document"):
        image({"image": None}, MEDIA)


@pytest.mark.parametrize(
    ("record", "reason"),
    [({"image": "1.png"}, "unknown format"), ({"text": 3}, "bad text"), ({"text": ""}, "empty document")],
)
def test_bad_documents(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        text(record, MEDIA)


def test_members_of_a_webdataset() -> None:
    record = {"__key__": "7", "jpg": b"raw", "json": {"caption": "from json", "width": 3}}
    assert parts(text(merged(record), MEDIA)) == [("image", b"raw"), "from json"]
    record["txt"] = "from txt"
    assert parts(text(merged(record), MEDIA)) == [("image", b"raw"), "from txt"]
    two = merged({"0.png": b"a", "1.png": b"b", "mp4": b"c", "pdf": b"d", "png": "a column"})
    assert two == {"images": [b"a", b"b"], "videos": [b"c"], "pdf": b"d", "png": "a column"}
