"""The page: whole, escaped, and holding the pixels."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from cantata.tools.html import data_url
from cantata.tools.inspect import figures
from cantata.tools.inspect_data import Inspection, Picture, Shown, Tally, Token
from cantata.tools.inspect_html import page, visible

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 24, 3), dtype=np.uint8))
EVIL = "</span><script>alert('x')</script>&\"'"
VOID = {"meta", "img", "line"}


def inspected(items: tuple[Token | Picture, ...], name: str = "web") -> str:
    tally = Tally(9, 1.0, lengths=[3, 900], dropped={"too long": [7], EVIL: [1, 2]}, tokens=3, learned=1)
    tally.shown.append(Shown(f"{name}:0", items, 3, 1))
    found = Inspection(512, {name: tally}, {"later": 4}, rows=1, used=3, notes=[f"note {EVIL}"])
    return page(found, figures("sft", f"run {EVIL}", found))


class Balanced(HTMLParser):
    """Fails where a tag is not closed; keeps tags and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.links: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_every_text_is_escaped_and_every_tag_closed() -> None:
    text = inspected((Token(EVIL, (5,), 1.0, False), Picture(NOISE, 15, 4, "image")), name=f"web{EVIL}")
    parsed = Balanced(text)
    assert "script" not in parsed.tags
    assert "<script" not in text
    for words in (EVIL, f"run {EVIL}", f"note {EVIL}", f"left out: 2 ({EVIL})", f"web{EVIL}:0"):
        assert words in parsed.text
    assert all(link.startswith("data:") for link in parsed.links)
    assert not re.search(r"https?://|@import|url\(", text)


def test_images_equal_the_pixels() -> None:
    text = inspected((Picture(NOISE, 15, 4, "video"),))
    [encoded] = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", text)
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        assert np.array_equal(np.asarray(image), np.asarray(NOISE))
    assert data_url(NOISE) in text
    assert "24 \u00d7 40 px, 15 patches, 4 video tokens" in text


def test_weights_are_seen() -> None:
    tokens = (
        Token("said", (1,), 1.0, False),
        Token("half", (2, 3), 0.5, False),
        Token("heard", (4,), 0.0, False),
        Token("<|im_end|>", (5,), 1.0, True),
    )
    text = inspected(tokens)
    assert '<span class="t l" title="id 1, weight 1">said</span>' in text
    assert '<span class="t l" style="--w:0.5" title="id 2, 3, weight 0.5">half</span>' in text
    assert '<span class="t" title="id 4, weight 0">heard</span>' in text
    assert '<span class="t l s" title="id 5, weight 1">&lt;|im_end|&gt;</span>' in text
    assert "prefers-color-scheme: dark" in text


def test_long_samples_are_cut_with_a_word() -> None:
    text = inspected((Token("x", (1,), 0.0, False),) * 5000)
    assert text.count(">x</span>") == 4096
    assert "904 more" in text


def test_what_cannot_be_seen_is_spelt() -> None:
    def seen(text: str) -> str:
        return visible(Token(text, (1,), 0.0, False))

    assert seen("a b\n\t") == "a b↵\n⇥\t"
    assert seen("\u202eabc\x00\ue000") == "\\u202eabc\\u0000\\ue000"
    assert seen("naïve 😀") == "naïve 😀"
    assert seen("") == "∅"
