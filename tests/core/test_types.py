"""Segments and batches: what everything packed relies on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cantata.core.types import IGNORE_INDEX, TEXT, Batch, Images, RowInfo, Segments


def batch(*names: str) -> Batch:
    """Five tokens in two samples, one of padding; three targets."""
    return Batch(
        input_ids_T=torch.arange(6),
        labels_T=torch.tensor([1, 2, IGNORE_INDEX, 4, IGNORE_INDEX, IGNORE_INDEX]),
        position_ids_T=torch.tensor([0, 1, 2, 0, 1, 0]),
        modality_ids_T=torch.tensor([0, 0, 0, 0, 0, -1]),
        target_index_N=torch.tensor([0, 1, 3]),
        target_modality_N=torch.full((3,), TEXT),
        samples=Segments((3, 2)),
        images=Images(
            torch.zeros((4, 12), dtype=torch.uint8),
            torch.arange(4),
            Segments((4,)),
            Segments((2,)),
            torch.tensor([0, 1]),
        ),
        rows=(RowInfo(0, names[:1], {}), RowInfo(1, names[1:], {})),
    )


@pytest.mark.parametrize("lengths", [(), (3,), (2, 1, 4), (2, 0, 3)])
def test_segments_agree_with_a_loop(lengths: tuple[int, ...]) -> None:
    segments = Segments(lengths)
    offsets, ids = [0], []
    for index, length in enumerate(lengths):
        offsets.append(offsets[-1] + length)
        ids += [index] * length
    assert segments.offsets().tolist() == offsets
    assert segments.offsets().dtype == torch.int32, "the kernels take no other"
    assert segments.ids().tolist() == ids
    assert segments.ids().dtype == torch.int64
    assert (segments.total, segments.max_length) == (len(ids), max([0, *lengths]))


def test_segments_concatenate_in_order() -> None:
    parts = (Segments((3, 1)), Segments(()), Segments((2,)))
    assert Segments.concatenate(iter(parts)) == Segments((3, 1, 2))
    assert Segments.concatenate(()) == Segments(())


def test_counts_leave_padding_and_ignored_labels_out() -> None:
    assert batch().num_tokens == 5
    assert batch().num_targets == 3


def test_a_batch_names_its_samples_up_to_eight() -> None:
    assert batch("a:0", "a:1").describe() == "a:0, a:1"
    names = [f"a:{index}" for index in range(10)]
    assert batch(*names).describe() == ", ".join(names[:8]) + " and 2 more"
    assert replace(batch(), rows=()).describe() == ""


def test_a_moved_batch_leaves_the_old_one_and_what_is_no_tensor() -> None:
    old = batch("a:0")
    new = old.to("meta")
    for record in (new, new.images):
        assert all(value.is_meta for value in vars(record).values() if isinstance(value, torch.Tensor))
    assert new.images.patches_PC.dtype == torch.uint8
    assert (new.samples, new.rows, new.images.features) == (old.samples, old.rows, old.images.features)
    assert not old.input_ids_T.is_meta
    assert not old.images.patches_PC.is_meta
