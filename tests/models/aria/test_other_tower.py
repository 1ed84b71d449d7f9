"""Aria on AIMv2's encoder: positions, features, initial values, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cantata.core.errors import ConfigError
from cantata.data.collate import PackedCollator
from cantata.models.aimv2 import Aimv2Tower
from cantata.models.aria import Aria, TruePositionProcessor
from cantata.models.aria.crops import Resampling
from cantata.models.hub import save_to_hub
from cantata.models.protocol import AssembledFrom, LanguageModel
from cantata.parallel.materialize import materialize
from cantata.train.stage import base_values
from tests.data.helpers import TOKENS, mini_processor
from tests.models.aimv2.small import NATIVE, VISION, documents, encoder
from tests.models.aria.mixed import mixed_layout

SIZES = {"image_size": 16, "min_image_size": 4, "patch_size": 4, "position_grid": 4, "features_per_image": 5}


def true_position_processor() -> TruePositionProcessor:
    return TruePositionProcessor(
        "embedded:tokenizer.json",
        **SIZES,
        split_image=False,
        resampling=Resampling.pillow,
        chat_template=None,
        **TOKENS,
    )


def aria(weights: str | None, native: bool = False) -> Aria:
    settings = vars(replace(NATIVE if native else VISION, image_size=16))
    layout = mixed_layout()
    projector = replace(layout.projector, patch_to_query={16: 5})
    return Aria(Aimv2Tower(**settings, weights=weights), projector, layout.text, image_token_id=9)


@pytest.mark.parametrize("native", [False, True])
def test_the_tower_starts_from_its_folder_and_the_loss_reaches_it(native: bool, tmp_path: Path) -> None:
    published = encoder(replace(NATIVE if native else VISION, image_size=16))
    save_to_hub(published, published.hub_layout(), tmp_path / "hub", 10**9)
    with torch.device("meta"):
        model = aria(str(tmp_path / "hub"), native)
    assert isinstance(model, LanguageModel)
    assert isinstance(model, AssembledFrom)
    materialize(model, base_values(None, 3, model), torch.device("cpu"))
    for name, value in published.state_dict().items():
        assert torch.equal(model.get_parameter(name), value), name
    processor: Any = true_position_processor() if native else mini_processor(**SIZES)
    model.check_processor(processor)
    collator = PackedCollator(processor)
    samples = [collator.encode(one, f"s:{i}") for i, one in enumerate(documents(3))]
    batch = collator.collate([collator.row(samples)], sum(map(len, samples)) + 2)
    assert torch.equal(model.vision(batch.images), published(batch.images))
    model(batch).loss_sum.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.vision.parameters())
    held = [name for unit in model.units() for name, _ in unit.module.named_parameters(prefix=unit.name)]
    assert {name for name, _ in model.named_parameters()} - set(held) == {"vision.rms_norm.weight"}


def test_true_positions_are_rows_and_columns() -> None:
    own, stretched = true_position_processor(), mini_processor(**SIZES)
    assert own.position_ids(2, 3).tolist() == [0, 1, 2, 4, 5, 6]
    assert stretched.position_ids(2, 3).tolist() != [0, 1, 2, 4, 5, 6]
    assert np.array_equal(own.position_ids(4, 4), stretched.position_ids(4, 4))


def test_what_does_not_go_together() -> None:
    with pytest.raises(ConfigError, match="true_positions gives False; the model needs True"):
        aria(None, native=True).check_processor(mini_processor(**SIZES))
    with pytest.raises(ConfigError, match="true_positions gives True; the model needs False"):
        aria(None).check_processor(true_position_processor())
    with pytest.raises(ConfigError, match="Aimv2Tower, no part of a published Aria"):
        aria(None).hub_layout().hub_config()
    layout, tower = mixed_layout(), Aimv2Tower(**vars(VISION), weights=None)
    with pytest.raises(ConfigError, match=r"set it to null, and model\.vision\.weights"):
        Aria(tower, layout.projector, layout.text, 9, weights="aria")
    with pytest.raises(ConfigError, match="use_head=true"):
        Aimv2Tower(**vars(replace(VISION, use_head=True)), weights=None)
