from typing import Any

import pytest

from cantata.core.samples import DataError
from cantata.data.formats.attached import Attached, attached_refs, load, ref_of
from tests.data.formats.helpers import MEDIA, shown


@pytest.mark.parametrize(
    ("item", "value", "options"),
    [
        ("a.mp4", "a.mp4", {}),
        (b"raw", b"raw", {}),
        (
            {"path": "a.mp4", "num_frames": 4, "start": 1.5, "end": None},
            "a.mp4",
            {"num_frames": 4, "start": 1.5},
        ),
        ({"bytes": b"raw", "path": "a.mp4"}, b"raw", {}),
        ({"url": "a.mp4", "num_frames": 0}, "a.mp4", {}),
        (["1.png"], ["1.png"], {}),
    ],
)
def test_references(item: Any, value: Any, options: dict[str, Any]) -> None:
    assert ref_of(item, "video") == ("video", value, options)


@pytest.mark.parametrize("item", [None, "", b"", {}, {"path": None, "bytes": None}])
def test_empty_references(item: Any) -> None:
    with pytest.raises(DataError, match="missing image"):
        ref_of(item, "image")


def test_one_or_a_list() -> None:
    assert [ref.value for ref in attached_refs({"image": "a"}, "image")] == ["a"]
    assert [ref.value for ref in attached_refs({"image": ["a", b"b"]}, "image")] == ["a", b"b"]
    assert [ref.value for ref in attached_refs({"videos": [["1.png"], "b"]}, "video")] == [["1.png"], "b"]
    assert attached_refs({"video": {"path": None, "num_frames": None}, "images": None}, "video") == []


def test_text_is_joined_and_empty_text_left_out() -> None:
    attached = Attached({"image": "a"})
    pieces = ["", "x", *attached.split("y<image>", literal_without_media=False), "", "z", ""]
    attached.check()
    assert shown(load(pieces, MEDIA)) == ["xy", ("image", "a"), "z"]
