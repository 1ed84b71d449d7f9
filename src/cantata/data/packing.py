"""Whole samples into rows of a fixed length: nothing is ever cut.

L  tokens of a row (sequence_length)
"""

from __future__ import annotations

from typing import Any

from cantata.data.rows import RowMaker


class Packer(RowMaker):
    """Fills rows of L tokens from a window of pending samples.

    A row begins with the sample that has waited longest; then the first pending sample that still fits is
    taken and the window refilled, until none fits.
    """

    def _choose(self) -> list[Any]:
        chosen: list[Any] = []
        room = self._length
        while True:
            while len(self._pending) < self._window and self._read_on():
                pass
            fitting = next((i for i, (_, sample) in enumerate(self._pending) if len(sample) <= room), None)
            if fitting is None:
                return chosen
            sample = self._pending.pop(fitting)[1]
            chosen.append(sample)
            room -= len(sample)

    def _advice(self) -> str:
        return f"check the data and train.sequence_length={self._length}"
