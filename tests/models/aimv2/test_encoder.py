"""The encoder as a model of its own, and from a folder that describes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cantata.core.errors import ConfigError
from cantata.models.aimv2 import encoder_from_hub
from cantata.models.hub import load_from_hub, save_to_hub
from tests.models.aimv2.small import NATIVE, contrastive, encoder, images_of, random_pixels


def test_a_folder_gives_back_the_encoder(tmp_path: Path) -> None:
    model = encoder(NATIVE)
    save_to_hub(model, model.hub_layout(), tmp_path / "hub", 10**9)
    read = encoder_from_hub(tmp_path / "hub")
    assert read.vision_config == NATIVE
    load_from_hub(read, read.hub_layout(), tmp_path / "hub")
    images = images_of(random_pixels((8, 20), (4, 4)), NATIVE)
    with torch.no_grad():
        found, expected = read(images), model(images)
    assert found.shape == (2 * 5 + 1, NATIVE.hidden_size)
    assert torch.equal(found, expected)


def test_a_contrastive_model_is_no_encoder_alone(tmp_path: Path) -> None:
    model = contrastive()
    save_to_hub(model, model.hub_layout(), tmp_path / "hub", 10**9)
    with pytest.raises(ConfigError, match="holds a contrastive model"):
        encoder_from_hub(tmp_path / "hub")
