"""The encoder in another model's hands: what it must say of itself, and where its weights are."""

from __future__ import annotations

from pathlib import Path

import pytest

from cantata.core.errors import ConfigError
from cantata.models.aimv2 import Aimv2Tower
from cantata.models.aimv2.hf import Aimv2VisionLayout
from cantata.models.hub import save_to_hub
from tests.models.aimv2.small import NATIVE, VISION, contrastive, encoder

NAMES = frozenset({"vision.rms_norm.weight"})


def tower(weights: str | None, native: bool = False, **changes: object) -> Aimv2Tower:
    return Aimv2Tower(**vars(NATIVE if native else VISION) | changes, weights=weights)


def test_it_builds_the_encoder_of_its_settings() -> None:
    expected = {name: p.shape for name, p in encoder(VISION).vision.named_parameters()}
    assert {name: p.shape for name, p in tower(None).build().named_parameters()} == expected


def test_only_native_positions_are_computed_from_rows_and_columns() -> None:
    assert not tower(None).true_positions
    assert tower(None, native=True).true_positions


def test_without_weights_nothing_is_read() -> None:
    assert tower(None).part(NAMES) is None


def test_its_part_lies_in_its_folder(tmp_path: Path) -> None:
    model = encoder(VISION)
    save_to_hub(model, model.hub_layout(), tmp_path / "hub", 10**9)
    part = tower(str(tmp_path / "hub")).part(NAMES)
    assert part is not None
    assert (part.names, part.directory) == (NAMES, str(tmp_path / "hub"))
    assert isinstance(part.layout, Aimv2VisionLayout)
    assert part.layout.to_hub("vision.rms_norm.weight") == "rms_norm.weight"


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.vision\.use_head=true: a tower gives features of patches"):
        tower(None, use_head=True)
    model = contrastive()
    save_to_hub(model, model.hub_layout(), tmp_path / "hub", 10**9)
    with pytest.raises(ConfigError, match="holds a contrastive model"):
        tower(str(tmp_path / "hub")).part(NAMES)
