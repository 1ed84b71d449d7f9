import json
import multiprocessing
import re
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate, compress, islice
from typing import Any

import pytest
import torch

from cantata.core.errors import ConfigError, RunError
from cantata.core.samples import Document, Example
from cantata.data.collate import PackedCollator
from cantata.data.loader import Loader
from cantata.data.reading import Source
from tests.data.helpers import (
    Words,
    assert_same,
    embedded_sources,
    keys,
    letters_loader,
    mini_processor,
    source,
)


class Streamed(Words):
    """Is read in order, and knows how far."""

    is_sequential = True
    reach = 0

    def __getitem__(self, index: int) -> Example:
        self.reach = max(self.reach, index + 1)
        return super().__getitem__(index)


def words() -> dict[str, Source]:
    lengths = [3 + 7 * i % 29 for i in range(40)]
    return {
        "a": source(Words("a", [*lengths, 50], broken=[3, 17]), 2.0),
        "b": source(Streamed("b", [10] * 15), 1.0),
    }


def taken(loader: Loader, count: int) -> list:
    return list(islice(iter(loader), count))


def stored(loaders: list[Loader]) -> dict:
    """The run's state, out of those of all its ranks."""
    parts = [loader.state_dict() for loader in loaders]
    assert all(part | {"streams": {}} == parts[0] | {"streams": {}} for part in parts)
    streams = {stream: state for part in parts for stream, state in part["streams"].items()}
    return json.loads(json.dumps(parts[0] | {"streams": streams}))


@pytest.mark.parametrize(
    ("workers", "micro_batch_size"), [(0, 1), (1, 1), (2, 1), (3, 1), (9, 1), (2, 3), (3, 2)]
)
def test_workers_and_batch_size_change_nothing(workers: int, micro_batch_size: int) -> None:
    plain = [row for batch in taken(letters_loader(words()), 12) for row in batch.rows]
    loader = letters_loader(words(), num_workers=workers, micro_batch_size=micro_batch_size)
    rows = [row for batch in taken(loader, 12 // micro_batch_size) for row in batch.rows]
    assert rows == plain
    assert [row.stream for row in rows] == [g % 4 for g in range(12)]


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("interrupted", [0, 1, 7])
def test_resume_is_exact(workers: int, interrupted: int) -> None:
    whole = taken(letters_loader(words()), 14)
    first = letters_loader(words(), num_workers=workers)
    taken(first, interrupted)
    second = letters_loader(words(), num_workers=(workers + 1) % 4)
    second.load_state_dict(stored([first]))
    for left, right in zip(taken(second, 14 - interrupted), whole[interrupted:], strict=True):
        assert_same(left, right)


def test_resume_of_real_samples_with_images() -> None:
    def loader(workers: int) -> Loader:
        settings = {"seed": 3, "sequence_length": 512, "micro_batch_size": 2, "streams": 4, "window": 16}
        place = {"num_workers": workers, "prefetch": 2, "stall_warning": None, "rank": 0, "world_size": 1}
        return Loader(embedded_sources(), PackedCollator(mini_processor()), **settings, **place)

    whole = taken(loader(0), 6)
    first = loader(2)
    assert whole[0].images.patches_PC.any()
    for left, right in zip(taken(first, 3), whole, strict=False):
        assert_same(left, right)
    second = loader(1)
    second.load_state_dict(stored([first]))
    for left, right in zip(taken(second, 3), whole[3:], strict=True):
        assert_same(left, right)


def test_a_second_iteration_continues_the_first() -> None:
    loader = letters_loader(words(), num_workers=1)
    assert [keys(batch) for batch in taken(loader, 3) + taken(loader, 3)] == [
        keys(batch) for batch in taken(letters_loader(words()), 6)
    ]


def ranks(world_size: int, state: dict | None, **changes: int) -> list[Loader]:
    loaders = [
        letters_loader(words(), rank=rank, world_size=world_size, **changes) for rank in range(world_size)
    ]
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state)
    return loaders


@pytest.mark.parametrize(
    "plan", [[(1, 3), (2, 4), (1, 5)], [(4, 1), (1, 2), (2, 5)], [(2, 3), (4, 2), (1, 1)]]
)
def test_any_number_of_ranks_sees_the_same_rows(plan: list[tuple[int, int]]) -> None:
    """One run that changes its number of ranks twice, against one rank throughout."""
    state, seen = None, []
    for world_size, batches in plan:
        loaders = ranks(world_size, state, num_workers=world_size % 3)
        per_rank = [taken(loader, batches) for loader in loaders]
        seen += [row for together in zip(*per_rank, strict=True) for batch in together for row in batch.rows]
        state = stored(loaders)
    plain = [row for batch in taken(letters_loader(words()), len(seen)) for row in batch.rows]
    assert Counter(name for row in seen for name in row.samples) == Counter(
        name for row in plain for name in row.samples
    )
    assert sorted(seen, key=str) == sorted(plain, key=str)
    reference = letters_loader(words())
    taken(reference, len(seen))
    assert state == stored([reference])


def stamped(example: Example, source: str, index: int, epoch: int) -> Example:
    """Writes the epoch into the text: "AAA" in the first, "BBB" in the second."""
    assert isinstance(example, Document)
    return Document((chr(ord("A") + epoch) * len(str(example.parts[0])),))


def mixed() -> dict[str, Source]:
    """Three sources of different lengths and shares; of `a` and `b` some cannot be used."""
    return {
        "a": source(Words("a", [3 + 7 * i % 29 for i in range(97)] + [50], [3, 17]), augmentation=stamped),
        "b": source(Words("b", [10] * 71, broken=[70]), 0.7, augmentation=stamped),
        "c": source(Streamed("c", [1 + i % 31 for i in range(64)]), 0.4, augmentation=stamped),
    }


@pytest.mark.parametrize("plan", [[1, 2, 1], [2, 1, 2], [4, 2, 1]])
def test_an_epoch_is_the_dataset_whatever_the_ranks_did_in_the_middle(plan: list[int]) -> None:
    """Ranks change twice inside the first epoch of every source; then each source is read beyond it."""
    state, trained, dropped = None, Counter[str](), Counter[str]()
    for part, world_size in enumerate(plan):
        loaders = [letters_loader(mixed(), rank=r, world_size=world_size) for r in range(world_size)]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
            for batch in taken(loader, (240 if part == 2 else 8) // world_size):
                starts = [0, *accumulate(batch.samples.lengths)]
                of_first = [batch.input_ids_T[start] == ord("A") for start in starts[:-1]]
                trained.update(compress(keys(batch), of_first))
                dropped.update(f"{name}:{index}" for row in batch.rows for name, _, index in row.dropped)
        state = stored(loaders)
        if part < 2:
            assert 0 < len(trained) < 100, "not in the middle of an epoch"
    unusable = {"a:3", "a:17", "a:97", "b:70"}
    every = {f"{name}:{index}" for name, one in mixed().items() for index in range(len(one.dataset))}
    assert trained == Counter(every - unusable)
    assert set(dropped) == unusable
    order = loaders[0].order
    read = (
        order.locate(position)
        for stream, one in state["streams"].items()
        for position in range(int(stream), one["next"], len(state["streams"]))
    )
    reads = Counter(f"{place.source}:{place.index}" for place in read)
    assert dropped == {name: reads[name] for name in unusable}


@pytest.mark.parametrize("streams", [1, 4])
def test_the_first_row_needs_only_the_front_of_a_streamed_source(streams: int) -> None:
    data = Streamed("a", [10] * 5000)
    loader = letters_loader({"a": source(data)}, streams=streams)
    assert keys(loader.peek()) == ["a:0", f"a:{streams}", f"a:{2 * streams}"]
    assert data.reach <= streams * (4 + 3)
    seen = [keys(batch) for batch in taken(loader, 40)]
    assert data.reach < 200
    assert max(int(name[2:]) for row in seen for name in row) < 200


def spoilt(broken: int, **changes: Any) -> Loader:
    bad = source(Words("a", [10] * 1000, broken=range(broken)), max_skipped=0.25)
    return letters_loader({"a": bad, "b": source(Words("b", [10] * 50))}, **changes)


def stop(loader: Loader) -> str:
    with pytest.raises(RunError) as caught:
        taken(loader, 2000)
    return str(caught.value)


@pytest.mark.parametrize("streams", [1, 32])
def test_a_source_with_too_many_bad_samples_ends_the_run(streams: int) -> None:
    """One stream finds out by itself while it reads ahead, many find out together."""
    taken(spoilt(200, streams=streams), 400)
    message = stop(spoilt(400, streams=streams))
    assert re.match(
        r"\d+ of \d+ samples of data\.sources\.a \([\d.]+%\) were left out, most often: corr", message
    )
    reads = int(message.split()[2])
    assert 100 <= reads < 140


def test_the_limit_is_passed_at_the_same_sample_after_a_resume_and_with_workers() -> None:
    whole = stop(spoilt(400))
    first = spoilt(400, num_workers=2)
    taken(first, 30)
    second = spoilt(400)
    second.load_state_dict(stored([first]))
    assert sum(second.reads().values()) > 60
    assert stop(second) == whole


def test_every_sample_once_per_epoch_or_pending_or_dropped() -> None:
    loader = letters_loader({"b": source(Words("b", [4] * 30, broken=[2]))}, streams=2)
    seen = Counter(name for batch in taken(loader, 9) for name in keys(batch))
    state = loader.state_dict()["streams"]
    pending = sum(len(one["pending"]) for one in state.values())
    dropped = loader.dropped()["b"]["corrupt image"]
    assert sum(one["next"] for one in state.values()) // 2 == pytest.approx(
        seen.total() + pending + dropped, abs=1
    )
    assert seen.total() == 72
    assert max(seen.values()) - min(seen.values()) <= 1
    assert "b:2" not in seen


def test_dropped_samples_are_counted_and_told(caplog: pytest.LogCaptureFixture) -> None:
    loader = letters_loader(words(), num_workers=2)
    with caplog.at_level("WARNING"):
        batches = taken(loader, 40)
    told = Counter(
        (name, reason) for batch in batches for row in batch.rows for name, reason, _ in row.dropped
    )
    assert set(told) == {("a", "corrupt image"), ("a", "too long")}
    assert loader.dropped() == {"a": {reason: count for (_, reason), count in told.items()}}
    assert len(caplog.records) == 2
    resumed = letters_loader(words())
    resumed.load_state_dict(stored([loader]))
    assert resumed.dropped() == loader.dropped()


@pytest.mark.parametrize("workers", [0, 2])
def test_worker_errors_arrive_as_one_line(workers: int) -> None:
    sources = {"a": source(Words("a", [5] * 9, broken=[4]), on_error="raise")}
    others = set(multiprocessing.active_children())
    with pytest.raises(RunError) as caught:
        taken(letters_loader(sources, num_workers=workers), 30)
    assert str(caught.value).startswith("sample a:4: corrupt image (number 4)")
    assert "\n" not in str(caught.value)
    # Although the error that is held here knows where it came from.
    assert set(multiprocessing.active_children()) == others


@pytest.mark.parametrize(
    "error", [RuntimeError("DataLoader worker (pid 7) exited\nunexpectedly"), ConnectionResetError()]
)
def test_a_killed_worker_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for a real kill, after which torch's signal handler raises wherever the trainer is."""

    def dying(self: Loader, *_: object) -> Iterator[object]:
        raise error
        yield

    monkeypatch.setattr(Loader, "_prefetched", dying)
    with pytest.raises(RunError, match="a data worker ended") as caught:
        next(iter(letters_loader(words(), num_workers=1)))
    assert "\n" not in str(caught.value)


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    taken(letters_loader(words(), num_workers=1), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_end_with_the_iteration() -> None:
    others = set(multiprocessing.active_children())
    iterator = iter(letters_loader(words(), num_workers=2))
    next(iterator)
    mine = [child for child in multiprocessing.active_children() if child not in others]
    assert len(mine) >= 2
    del iterator
    for child in mine:
        child.join(timeout=20)
        assert not child.is_alive()


def test_shares() -> None:
    assert letters_loader(words()).shares() == [("a", 41, 683 / 1024), ("b", 15, 341 / 1024)]


def test_bad_layout_and_other_data() -> None:
    with pytest.raises(ConfigError, match=r"data\.streams=4 is no multiple of the 3 data-parallel ranks"):
        letters_loader(words(), world_size=3)
    state = stored([letters_loader(words())])
    with pytest.raises(ConfigError, match="had seed=7, the config has 8"):
        letters_loader(words(), seed=8).load_state_dict(state)
    with pytest.raises(ConfigError, match="sources"):
        letters_loader({"a": words()["a"]}).load_state_dict(state)
    shuffled = {"a": words()["a"], "b": source(Words("b", [10] * 15))}
    with pytest.raises(ConfigError, match=r"had sources=.*'sequential'\]\}, the config has "):
        letters_loader(shuffled).load_state_dict(state)


@pytest.mark.parametrize("lacking", ["read", "dropped"])
def test_a_state_of_an_older_version_is_one_line(lacking: str) -> None:
    loader = letters_loader(words())
    taken(loader, 3)
    state = stored([loader])
    del state["streams"]["2"][lacking]
    with pytest.raises(ConfigError, match=f"older version .*lacks {lacking}.*another name$"):
        letters_loader(words(), rank=1, world_size=2).load_state_dict(state)
