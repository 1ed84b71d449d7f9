"""Conversations: OpenAI's messages, Aria's, sharegpt, LLaVA and alpaca, by one way of reading turns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cantata.core.samples import Chat, DataError, Message
from cantata.data.formats.attached import Attached, Piece, Ref, load, ref_of
from cantata.data.formats.base import Media, Record, keys_of, required, text_of
from cantata.data.formats.tools import calls_text, definitions

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
"""The role of a turn by the name a data set gives it. What an assistant calls it says; what comes back is a
tool's."""

TEXT_PARTS = ("text", "input_text", "output_text")
MEDIA_PARTS = {
    **dict.fromkeys(("image", "image_url", "input_image"), "image"),
    **dict.fromkeys(("video", "video_url"), "video"),
    "pdf": "pdf",
}


def messages(record: Record, media: Media) -> Chat:
    """`messages` with a `role` and a `content` of text or typed parts, as OpenAI and Aria's authors write."""
    return conversation(required(record, "messages"), record, media)


def sharegpt(record: Record, media: Media) -> Chat:
    """`conversations` with `from` and `value`, with images in order of their placeholders: LLaVA's too."""
    return conversation(required(record, "conversations"), record, media)


def alpaca(record: Record, media: Media) -> Chat:
    """`instruction`, `input`, `output`; `history` holds earlier pairs of question and answer."""
    past = record.get("history")
    pairs = list(past) if isinstance(past, Sequence) and not isinstance(past, str) else [past] if past else []
    turns = []
    for pair in pairs:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise DataError("bad text", f"history holds {repr(pair)[:60]}, no question with its answer")
        turns += [_turn("user", pair[0]), _turn("assistant", pair[1])]
    question = text_of(required(record, "instruction"), "instruction")
    if record.get("input") is not None and text_of(record["input"], "input"):
        question = f"{question}\n{record['input']}" if question else record["input"]
    turns += [_turn("user", question), _turn("assistant", required(record, "output"))]
    return conversation(turns, record, media)


def conversation(turns: Any, record: Record, media: Media) -> Chat:
    """A chat from its turns and the record's `system`, `tools` and media. Raises `DataError`."""
    if not isinstance(turns, Sequence) or isinstance(turns, (str, bytes)):
        raise DataError("unknown format", f"the conversation is {repr(turns)[:60]}, no list of turns")
    if not turns:
        raise DataError("no messages")
    for place, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise DataError("unknown format", f"turn {place} is {repr(turn)[:60]}")
    attached = Attached(record, frozenset(kind for turn in turns for kind in _places(turn)))
    read = [_read(turn, place, attached) for place, turn in enumerate(turns)]
    attached.check()
    system = text_of(record["system"], "system") if record.get("system") is not None else ""
    _prepend_system(read, system, definitions(record.get("tools")))
    if not any(_is_learned(role, weight) for role, _, weight in read):
        raise DataError("nothing to learn", f"roles: {', '.join(role for role, _, _ in read)}")
    return Chat(tuple(Message(role, load(pieces, media), weight) for role, pieces, weight in read))


Turn = tuple[str, list[Piece], float | None]


def _turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _read(turn: Mapping[str, Any], place: int, attached: Attached) -> Turn:
    named = turn.get("role") if turn.get("role") is not None else turn.get("from")
    role = ROLES.get(named.lower()) if isinstance(named, str) else None
    if role is None:
        raise DataError("unknown role", f"turn {place}: {repr(named)[:60]}")
    where = f"turn {place} ({named})"
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    calls = calls_text(turn)
    pieces: list[Piece] = []
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        for part in content:
            pieces += _typed(part, where, attached)
    elif content is not None or not calls:
        pieces = attached.split(text_of(content, where), literal_without_media=False)
    if calls:
        pieces += ["\n", calls] if any(pieces) else [calls]
    return role, pieces, _weight(turn, where)


def _typed(part: Any, where: str, attached: Attached) -> list[Piece]:
    if not isinstance(part, Mapping):
        raise DataError("bad text", f"{where} holds {repr(part)[:60]}, no typed part")
    kind = part.get("type")
    if kind in TEXT_PARTS:
        return attached.split(text_of(part.get("text"), where), literal_without_media=True)
    if kind not in MEDIA_PARTS:
        raise DataError("unsupported content", f"{where}: {kind!r} with {keys_of(part)}")
    own = _own_ref(part)
    return [own if own is not None else attached.take(MEDIA_PARTS[kind])]


def _own_ref(part: Mapping[str, Any]) -> Ref | None:
    """What a typed part itself names; None where the next file of the record is meant."""
    kind = MEDIA_PARTS[part["type"]]
    others = {name: value for name, value in part.items() if name not in ("type", "text", "detail")}
    for name in (part["type"], kind, f"{kind}_url", "image_url", "url", "path", "bytes"):
        value = others.pop(name, None)
        if value is None:
            continue
        if name == "bytes" or not isinstance(value, Mapping):
            value = {"bytes" if isinstance(value, bytes) else "path": value}
        inner = {key: item for key, item in value.items() if key != "detail"}
        return ref_of({**others, **inner}, kind)
    return None


def _places(turn: Mapping[str, Any]) -> list[str]:
    """Kinds of the typed parts that wait for a file of the record."""
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    if not isinstance(content, Sequence) or isinstance(content, (str, bytes)):
        return []
    parts = [part for part in content if isinstance(part, Mapping) and part.get("type") in MEDIA_PARTS]
    return [MEDIA_PARTS[part["type"]] for part in parts if _own_ref(part) is None]


def _weight(turn: Mapping[str, Any], where: str) -> float | None:
    """The weight a turn asks for: 0 where `loss` is false, else its `weight`, else 1 for `loss: true`."""
    loss, weight = turn.get("loss"), turn.get("weight")
    if loss is not None and not isinstance(loss, bool):
        raise DataError("bad weight", f"{where}: loss is {loss!r}, neither true nor false")
    if weight is not None:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise DataError("bad weight", f"{where}: weight is {repr(weight)[:60]}")
        if not math.isfinite(weight) or weight < 0:
            raise DataError("bad weight", f"{where}: weight is {weight}")
    if loss is False:
        return 0.0
    if weight is not None:
        return float(weight)
    return None if loss is None else 1.0


def _is_learned(role: str, weight: float | None) -> bool:
    return role == "assistant" if weight is None else weight > 0


def _prepend_system(turns: list[Turn], system: str, tools: str) -> None:
    """The record's system prompt before, and its tools after, what a first system turn says."""
    if not system and not tools:
        return
    role, pieces, weight = turns[0]
    if role != "system":
        turns.insert(0, ("system", [*_joined([system], [tools])], None))
    else:
        turns[0] = ("system", _joined([system], pieces, [tools]), weight)


def _joined(*texts: list[Piece]) -> list[Piece]:
    """Pieces with an empty line between those that are not empty."""
    joined: list[Piece] = []
    for pieces in texts:
        if any(pieces):
            joined += ["\n\n", *pieces] if joined else pieces
    return joined
