"""Micro-batches that are read in order to plan for them."""

from __future__ import annotations

import pytest

from cantata.core.errors import ConfigError
from cantata.core.types import Batch, PixelBatch
from cantata.tools.plan import read_stage
from cantata.train.likely import first_batches, likely, row_tokens
from cantata.train.plan import make_plan
from cantata.train.stage import PretrainStage, build_data, build_model
from tests.train.test_stage import TINY, stage

SMALL = (*TINY, "train.micro_batch_size=2", "train.sequence_length=256")


def test_the_largest_of_the_first_batches_is_planned_for() -> None:
    chosen = read_stage("pretrain", SMALL, None)
    assert isinstance(chosen, PretrainStage)
    model = build_model(chosen)
    loader, _ = build_data(chosen, model)
    batches = iter(loader)
    seen = [next(batches) for _ in range(4)]
    largest = first_batches(chosen, model, 4)
    assert all(isinstance(batch, Batch) for batch in largest)
    assert largest[0].images.patches.total == max(batch.images.patches.total for batch in seen)
    assert max(batch.num_targets for batch in largest) == max(batch.num_targets for batch in seen)
    plan = make_plan(chosen, 4)
    assert (plan.images, plan.patches) in [
        (len(batch.images.patches.lengths), batch.images.patches.total) for batch in largest
    ]
    assert plan.tokens_per_micro_batch == 2 * 256


def test_a_rank_of_many_reads_its_own_rows() -> None:
    chosen = read_stage("pretrain", (*SMALL, "cluster.gpus=4"), None)
    model = build_model(chosen)
    [first, *_] = first_batches(chosen, model, 1)
    assert {row.stream for row in first.rows} <= {0, 4}
    with pytest.raises(ConfigError, match=r"data\.streams=8 is no multiple of the 3"):
        first_batches(read_stage("pretrain", (*SMALL, "cluster.gpus=3"), None), model, 1)


def test_images_of_a_tokenizer_are_read_too() -> None:
    chosen = read_stage("vq", ("train.micro_batch_size=2", "data.num_workers=0"), None)
    model = build_model(chosen)
    [batch] = first_batches(chosen, model, 2)
    assert isinstance(batch, PixelBatch)
    expected = likely(chosen, model)
    assert isinstance(expected, PixelBatch)
    assert batch.pixels_BTCHW.shape == expected.pixels_BTCHW.shape
    assert batch.codes_per_image == expected.codes_per_image == row_tokens(chosen, model)
    assert row_tokens(stage(), build_model(stage())) == 512
