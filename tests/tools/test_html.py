"""What pages share."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from jinja2 import UndefinedError
from PIL import Image

from cantata.tools.html import data_url, environment, visible


def test_texts_are_escaped_and_missing_names_fail(tmp_path: Path) -> None:
    (tmp_path / "page.jinja").write_text("<p title='{{ text }}'>{{ text }}</p>")
    template = environment(tmp_path).get_template("page.jinja")
    shown = template.render(text="<b>'\"&")
    assert shown == "<p title='&lt;b&gt;&#39;&#34;&amp;'>&lt;b&gt;&#39;&#34;&amp;</p>"
    with pytest.raises(UndefinedError):
        template.render()


def test_a_page_that_names_no_script_allows_none(tmp_path: Path) -> None:
    (tmp_path / "page.jinja").write_text(
        "{% extends 'page.html.jinja' %}{% block body %}<p>hello</p>{% endblock %}"
    )
    shown = environment(tmp_path).get_template("page.jinja").render()
    assert "script-src &#39;none&#39;" in shown
    assert "<p>hello</p>" in shown


def test_images_equal_the_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    encoded = data_url(Image.fromarray(pixels, "RGBA")).removeprefix("data:image/png;base64,")
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        assert np.array_equal(np.asarray(image), pixels)


def test_what_cannot_be_seen_is_spelt() -> None:
    assert visible("a\n\u202eb") == "a↵\n\\u202eb"
    assert visible("") == "∅"
