import dataclasses
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from cantata.core.errors import RunError
from cantata.core.samples import Document, Sample
from cantata.core.types import IGNORE_INDEX, IMAGE, PADDING, TEXT, RowInfo
from cantata.data.collate import PackedCollator
from tests.data.helpers import Letters, letters_loader
from tests.data.test_loader import words

PICTURE = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))


def collator() -> PackedCollator:
    return PackedCollator(Letters())


def samples() -> list[Sample]:
    return [
        collator().encode(Document(("abc",)), "s:0"),
        collator().encode(Document((PICTURE, "de")), "s:1"),
        collator().encode(Document(("f",)), "s:2"),
    ]


def test_fields_by_hand() -> None:
    first, second, third = samples()
    info = RowInfo(0, ("s:0", "s:1"), {})
    rows = [collator().row([first, second], info), collator().row([third])]
    batch = collator().collate(rows, 6)
    none = IGNORE_INDEX
    assert batch.input_ids_T.tolist() == [97, 98, 99, 9, 9, 100, 101, 102, 1, 1, 1, 1]
    assert batch.labels_T.tolist() == [98, 99, none, none, 100, 101, none, none, none, none, none, none]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 0, 0, 0, 0]
    assert batch.modality_ids_T.tolist() == [TEXT] * 3 + [IMAGE] * 2 + [TEXT] * 3 + [PADDING] * 4
    assert batch.target_index_N.tolist() == [0, 1, 4, 5]
    assert batch.target_modality_N.tolist() == [TEXT, TEXT, IMAGE, IMAGE]
    assert batch.samples.lengths == (3, 4, 1)
    assert batch.num_tokens == 8
    assert batch.images.token_index_Q.tolist() == [3, 4]
    assert batch.images.first_tokens == (3,)
    assert batch.images.patches.lengths == (4,)
    assert batch.images.features.lengths == (2,)
    assert batch.images.patches_PC.tolist() == np.arange(12).reshape(4, 3).tolist()
    assert batch.rows == (info,)
    int64 = (
        batch.input_ids_T,
        batch.labels_T,
        batch.position_ids_T,
        batch.modality_ids_T,
        batch.target_modality_N,
    )
    assert {tensor.dtype for tensor in int64} == {torch.int64}


def test_weights_move_with_the_labels_and_are_left_out_where_all_are_one() -> None:
    weighted = replace(samples()[0], weight_T=np.array([5.0, 0.5, 2.0], dtype=np.float32))
    untrained = replace(samples()[2], weight_T=np.zeros(1, dtype=np.float32))
    batch = collator().collate([collator().row([weighted, samples()[1]]), collator().row([untrained])], 8)
    assert batch.target_weight_N is not None
    assert batch.target_weight_N.tolist() == [0.5, 2.0, 1.0, 1.0]
    assert batch.labels_T[batch.target_index_N].tolist() == [98, 99, 100, 101]
    assert batch.target_weight == 4.5
    plain = collator().collate([collator().row(samples())], 8)
    assert plain.target_weight_N is None
    assert plain.target_weight == plain.num_targets == 4


def test_without_images_the_tensors_are_empty() -> None:
    batch = collator().collate([collator().row(samples()[:1])], 5)
    assert batch.images.patches_PC.shape == (0, 3)
    assert batch.images.patches_PC.dtype == torch.uint8
    assert batch.images.token_index_Q.numel() == 0
    assert batch.images.features.total == 0


def test_an_empty_row_is_only_padding() -> None:
    batch = collator().collate([collator().row([])], 4)
    assert batch.input_ids_T.tolist() == [1] * 4
    assert (batch.num_tokens, batch.num_targets) == (0, 0)


def test_packed_tokens_equal_the_samples_one_by_one() -> None:
    """The slow twin: each sample collated alone, then laid end to end."""
    loader = letters_loader(words(), micro_batch_size=3)
    [batch] = islice(iter(loader), 1)
    names = [name.split(":") for row in batch.rows for name in row.samples]
    alone = [
        collator().collate([collator().row([collator().encode(words()[n].dataset[int(i)], "x")])], 32)
        for n, i in names
    ]
    for field in ("input_ids_T", "labels_T", "position_ids_T", "modality_ids_T"):
        parts = [getattr(one, field)[: one.num_tokens] for one in alone]
        assert torch.equal(torch.cat(parts), getattr(batch, field)[: batch.num_tokens])
    assert batch.num_targets == sum(one.num_targets for one in alone)


def test_placeholders_must_match_features() -> None:
    sample = samples()[1]
    wrong = dataclasses.replace(sample, images=(sample.images[0]._replace(num_features=3),))
    with pytest.raises(RunError, match="sample s:1 has 2 image placeholders for 3 image features"):
        collator().row([wrong])


def test_too_many_tokens() -> None:
    with pytest.raises(RunError, match="hold 8 tokens"):
        collator().collate([collator().row(samples())], 7)


def test_a_placeholder_is_no_target() -> None:
    """A family's head may have no row for it."""
    sample = samples()[1]
    wrong = dataclasses.replace(sample, weight_T=np.ones_like(sample.weight_T))
    with pytest.raises(RunError, match="sample s:1 gives its image placeholders weight in the loss"):
        collator().row([wrong])
