"""Raw records by index, whatever they lie in: what a format turns into examples."""

from cantata.data.records.base import Records
from cantata.data.records.opening import RecordKind, open_records

__all__ = ["RecordKind", "Records", "open_records"]
