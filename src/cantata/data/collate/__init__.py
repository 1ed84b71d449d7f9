"""From samples to batches."""

from cantata.data.collate.packed import PackedCollator, Row
from cantata.data.collate.pixels import ImageCollator

__all__ = ["ImageCollator", "PackedCollator", "Row"]
