"""Packed batches, decoded ahead by worker processes, in an order that no layout changes.

The run's rows are numbered g = 0, 1, 2, ... Row g comes from stream g % S and goes to rank g % W, so each
rank owns whole streams (W divides S). A stream reads positions j, j + S, j + 2S, ... of the global order
and packs its own rows. Each row carries the state of its stream after it: what was prefetched and never
used leaves no trace, and the state means the same for any number of ranks, workers and rows per batch.

    S  streams     W  data-parallel ranks     g  number of a row in the run
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from copy import copy
from functools import partial
from itertools import count, cycle, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from cantata.core.errors import CantataError, ConfigError
from cantata.core.samples import PixelSample, Sample
from cantata.core.types import MicroBatch, RowInfo
from cantata.data.ahead import one_ahead, repeated
from cantata.data.collate.base import Collator
from cantata.data.drops import sum_drops, sum_reads
from cantata.data.handover import DYING, Failure, arrived, died, let_go, serve_the_trainer, unchanged
from cantata.data.order import BLOCK, Order
from cantata.data.reading import Drop, Reader, Source
from cantata.data.rows import RowMaker, check_states
from cantata.data.stall import Marks, StallWatch

log = logging.getLogger(__name__)


class Streams(IterableDataset[Any]):
    """The rows of some streams in turn; lives in a worker process.

    Args:
        reader: reads samples.
        collator: packs them.
        order: which sample stands where.
        num_streams: S.
        streams: numbers of these streams, in the order of their next rows.
        states: state of each of them, or None where it has not begun.
        window: samples a stream chooses from.
        marks: take which sample is being read, by process `worker`.
    """

    def __init__(
        self,
        reader: Reader,
        collator: Collator,
        order: Order,
        num_streams: int,
        streams: Sequence[int],
        states: Sequence[Mapping[str, Any] | None],
        window: int,
        marks: Marks,
        worker: int,
    ) -> None:
        self._reader = reader
        self._collator = collator
        self._order = order
        self._num_streams = num_streams
        self._streams = streams
        self._states = states
        self._window = window
        self._marks = marks
        self._worker = worker

    def __iter__(self) -> Iterator[Any]:
        try:
            packers: dict[int, RowMaker] = {}
            for stream, state in cycle(zip(self._streams, self._states, strict=True)):
                if stream not in packers:
                    # Not before its turn: a resumed stream reads its pending samples again.
                    packers[stream] = self._packer(stream, state)
                row = packers[stream].next_row()
                if row is not None:
                    yield self._collator.row(row.samples, row.info)
        except CantataError as error:
            yield Failure(str(error), isinstance(error, ConfigError))

    def _packer(self, stream: int, state: Mapping[str, Any] | None) -> RowMaker:
        packer = self._collator.row_maker(
            self._fetch,
            stream,
            self._num_streams,
            self._reader.sequence_length,
            self._window,
            # Within two epochs every sample comes, even if good ones stand first in one, last in the next.
            patience=2 * max(BLOCK, sum(self._order.sizes)),
            check=self._reader.check_skipped,
        )
        if state is not None:
            packer.load(dict(state))
        return packer

    def _fetch(self, position: int) -> Sample | PixelSample | Drop:
        place = self._order.locate(position)
        with self._marks.reading(self._worker, place):
            return self._reader.read(place.source, place.index, place.epoch)


class Loader:
    """The endless training batches of one rank, with a state that resumes exactly.

    Iterating begins after the last batch that was handed out, so a second `iter` continues the first.

    Args:
        sources: the datasets by name.
        collator: encodes and packs.
        seed: decides the order.
        sequence_length: what a row holds: tokens, or images.
        micro_batch_size: rows of a batch.
        streams: S; a multiple of `world_size`.
        window: samples that a stream chooses from.
        num_workers: processes that decode ahead; at most one for each stream of the rank is started.
        prefetch: rows that each of them keeps ready.
        stall_warning: seconds without a batch after which `warn` hears of it; None: never.
        rank: this data-parallel rank.
        world_size: W.

    Raises `ConfigError` where W does not divide S or a source holds nothing.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        collator: Collator,
        *,
        seed: int,
        sequence_length: int,
        micro_batch_size: int,
        streams: int,
        window: int,
        num_workers: int,
        prefetch: int,
        stall_warning: float | None,
        rank: int,
        world_size: int,
    ) -> None:
        if streams % world_size:
            raise ConfigError(
                f"data.streams={streams} is no multiple of the {world_size} data-parallel ranks"
            )
        sizes = {name: len(source.dataset) for name, source in sources.items()}
        weights = {name: source.weight for name, source in sources.items()}
        sequential = [name for name, source in sources.items() if source.is_sequential]
        self.order = Order(sizes, weights, seed, sequential)
        self.collator = collator
        self._reader = Reader(sources, collator.encode, sequence_length, "data.sources")
        self._micro_batch_size = micro_batch_size
        self._num_streams = streams
        self._window = window
        self._num_workers = num_workers
        self._prefetch = prefetch
        self._stall_warning = stall_warning
        self.warn: Callable[[str], None] = log.warning  # hears of stalls, in a thread of its own
        self._rank = rank
        self._world_size = world_size
        self._rows = 0
        self._states: dict[int, dict[str, Any]] = {}
        self._told: set[tuple[str, str]] = set()
        self._is_telling = True

    def __iter__(self) -> Generator[Any, None, None]:
        """Batches without end. Close it: workers ignore signals, and a process that has one does not exit."""
        watch = StallWatch(self._stall_warning, Marks(self._num_workers, self.order.names), self.warn)
        sources: list[Any] = []
        rows = self._ready_rows(sources, watch)
        make = partial(self._make_batch, rows)
        ahead = one_ahead(make, partial(let_go, sources)) if self._num_workers else repeated(make)
        with closing(rows), closing(ahead) as batches:
            while True:
                with watch.waiting():
                    taken, batch = next(batches)
                for info in taken:
                    self._states[info.stream] = info.state
                    self._tell_drops(info)
                    if info.dropped:
                        self._reader.check_skipped(self.reads(), self.dropped())
                self._rows += self._micro_batch_size * self._world_size
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of the state, as plain JSON values; the ranks differ in their `streams` alone."""
        return {
            "rows": self._rows,
            "order": self._identity(),
            "streams": {str(stream): state for stream, state in sorted(self._states.items())},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of a run on any number of ranks, with the streams of all of them.

        Raises `ConfigError` where the data, the seed or the row length are others than they were, or an
        older version wrote less of a stream than is needed now.
        """
        check_states(state["streams"].values())
        identity = self._identity()
        for name in {*identity, *state["order"]}:
            was, now = state["order"].get(name), identity.get(name)
            if was != now:
                raise ConfigError(
                    f"the checkpoint's data order had {name}={was}, the config has {now}; restore it to "
                    "resume, or start a new run with another name"
                )
        self._rows = state["rows"]
        mine = range(self._rank, self._num_streams, self._world_size)
        self._states = {
            stream: state["streams"][str(stream)] for stream in mine if str(stream) in state["streams"]
        }

    def shares(self) -> list[tuple[str, int, float]]:
        """(name, samples, share of the samples drawn) of each source."""
        drawn = zip(self.order.names, self.order.sizes, self.order.quotas, strict=True)
        return [(name, size, quota / sum(self.order.quotas)) for name, size, quota in drawn]

    def peek(self) -> Any:
        """The next batch, read in this process; the loader stays where it is."""
        twin = copy(self)
        twin._num_workers = 0
        twin._states = dict(self._states)
        twin._is_telling = False  # what it drops will be met again, and told then
        return next(iter(twin))

    def reads(self) -> dict[str, int]:
        """Samples read since the run began, the dropped ones too, by source, in this rank's streams."""
        return sum_reads(state["read"] for state in self._states.values())

    def dropped(self) -> dict[str, dict[str, int]]:
        """Samples left out since the run began, by source and reason, in this rank's streams."""
        return sum_drops(state["dropped"] for state in self._states.values())

    def _tell_drops(self, info: RowInfo) -> None:
        """A line for the first of each kind; the rest are counted in the state."""
        for source, reason, index in info.dropped if self._is_telling else ():
            is_first = (source, reason) not in self._told
            self._told.add((source, reason))
            level = logging.WARNING if is_first else logging.DEBUG
            log.log(level, "left out sample %s:%d (%s); others like it are counted", source, index, reason)

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.order.seed,
            "streams": self._num_streams,
            "window": self._window,
            "sequence_length": self._reader.sequence_length,
            "sources": self.order.describe(),
        }

    def _make_batch(self, rows: Iterator[Any]) -> tuple[list[RowInfo], MicroBatch]:
        taken = list(islice(rows, self._micro_batch_size))
        infos = [row.info for row in taken if row.info is not None]
        return infos, self.collator.collate(taken, self._reader.sequence_length)

    def _ready_rows(self, sources: list[Any], watch: StallWatch) -> Generator[Any, None, None]:
        """This rank's rows from the next one on; `sources` holds what they come from, while they come."""
        first = self._rows + (self._rank - self._rows) % self._world_size
        streams = [
            row % self._num_streams for row in range(first, first + self._num_streams, self._world_size)
        ]
        workers = min(max(self._num_workers, 1), len(streams))
        shares = [streams[worker::workers] for worker in range(workers)]
        try:
            sources += (iter(self._prefetched(*share, watch.marks)) for share in enumerate(shares))
            with watch.watching():
                for turn in count():
                    watch.worker = turn % len(streams) % workers
                    try:
                        item = next(sources[watch.worker])
                    except DYING as error:
                        if not self._num_workers:
                            raise
                        raise died(error) from error
                    yield arrived(item)
        finally:
            # A traceback that is kept would keep the workers too, and with them the process.
            sources.clear()

    def _prefetched(self, worker: int, streams: Sequence[int], marks: Marks) -> DataLoader[Any]:
        states = [self._states.get(stream) for stream in streams]
        common = (self._reader, self.collator, self.order, self._num_streams)
        dataset = Streams(*common, streams, states, self._window, marks, worker)
        has_worker = self._num_workers > 0
        return DataLoader(
            dataset,
            batch_size=None,
            collate_fn=unchanged,
            # Its own generator: drawing worker seeds from the global one would change the run's random state.
            generator=torch.Generator(),
            num_workers=int(has_worker),
            prefetch_factor=self._prefetch if has_worker else None,
            worker_init_fn=serve_the_trainer,
        )
