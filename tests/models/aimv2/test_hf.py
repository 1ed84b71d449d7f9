"""Names and settings of published AIMv2s."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cantata.core.errors import ConfigError
from cantata.models.aimv2.hf import Aimv2Layout, Aimv2VisionLayout, read_hub_config
from tests.models.aimv2.small import NATIVE, TEXT, VISION, contrastive, encoder, pretraining

WHOLE = Aimv2Layout(contrastive().vision_config, TEXT, 12, 100.0)


def write(directory: Path, config: dict[str, Any]) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_keys_are_unique_and_unknown_names_are_refused() -> None:
    for model in (encoder(VISION), contrastive()):
        layout = model.hub_layout()
        keys = [layout.to_hub(name) for name, _ in model.named_parameters()]
        assert len(set(keys)) == len(keys)
        with pytest.raises(KeyError):
            layout.to_hub("adapter.weight")
    with pytest.raises(KeyError):
        Aimv2VisionLayout(VISION).to_hub("text.rms_norm.weight")


def test_of_pretraining_the_encoder_alone_is_published() -> None:
    model = pretraining()
    published = [name for name, _ in model.named_parameters() if model.is_published(name)]
    assert published == [name for name, _ in encoder(VISION).named_parameters()]


@pytest.mark.parametrize("layout", [Aimv2VisionLayout(VISION), Aimv2VisionLayout(NATIVE), WHOLE])
def test_the_config_survives_the_round_trip(tmp_path: Path, layout: Any) -> None:
    assert read_hub_config(write(tmp_path, layout.hub_config())) == layout


def test_shapes_that_differ() -> None:
    layout = WHOLE
    assert layout.hub_shape("vision.embeddings.patch_embed.weight", torch.Size((32, 48))) == (32, 3, 4, 4)
    assert layout.hub_shape("vision.head.cls_token", torch.Size((32,))) == (1, 1, 32)
    assert layout.hub_shape("logit_scale", torch.Size((1,))) == ()
    assert layout.hub_shape("text_projection.weight", torch.Size((12, 24))) == (12, 24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "clip"}, "model_type is 'clip', none of aimv2_vision_model, aimv2"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ({"qkv_bias": True}, "qkv_bias is True; only False"),
        ({"image_size": [16, 8]}, "image_size is [16, 8]; only one number"),
    ],
)
def test_what_is_not_built_here_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_hub_config(write(tmp_path, Aimv2VisionLayout(VISION).hub_config() | change))
