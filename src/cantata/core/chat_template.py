"""Conversations through a Jinja chat template, exact to the token: what is whose, and what is learned.

A conversation is rendered with *marks* in place of its texts, so that nothing that a user writes can pass for
the template's own, and once more with the texts. Where the first, its marks replaced by the texts (or by
the texts without the spaces around them, as many templates trim), is the second to the letter, it says what
the template wrote and where each text stands. A template that does anything else to the texts is refused.

What an assistant says is what stands in `{% generation %}`. A template without it is rendered turn by turn:
the turn begins where the rendering of all before it, with the generation prompt, ends, and ends with the
last special token that the template writes after its text. Each of these renderings must be a beginning of
the whole, or the template is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any, NamedTuple

from jinja2 import TemplateError

from cantata.core.chat_sandbox import GENERATION_END, GENERATION_START, compile_template, read_template
from cantata.core.errors import ConfigError
from cantata.core.samples import Chat, DataError, Message, Video

ASSISTANT = "assistant"
ROLES = ("system", "user", ASSISTANT, "tool")

MARK = re.compile("\ue000(\\d+)\ue001")
_MARK_OR_GENERATION = re.compile(f"{MARK.pattern}|[{GENERATION_START}{GENERATION_END}]")
_REASON = "chat template"

_PROBE = Chat(tuple(Message(role, ("x",)) for role in ("user", ASSISTANT) * 2))


class Piece(NamedTuple):
    """A stretch of a rendered conversation."""

    text: str
    is_template: bool
    """Written by the template: a special token spelt in it is one. What users write is only text."""
    weight: float
    """Weight of predicting it in the loss."""


class _Span(NamedTuple):
    start: int
    end: int
    weight: float


def weight_of(message: Message) -> float:
    """Weight of a turn in the loss; raises `DataError` for an unknown role."""
    if message.role not in ROLES:
        raise DataError("unknown role", f"{message.role!r} is none of {', '.join(ROLES)}")
    if message.weight is not None:
        return message.weight
    return 1.0 if message.role == ASSISTANT else 0.0


class ChatTemplate:
    """A chat template of a checkpoint, or one of our own.

    Args:
        path: where it lies; see `cantata.core.chat_sandbox.read_template`.
        special_tokens: the tokenizer's special tokens that may end a turn, as it spells them.

    Raises `ConfigError` where there is none, it does not compile, or no mask can be told from it.
    """

    def __init__(self, path: str, special_tokens: Sequence[str]) -> None:
        self.source, self._tokens = read_template(path)
        # Every sample of a run is told the same date; no other template differs from run to run.
        self._now = datetime.now() if "strftime_now" in self.source else datetime.min
        self._special = re.compile("|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True))))
        self._marks_generation = "endgeneration" in self.source
        self._texts_are_lists = False
        try:
            self._template = compile_template(self.source, self._now)
            self._texts_are_lists = not self._takes_strings()
            self.render(_PROBE)
        except (TemplateError, DataError) as error:
            raise ConfigError(f"chat template {path}: {' '.join(str(error).split())}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_template"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._template = compile_template(self.source, self._now)

    def render(self, chat: Chat, add_generation_prompt: bool = False) -> list[Piece]:
        """The conversation in pieces; images stand in the template's pieces as it spells them.

        Raises `DataError` where the template refuses the conversation, leaves out or changes one of its
        texts, or is none from which a mask can be told.
        """
        weights = [weight_of(message) for message in chat.messages]
        texts = [
            [part for part in message.parts if isinstance(part, str)] or [""] for message in chat.messages
        ]
        plain = self._run(chat, texts, add_generation_prompt)
        # A template may ask whether a text is empty; then no mark may stand for an empty one.
        for mark_empty in (True, False):
            marked = _marks(texts, mark_empty)
            whole = self._run(chat, marked, add_generation_prompt)
            shown = _match(whole, plain, [text for turn in texts for text in turn])
            if shown is not None:
                break
        else:
            raise DataError(_REASON, "it leaves out or changes what the turns say")
        if add_generation_prompt:
            weights = [0.0] * len(weights)
        return list(_pieces(whole, shown, self._spans(chat, marked, whole, weights)))

    def _takes_strings(self) -> bool:
        """Whether content may be a string; a template of a multimodal model may take lists of parts alone."""
        marked = _marks([["x"]] * len(_PROBE.messages), True)
        try:
            return len(MARK.findall(self._run(_PROBE, marked, False))) == len(marked)
        except DataError:
            return False

    def _run(self, chat: Chat, texts: Sequence[Sequence[str]], add_generation_prompt: bool) -> str:
        messages = [self._message(*turn) for turn in zip(chat.messages, texts, strict=True)]
        try:
            return self._template.render(
                messages=messages, tools=None, add_generation_prompt=add_generation_prompt, **self._tokens
            )
        except Exception as error:  # a template can raise anything
            raise DataError(_REASON, f"it refuses the conversation: {error}") from error

    def _message(self, message: Message, texts: Sequence[str]) -> dict[str, Any]:
        """One turn as templates take it: parts in a list, or one string where all are text."""
        if all(isinstance(part, str) for part in message.parts) and not self._texts_are_lists:
            return {"role": message.role, "content": "".join(texts)}
        rest = iter(texts)
        parts: list[dict[str, str]] = []
        for part in message.parts:
            if isinstance(part, str):
                parts.append({"type": "text", "text": next(rest)})
            else:
                parts += [{"type": "image"}] * (len(part.frames) if isinstance(part, Video) else 1)
        return {"role": message.role, "content": parts or [{"type": "text", "text": next(rest)}]}

    def _spans(
        self, chat: Chat, marked: list[list[str]], whole: str, weights: Sequence[float]
    ) -> list[_Span]:
        """The learned stretches of the marked rendering, in order."""
        spans = []
        generated = self._generated(chat, marked, whole) if self._marks_generation else {}
        for index, weight in enumerate(weights):
            if not weight:
                continue
            if index in generated:
                spans.append(_Span(*generated[index], weight))
            else:
                spans.append(_Span(*self._turn(chat, marked, whole, index), weight))
        return sorted(spans)

    def _generated(self, chat: Chat, marked: list[list[str]], whole: str) -> dict[int, tuple[int, int]]:
        """The `{% generation %}` stretch of each assistant turn."""
        found = [
            (match.start(), match.end())
            for match in re.finditer(f"{GENERATION_START}[^{GENERATION_END}]*{GENERATION_END}", whole)
        ]
        turns = [index for index, message in enumerate(chat.messages) if message.role == ASSISTANT]
        if len(found) != len(turns):
            raise DataError(_REASON, f"{len(found)} generation blocks for {len(turns)} assistant turns")
        for (start, end), index in zip(found, turns, strict=True):
            if any(not start < mark.start() < end for mark in _find(marked[index], whole)):
                raise DataError(_REASON, "a generation block does not hold what its turn says")
        return dict(zip(turns, found, strict=True))

    def _turn(self, chat: Chat, marked: list[list[str]], whole: str, index: int) -> tuple[int, int]:
        """Start and end of what turn `index` says, its end-of-turn token included."""
        upto = self._run(Chat(chat.messages[: index + 1]), marked[: index + 1], False)
        marks = _find(marked[index], whole)
        start = min((mark.start() for mark in marks), default=-1)
        last = max((mark.end() for mark in marks), default=0)
        if chat.messages[index].role == ASSISTANT:
            prompt = self._run(Chat(chat.messages[:index]), marked[:index], True)
            start, last = len(prompt), max(last, len(prompt))
        else:
            prompt = ""
        if not (upto.startswith(prompt) and whole.startswith(upto)) or last > len(upto):
            raise DataError(
                _REASON,
                "what it writes up to a turn is no beginning of the whole conversation, so that no mask can "
                "be told; put {% generation %} around what the assistant says",
            )
        ends = list(self._special.finditer(upto, last)) if self._special.pattern else []
        end = ends[-1].end() if ends else len(upto)
        if start < 0:
            # A turn of images alone: of it only its end can be learned.
            start = ends[-1].start() if ends else len(upto)
        return start, end


def _marks(texts: Sequence[Sequence[str]], mark_empty: bool) -> list[list[str]]:
    """A mark for each text, with its number."""
    numbers = iter(range(sum(map(len, texts))))
    return [
        [
            f"\ue000{number}\ue001" if text or mark_empty else ""
            for text, number in zip(turn, numbers, strict=False)
        ]
        for turn in texts
    ]


def _find(marks: Sequence[str], whole: str) -> list[re.Match[str]]:
    """Where the marks stand; one of an empty text may stand nowhere."""
    return [match for mark in marks if mark and (match := re.search(mark, whole))]


def _match(whole: str, plain: str, texts: Sequence[str]) -> dict[int, str] | None:
    """What stands for each mark in the rendering with the texts; None where they differ otherwise."""
    written = MARK.split(whole)
    if not plain.startswith(written[0]):
        return None
    shown: dict[int, str] = {}
    position = len(written[0])
    for name, after in zip(written[1::2], written[2::2], strict=True):
        number = int(name)
        text = texts[number]
        choices = (text, text.strip(), text.lstrip(), text.rstrip())
        fitting = next((choice for choice in choices if plain.startswith(choice + after, position)), None)
        if fitting is None or number in shown:
            return None
        shown[number] = fitting
        position += len(fitting) + len(after)
    is_whole = position == len(plain)
    said = {number for number, text in enumerate(texts) if text.strip()}
    return shown if is_whole and said <= shown.keys() else None


def _pieces(whole: str, shown: dict[int, str], spans: Sequence[_Span]) -> Iterator[Piece]:
    """The marked rendering cut at its marks and at the borders of the spans."""
    edges = [
        (0, 0.0),
        *((edge, weight) for span in spans for edge, weight in _edges(span)),
        (len(whole), 0.0),
    ]
    for (start, weight), (end, _) in pairwise(edges):
        position = start
        for match in _MARK_OR_GENERATION.finditer(whole, start, end):
            if match.start() > position:
                yield Piece(whole[position : match.start()], True, weight)
            if match[1] is not None and shown[int(match[1])]:
                yield Piece(shown[int(match[1])], False, weight)
            position = match.end()
        if end > position:
            yield Piece(whole[position:end], True, weight)


def _edges(span: _Span) -> tuple[tuple[int, float], tuple[int, float]]:
    return (span.start, span.weight), (span.end, 0.0)
