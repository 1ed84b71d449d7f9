"""Images of one size into rows, which are whole micro-batches: pixels of several sizes do not stack."""

from __future__ import annotations

from typing import Any

from cantata.data.rows import RowMaker


class SizeGroups(RowMaker):
    """Rows of `sequence_length` images of one size, as soon as some size has that many pending.

    So it never holds more than that number of images of each size. At the end of finite data what is left of
    a size makes a shorter row. The window is not used.
    """

    def _choose(self) -> list[Any]:
        while (chosen := self._group(self._length)) is None and self._read_on():
            pass
        taken = chosen or self._group(1) or []
        samples = [self._pending[index][1] for index in taken]
        for index in reversed(taken):
            del self._pending[index]
        return samples

    def _group(self, least: int) -> list[int] | None:
        """Places of the oldest pending samples of one size that has at least so many, up to a whole row."""
        places: dict[Any, list[int]] = {}
        for index, (_, sample) in enumerate(self._pending):
            places.setdefault(sample.size, []).append(index)
        return next((group[: self._length] for group in places.values() if len(group) >= least), None)
