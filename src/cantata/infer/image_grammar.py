"""What an image is written in: rows of codes and their ends, for a given number of rows and columns."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cantata.models.emu3.config import Emu3Tokens


class ImageGrammar(NamedTuple):
    """The tokens of an image of `height` rows and `width` columns, counted from 0 right after `img`."""

    height: int
    width: int
    tokens: Emu3Tokens

    @property
    def num_tokens(self) -> int:
        """Tokens up to the last code; all that follows is given."""
        return self.height * (self.width + 1) - 1

    def allowed(self, position: int) -> range:
        """The ids that may stand there: all codes, or the one token that must; from its end on `eos`."""
        if position < self.height * (self.width + 1):
            if position % (self.width + 1) < self.width:
                return range(self.tokens.visual_offset, self.tokens.end_of_visual)
            token = self.tokens.eol
        else:
            after = position - self.height * (self.width + 1)
            token = (self.tokens.eof, self.tokens.eoi, self.tokens.eos)[min(after, 2)]
        return range(token, token + 1)

    def codes(self, token_ids: list[int]) -> NDArray[np.int64]:
        """The codes in the tokens up to the last code, (height, width)."""
        rows = np.array([*token_ids, self.tokens.eol], dtype=np.int64).reshape(self.height, self.width + 1)
        return rows[:, :-1] - self.tokens.visual_offset
