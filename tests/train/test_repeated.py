"""The dry run of a few equal blocks against that of all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from cantata.models.protocol import Trainable
from cantata.parallel.recompute import Recompute
from cantata.tools.plan import read_stage
from cantata.train.dry_run import peak_activation_bytes
from cantata.train.likely import META, likely
from cantata.train.one_rank import Elements, on_one_rank
from cantata.train.optim import parameter_groups
from cantata.train.repeated import equal_blocks
from cantata.train.stage import Stage, build_model

DEEP = ("model.text.num_hidden_layers=8", "model.vision.num_hidden_layers=7", "train.micro_batch_size=1")
FROZEN = "+parameters={vision.*: {learning_rate: null, weight_decay: null, frozen: true}}"
STAGES = {
    "aria": ("pretrain", (*DEEP, "train.sequence_length=256")),
    "aria, frozen tower": ("pretrain", (*DEEP, "train.sequence_length=256", FROZEN)),
    "aria, adapters": ("lora", (*DEEP, "train.sequence_length=256")),
    "aimv2": ("pretrain", ("experiment=aimv2_mini", "model.vision.num_hidden_layers=9")),
    "emu3": ("pretrain", ("experiment=emu3_mini", "model.text.num_hidden_layers=9")),
}


def chosen(name: str) -> tuple[Stage, Trainable]:
    kind, overrides = STAGES[name]
    stage = read_stage(kind, overrides, None)
    model = build_model(stage)
    parameter_groups(model, stage.parameters, 1e-3, 0.1)
    assert isinstance(model, Trainable)
    return stage, model


def kept(elements: Elements) -> int:
    return 4 * (elements.dense + elements.experts)


def nothing(elements: Elements) -> int:
    return 0


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("recompute", Recompute)
@pytest.mark.parametrize("gradient_bytes", [kept, nothing])
def test_a_few_blocks_stand_for_all(
    name: str, recompute: Recompute, gradient_bytes: Callable[[Elements], int]
) -> None:
    stage, model = chosen(name)
    assert isinstance(model, nn.Module)
    assert equal_blocks(model.units())
    local, batch = on_one_rank(model, 4 if model.moe_layers() else 1), likely(stage, model)
    few, all_of_them = (
        peak_activation_bytes(
            local, batch, torch.bfloat16, recompute, META, gradient_bytes, every_block=every_block
        )
        for every_block in (False, True)
    )
    # The statistics of all layers' routers are stacked: hundreds of bytes a layer.
    assert few.total == pytest.approx(all_of_them.total, rel=1e-3)
    assert few.logits == all_of_them.logits
    assert few.all_to_all == pytest.approx(all_of_them.all_to_all, rel=1e-3)


def test_only_long_runs_are_shortened() -> None:
    stage = read_stage("pretrain", (), None)
    model = build_model(stage)
    assert isinstance(model, Trainable)
    assert equal_blocks(model.units()) == []
    _, deep = chosen("aria")
    assert [len(run) for run in equal_blocks(deep.units())] == [7, 8]
