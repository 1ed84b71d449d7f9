"""From samples to batches."""

from cantata.data.collate.packed import PackedCollator, Row

__all__ = ["PackedCollator", "Row"]
