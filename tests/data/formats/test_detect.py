from typing import Any

import pytest

from cantata.core.errors import ConfigError
from cantata.data.formats import Format, choose_format
from cantata.data.formats.chat import alpaca, messages, sharegpt
from cantata.data.formats.detect import fitting
from cantata.data.formats.document import image, text


@pytest.mark.parametrize(
    ("record", "formats", "read"),
    [
        ({"messages": [], "images": None, "id": 3}, [Format.messages], messages),
        ({"conversations": [], "images": ["a"]}, [Format.sharegpt], sharegpt),
        ({"conversations": [], "image": "a", "id": "1"}, [Format.llava], sharegpt),
        ({"instruction": "", "input": "", "output": ""}, [Format.alpaca], alpaca),
        ({"text": "", "meta": {}}, [Format.text], text),
        ({"image": b"", "text": "", "width": 3}, [Format.caption], text),
        ({"images": [b""], "txt": "", "caption": ""}, [Format.caption], text),
        ({"image": b"", "__key__": "a"}, [Format.image], image),
    ],
)
def test_by_its_keys(record: dict[str, Any], formats: list[Format], read: Any) -> None:
    assert fitting(record) == formats
    assert choose_format([record], Format.auto) is read
    assert choose_format([record], formats[0]) is read


def test_the_odd_one_among_the_first_records_does_not_decide() -> None:
    assert choose_format([{"odd": 1}, {"text": "x"}], Format.auto) is text
    assert (
        choose_format([{"conversations": [], "image": "a"}, {"conversations": []}], Format.auto) is sharegpt
    )
    assert choose_format([{"text": "x"}, {"text": "x", "image": "a"}], Format.auto) is text


def test_unknown_and_ambiguous() -> None:
    with pytest.raises(ConfigError, match=r"hold image, sentence, .*no format known: messages \(messages\)"):
        choose_format([{"image": b"", "sentence": ""}], Format.auto)
    with pytest.raises(ConfigError, match=r"several formats \(messages, text\).*format="):
        choose_format([{"messages": [], "text": "rendered"}], Format.auto)
    with pytest.raises(ConfigError, match=r"several formats \(alpaca, messages\)"):
        choose_format([{"messages": []}, {"instruction": "", "output": ""}], Format.auto)
    assert choose_format([{"messages": [], "text": "rendered"}], Format.messages) is messages
    with pytest.raises(
        ConfigError, match="format=alpaca reads instruction, output; the records hold messages"
    ):
        choose_format([{"messages": []}], Format.alpaca)
    assert choose_format([{"image": b"", "sentence": ""}], Format.image) is image
