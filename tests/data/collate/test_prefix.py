"""Prefixes: drawn evenly, the same for a sample wherever it is read, anew in each epoch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cantata.core.samples import ImagePatches, Sample
from cantata.core.types import RowInfo, Segments
from cantata.data.collate import PackedCollator, PrefixCollator
from cantata.data.collate.prefix import drawn_prefixes
from tests.models.aimv2.small import documents, processor


def sample(key: str, *patches: int) -> Sample:
    images = tuple(ImagePatches(np.zeros((n, 3), np.uint8), np.arange(n), n) for n in patches)
    ids = np.zeros(sum(patches), np.int32)
    return Sample(key, ids, np.zeros(len(ids), np.float32), np.zeros(len(ids), np.int8), images)


@given(st.lists(st.integers(1, 40), max_size=5), st.integers(0, 10**6), st.text(max_size=8))
def test_a_prefix_leaves_something_to_predict(patches: list[int], place: int, key: str) -> None:
    found = drawn_prefixes(sample(key, *patches), place)
    assert len(found) == len(patches)
    assert all(m == 1 if n == 1 else 1 <= m < n for m, n in zip(found, patches, strict=True))
    assert found == drawn_prefixes(sample(key, *patches), place)


def test_prefixes_are_even_and_anew_in_each_epoch() -> None:
    drawn = [drawn_prefixes(sample(f"s:{i}", 5), place)[0] for i in range(400) for place in (3, 900)]
    counts = Counter(drawn)
    assert set(counts) == {1, 2, 3, 4}
    assert all(abs(count - 200) < 60 for count in counts.values())
    assert drawn[::2] != drawn[1::2]
    assert len(set(drawn_prefixes(sample("s:1", *[30] * 6), 0))) > 2


def test_rows_carry_them_into_batches() -> None:
    collator = PrefixCollator(processor())
    samples = [collator.encode(one, f"s:{i}") for i, one in enumerate(documents(4))]

    def info(place: int) -> RowInfo:
        return RowInfo(0, tuple(one.key for one in samples), {"next": place})

    rows: list[Any] = [collator.row(samples[:2], info(7)), collator.row(samples[2:]), collator.row([])]
    batch = collator.collate(rows, 128)
    wanted = [m for one in samples[:2] for m in drawn_prefixes(one, 7)]
    wanted += [m for one in samples[2:] for m in drawn_prefixes(one, 0)]
    assert batch.images.prefix == Segments(tuple(wanted))
    index_R, share_R = batch.images.predicted()
    counts = [16 - m for m in wanted]
    assert index_R.tolist() == [16 * i + m + j for i, m in enumerate(wanted) for j in range(16 - m)]
    assert share_R.tolist() == [np.float32(1 / n) for n in counts for _ in range(n)]
    assert collator.collate([collator.row([])], 8).images.prefix == Segments(())
    plain = PackedCollator(processor())
    whole = plain.collate([plain.row(samples)], 256)
    assert whole.images.prefix is None
    assert whole.images.predicted()[0].numel() == 0
    assert whole.to("cpu").images.prefix is None
    assert batch.to("cpu").images.prefix == batch.images.prefix
