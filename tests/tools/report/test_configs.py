"""What differs between configurations."""

from cantata.tools.report.configs import Difference, differences, flatten


def test_keys_are_dotted_and_values_text() -> None:
    config = {"a": {"b": 1, "c": {"d": [1, "x"]}}, "e": None, "f": {}, "g": "null", "h": "", "i": True}
    assert flatten(config) == {
        "a.b": "1",
        "a.c.d": '[1, "x"]',
        "e": "null",
        "f": "{}",
        "g": '"null"',
        "h": '""',
        "i": "true",
    }


def test_only_what_differs_is_told() -> None:
    one = {"lr": 1e-3, "model": {"size": 1, "lora": {"r": 8}}, "same": [1]}
    two = {"lr": 1e-3, "model": {"size": 2}, "same": [1], "new": None}
    assert differences([one, two, one]) == [
        Difference("model.size", ["1", "2", "1"]),
        Difference("model.lora.r", ["8", None, "8"]),
        Difference("new", [None, "null", None]),
    ]
    assert differences([one]) == []
    assert differences([one, one]) == []


def test_a_text_is_not_its_number() -> None:
    assert differences([{"seed": 1}, {"seed": "1"}]) == [Difference("seed", ["1", '"1"'])]
