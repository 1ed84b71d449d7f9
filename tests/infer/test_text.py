"""Text while it comes: whole characters, nothing from a stop text on, and all pieces together the whole."""

from __future__ import annotations

import pytest

from cantata.infer.text import TextStream
from tests.data.helpers import mini_processor

PROCESSOR = mini_processor()
WORDS = "naïve 😀👩‍🚀 日本 of the\n\n  end… \ufffd and on"


def bytewise(text: str) -> list[int]:
    """One token for each byte, as an unlucky model might write."""
    return [token for byte in text.encode() for token in [PROCESSOR.tokenizer.token_to_id(_letter(byte))]]


def _letter(byte: int) -> str:
    """How byte-level BPE spells a byte: printable Latin-1 as itself, others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return (
        chr(byte)
        if byte in printable
        else chr(256 + [b for b in range(256) if b not in printable].index(byte))
    )


def pieces(ids: list[int], *stop: str) -> tuple[list[str], TextStream]:
    stream = TextStream(PROCESSOR.decode, PROCESSOR.spell, stop)
    found = []
    for token in ids:
        found.append(stream.add(token))
        if stream.is_stopped:
            break
    return [*found, stream.finish()], stream


@pytest.mark.parametrize(
    "ids", [PROCESSOR.tokenizer.encode(WORDS).ids, bytewise(WORDS)], ids=["bpe", "bytes"]
)
def test_pieces_are_the_text_and_no_half_characters(ids: list[int]) -> None:
    found, _ = pieces(ids)
    assert "".join(found) == PROCESSOR.decode(ids) == WORDS
    assert sum("\ufffd" in piece for piece in found) == 1


def test_each_character_comes_with_its_last_byte() -> None:
    found, _ = pieces(bytewise("a😀b"))
    assert found == ["a", "", "", "", "😀", "b", ""]


def test_bytes_that_never_become_a_character_are_shown_at_the_end() -> None:
    found, _ = pieces(bytewise("ok 😀")[:-1])
    assert "".join(found[:-1]) == "ok "
    assert found[-1] == PROCESSOR.decode(bytewise("😀")[:-1])


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "e t"], "on"),
        ("ababac", ["abac"], "ab"),
        ("a\n\nb", ["\n\n"], "a"),
        ("日本語", ["本"], "日"),
        ("stops sto", ["stop!"], "stops sto"),
        ("xyz", ["x"], ""),
    ],
)
def test_text_ends_before_a_stop_text_that_spans_tokens(text: str, stop: list[str], expected: str) -> None:
    for ids in (bytewise(text), PROCESSOR.tokenizer.encode(text).ids):
        found, stream = pieces(ids, *stop)
        assert "".join(found) == expected
        assert stream.is_stopped == (expected != text)
        assert all(one not in "".join(found) for one in stop)


def test_what_may_become_a_stop_text_is_held_back_and_no_more() -> None:
    found, _ = pieces(bytewise("a stop, a stone"), "stone!")
    assert found[:6] == ["a", " ", "", "", "", "stop"]
    assert "".join(found) == "a stop, a stone"


def test_a_special_token_can_be_a_stop_text() -> None:
    suffix = PROCESSOR.tokenizer.token_to_id("<fim_suffix>")
    found, stream = pieces([*bytewise("hi"), suffix, *bytewise("no")], "<fim_suffix>")
    assert "".join(found) == "hi"
    assert stream.is_stopped
    shown, _ = pieces([*bytewise("hi"), suffix, *bytewise("no")])
    assert "".join(shown) == "hino"


def test_long_texts_are_not_decoded_again_and_again() -> None:
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return PROCESSOR.decode(ids)

    stream = TextStream(decode, PROCESSOR.spell, ())
    ids = PROCESSOR.tokenizer.encode("To be, or not to be, that is the question. " * 20).ids
    assert "".join(stream.add(token) for token in ids) + stream.finish() == PROCESSOR.decode(ids)
    assert longest < 8
