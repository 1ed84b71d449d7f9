"""Tool definitions and calls as text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cantata.core.samples import DataError
from cantata.data.formats.base import text_of

HEADER = "Available tools:\n"
"""Stands before the definitions at the end of the system prompt."""


def definitions(tools: Any) -> str:
    """The tools of a record for its system prompt; nothing where there are none."""
    if tools is None:
        return ""
    text = tools if isinstance(tools, str) else _json(tools, "tools")
    text = text_of(text, "tools").strip()
    return HEADER + text if text not in ("", "[]", "{}", "null") else ""


def calls_text(message: Mapping[str, Any]) -> str:
    """The `tool_calls` (or `function_call`) of an OpenAI message as JSON: an object, or a list of several.

    An object has `name` and `arguments`, as sharegpt's function calls have. Raises `DataError`.
    """
    calls = message.get("tool_calls")
    if calls is None and message.get("function_call") is not None:
        calls = [message["function_call"]]
    if calls is None:
        return ""
    if not isinstance(calls, Sequence) or isinstance(calls, (str, bytes)):
        raise DataError("bad tool call", f"tool_calls is {repr(calls)[:60]}")
    found = [_call(call) for call in calls]
    if not found:
        return ""
    return _json(found[0] if len(found) == 1 else found, "tool_calls")


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError("bad tool call", f"no function with a name: {repr(call)[:60]}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise DataError("bad tool call", f"the arguments of {function['name']}: {error}") from error
    return {"name": function["name"], "arguments": {} if arguments is None else arguments}


def _json(value: Any, where: str) -> str:
    try:
        return text_of(json.dumps(value, ensure_ascii=False, allow_nan=False), where)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError("bad tool call", f"{where}: {error}") from error
