"""From samples to batches."""

from cantata.data.collate.packed import PackedCollator, Row
from cantata.data.collate.pixels import ImageCollator
from cantata.data.collate.prefix import PrefixCollator

__all__ = ["ImageCollator", "PackedCollator", "PrefixCollator", "Row"]
