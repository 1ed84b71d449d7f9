"""One stream of rows: samples in the run's order, put together by a rule that subclasses know."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from cantata.core.errors import ConfigError, RunError
from cantata.core.samples import PixelSample, Sample
from cantata.core.types import RowInfo
from cantata.data.drops import Drops
from cantata.data.reading import Drop

Fetch = Callable[[int], Sample | PixelSample | Drop]
"""Reads the sample at a position; the same position always gives the same answer."""

Check = Callable[[Mapping[str, int], Drops], None]
"""Raises where too many of the samples read were left out (`Reader.check_skipped`)."""


class PackedRow(NamedTuple):
    """Samples that share a row, oldest first."""

    samples: tuple[Any, ...]
    info: RowInfo


class RowMaker(ABC):
    """Reads every `stride`-th position and makes rows of what is pending.

    The state after a row is the next position, the positions of the pending samples, and how many samples
    were read and dropped so far - plain numbers, from which another one continues with the same rows, bit for
    bit.

    Args:
        fetch: reads a position.
        stream: number of the stream, and its first position.
        stride: distance between its positions.
        sequence_length: what a row holds: as many as the lengths of its samples may add up to.
        window: samples to choose from.
        check: called with the counts at each drop.
        end: position at which the data ends, or None where it never does.
        patience: drops in a row after which the data is given up as unusable.
    """

    def __init__(
        self,
        fetch: Fetch,
        stream: int,
        stride: int,
        sequence_length: int,
        window: int,
        patience: int,
        check: Check,
        end: int | None = None,
    ) -> None:
        self._fetch = fetch
        self._stream = stream
        self._stride = stride
        self._length = sequence_length
        self._window = window
        self._patience = patience
        self._check = check
        self._end = end
        self._next = stream
        self._pending: list[tuple[int, Any]] = []
        self._drops: list[Drop] = []
        self._read: dict[str, int] = {}
        self._dropped: dict[str, dict[str, int]] = {}
        self._missed = 0

    @abstractmethod
    def _choose(self) -> list[Any]:
        """Take the samples of the next row out of `_pending`, reading on as needed; none at the end."""

    def load(self, state: dict[str, Any]) -> None:
        """Continue after the row that carried `state`; the pending samples are read again.

        Raises `RunError` where one of them cannot be read any more.
        """
        self._next = state["next"]
        self._read = dict(state["read"])
        self._dropped = {source: dict(reasons) for source, reasons in state["dropped"].items()}
        self._pending = []
        for position in state["pending"]:
            sample = self._fetch(position)
            if isinstance(sample, Drop):
                raise RunError(
                    f"sample {sample.source}:{sample.index} was read before the checkpoint and now is not "
                    f"({sample.reason}): the data has changed; restore it, or start a new run"
                )
            self._pending.append((position, sample))

    def state(self) -> dict[str, Any]:
        return {
            "next": self._next,
            "pending": [position for position, _ in self._pending],
            "read": dict(self._read),
            "dropped": {source: dict(reasons) for source, reasons in self._dropped.items()},
        }

    def next_row(self) -> PackedRow | None:
        """The next row, or None after the end of finite data."""
        chosen = self._choose()
        drops, self._drops = self._drops, []
        if not chosen:
            return None
        keys = tuple(sample.key for sample in chosen)
        dropped = tuple((drop.source, drop.reason, drop.index) for drop in drops)
        return PackedRow(tuple(chosen), RowInfo(self._stream, keys, self.state(), dropped))

    def _read_on(self) -> bool:
        """One position more, into `_pending` or among the dropped; False at the end of the data."""
        if self._end is not None and self._next >= self._end:
            return False
        position = self._next
        sample = self._fetch(position)
        self._next += self._stride
        source = sample.source if isinstance(sample, Drop) else sample.key.rpartition(":")[0]
        self._read[source] = self._read.get(source, 0) + 1
        if not isinstance(sample, Drop):
            self._pending.append((position, sample))
            self._missed = 0
            return True
        self._drops.append(sample)
        reasons = self._dropped.setdefault(sample.source, {})
        reasons[sample.reason] = reasons.get(sample.reason, 0) + 1
        self._check(self._read, self._dropped)
        self._missed += 1
        if self._missed >= self._patience:
            raise RunError(
                f"the last {self._missed} samples were all dropped, the newest "
                f"{sample.source}:{sample.index} ({sample.reason}); {self._advice()}"
            )
        return True

    def _advice(self) -> str:
        return "check the data"


def check_states(states: Iterable[Mapping[str, Any]]) -> None:
    """Raise `ConfigError` where one holds less than `RowMaker.load` needs: older versions kept less."""
    kept = {"next", "pending", "read", "dropped"}
    lacking = sorted({name for state in states for name in kept - state.keys()})
    if lacking:
        raise ConfigError(
            f"the checkpoint was written by an older version (its data state lacks {', '.join(lacking)}); "
            "start a new run with another name"
        )
