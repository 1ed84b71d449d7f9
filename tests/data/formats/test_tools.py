from typing import Any

import pytest

from cantata.core.samples import DataError
from cantata.data.formats.chat import messages
from cantata.data.formats.tools import calls_text, definitions
from tests.data.formats.helpers import MEDIA, turns

ADD = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": "ä"}'}}


def test_definitions_as_text() -> None:
    assert definitions([{"name": "add"}]) == 'Available tools:\n[{"name": "add"}]'
    assert definitions(' [{"name":"add"}] ') == 'Available tools:\n[{"name":"add"}]'
    for none in (None, "", "[]", [], "null"):
        assert definitions(none) == ""
    with pytest.raises(DataError, match="bad tool call"):
        definitions([{"name": {1, 2}}])


def test_calls_as_json() -> None:
    one = '{"name": "add", "arguments": {"a": "ä"}}'
    assert calls_text({"tool_calls": [ADD]}) == one
    assert calls_text({"tool_calls": [ADD, ADD]}) == f"[{one}, {one}]"
    assert calls_text({"function_call": {"name": "add", "arguments": {"a": "ä"}}}) == one
    assert calls_text({"tool_calls": [{"function": {"name": "now", "arguments": None}}]}) == (
        '{"name": "now", "arguments": {}}'
    )
    assert calls_text({"tool_calls": None}) == calls_text({"tool_calls": []}) == ""


@pytest.mark.parametrize(
    "calls", ["x", [3], [{}], [{"function": {"name": 3}}], [{"name": "a", "arguments": "{"}], 3]
)
def test_bad_calls(calls: Any) -> None:
    with pytest.raises(DataError, match="bad tool call"):
        calls_text({"tool_calls": calls})


def test_a_message_may_call_with_and_without_words() -> None:
    call = '{"name": "add", "arguments": {"a": "ä"}}'
    record = {
        "tools": [{"name": "add"}],
        "messages": [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": None, "tool_calls": [ADD]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "Once more.", "tool_calls": [ADD]},
        ],
    }
    assert turns(messages(record, MEDIA)) == [
        ("system", 'Available tools:\n[{"name": "add"}]'),
        ("user", "?"),
        ("assistant", call),
        ("tool", "2"),
        ("assistant", f"Once more.\n{call}"),
    ]
