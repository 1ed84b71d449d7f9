"""Tokens to text while they come: only what no later token can change, and nothing from a stop text on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"
"""What a tokenizer of bytes decodes the first bytes of a character to."""


class TextStream:
    """The text of one generation, piece by piece; the pieces together are the whole of it.

    Args:
        decode: text of tokens, special tokens left out.
        spell: text of tokens, special tokens spelt out; a stop text may be one of them.
        stop: texts that end the generation; neither they nor what follows is given out.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        spell: Callable[[Sequence[int]], str],
        stop: Sequence[str],
    ) -> None:
        self._decode = decode
        self._spell = spell
        self._stop = stop
        # Tokenizers write a token otherwise at the beginning of a text, so some that are done stay in sight.
        self._window: list[int] = []
        self._done_tokens = 0
        self._done_letters = 0
        self._held = ""
        self.is_stopped = False
        """Whether a stop text came."""

    def add(self, token: int) -> str:
        """What is final with one more token."""
        if self._stop and not self._decode([token]) and self._spell([token]) in self._stop:
            piece = self.finish()
            self.is_stopped = True
            return piece
        self._window.append(token)
        text = self._decode(self._window)
        whole = text.rstrip(_UNFINISHED)
        piece, self._done_letters = whole[self._done_letters :], max(self._done_letters, len(whole))
        if piece and whole == text:
            self._window = self._window[self._done_tokens :]
            self._done_tokens = len(self._window)
            self._done_letters = len(self._decode(self._window))
        return self._upto_stop(piece)

    def finish(self) -> str:
        """What was held back, at the end of the generation."""
        if self.is_stopped:
            return ""
        return self._upto_stop(self._decode(self._window)[self._done_letters :]) + self._release()

    def _upto_stop(self, piece: str) -> str:
        """Of what is held back and the piece, what is before a stop text and cannot be part of one."""
        self._held += piece
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            self._held = self._held[: min(found)]
            return self._release()
        kept = max((_beginning(self._held, stop) for stop in self._stop), default=0)
        return self._release(len(self._held) - kept)

    def _release(self, count: int | None = None) -> str:
        free = len(self._held) if count is None else count
        piece, self._held = self._held[:free], self._held[free:]
        return piece


def _beginning(text: str, stop: str) -> int:
    """Letters at the end of the text that the stop text begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
