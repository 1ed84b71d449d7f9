import math

import pytest

from cantata.core.samples import DataError
from cantata.data.formats.base import keys_of, required, text_of


def test_text_or_a_reason() -> None:
    assert text_of("ä\n", "text") == "ä\n"
    for value, shown in (
        (None, "null"),
        (math.nan, "nan"),
        (3, "3"),
        (b"x", "b'x'"),
        ("\udfff", "surrogate"),
    ):
        with pytest.raises(DataError, match=rf"bad text \(text.*{shown}"):
            text_of(value, "text")


def test_keys_that_hold_nothing_are_absent() -> None:
    assert keys_of({"a": 1, "b": None, 3: 0}) == "a, 3"
    assert keys_of({}) == "no keys"
    assert required({"a": 0}, "a") == 0
    with pytest.raises(DataError, match="no 'b' among a"):
        required({"a": 1, "b": None}, "b")
