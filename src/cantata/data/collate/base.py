"""What turns examples into batches: of tokens, or of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from cantata.core.samples import Example, PixelSample, Sample
from cantata.core.types import MicroBatch, RowInfo
from cantata.data.rows import RowMaker


class Collator(Protocol):
    """Encodes examples, chooses which of them share a row, and stacks rows into batches.

    It travels to worker processes, so it must pickle.
    """

    row_maker: type[RowMaker]
    """How samples become rows."""

    def encode(self, example: Example, key: str) -> Sample | PixelSample:
        """Raises `DataError` where the example cannot be encoded."""
        ...

    def row(self, samples: Sequence[Any], info: RowInfo | None = None) -> Any:
        """A row, cheap to hand from a worker process to the trainer; of no samples a filler."""
        ...

    def collate(self, rows: Sequence[Any], sequence_length: int) -> MicroBatch:
        """A batch of rows that hold `sequence_length` each at most."""
        ...
