"""The form of an image, against a plain spelling of it."""

from __future__ import annotations

import numpy as np
import pytest

from cantata.core.samples import Document
from cantata.infer.image_grammar import ImageGrammar
from tests.models.emu3.small import TOKENS, grid, small_processor


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (3, 1)])
def test_every_token_of_an_encoded_image_is_allowed(height: int, width: int) -> None:
    """What the processor writes after `img` and up to `eos` is the one thing allowed, but for the codes."""
    codes = grid(1, height, width)
    ids = small_processor().encode(Document(("a", codes)), "s").input_ids_T.tolist()
    written = ids[ids.index(TOKENS.img) + 1 :]
    grammar = ImageGrammar(height, width, TOKENS)
    for position, token in enumerate(written):
        allowed = grammar.allowed(position)
        assert token in allowed
        assert len(allowed) == (TOKENS.codebook_size if TOKENS.is_visual(token) else 1)
    assert grammar.allowed(len(written) + 3) == range(TOKENS.eos, TOKENS.eos + 1)
    assert written[grammar.num_tokens :] == [TOKENS.eol, TOKENS.eof, TOKENS.eoi, TOKENS.eos]
    assert np.array_equal(grammar.codes(written[: grammar.num_tokens]), codes.codes_thw[0])


def test_codes_are_counted_from_their_offset() -> None:
    ids = [TOKENS.visual_offset + 5]
    assert ImageGrammar(1, 1, TOKENS).codes(ids).tolist() == [[5]]
