"""The autoencoder's published folder, both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cantata.core.errors import ConfigError
from cantata.models.autoencoder import Autoencoder, autoencoder_from_hub
from cantata.models.hub import HubReader, HubWriter
from cantata.nn.quantize import EMAVectorQuantizer, FiniteScalarQuantizer
from cantata.nn.quantize.base import Quantizer
from cantata.parallel.materialize import materialize, persistent_tensors
from tests.models.autoencoder.small import SHAPE, Nearest, filled, pixels


def published(directory: Path, quantizer: Quantizer) -> Autoencoder:
    model = filled(Autoencoder(SHAPE, quantizer))
    assert isinstance(model, Autoencoder)
    with HubWriter(directory, model.hub_layout(), 10**9) as writer:
        for name, tensor in persistent_tensors(model):
            writer.write(name, tensor)
    return model


@pytest.mark.parametrize(
    "quantizer", [EMAVectorQuantizer(32, 4, 0.25, 0.99, 1e-5, 0.1), FiniteScalarQuantizer((5, 4, 3))]
)
def test_what_is_written_is_read(tmp_path: Path, quantizer: Quantizer) -> None:
    """Codebooks that are buffers too; and what no file holds comes from the constructor."""
    model = published(tmp_path / "hub", quantizer)
    with torch.device("meta"):
        read = autoencoder_from_hub(tmp_path / "hub")
    assert read.weights == str(tmp_path / "hub")
    assert type(read.quantizer) is type(quantizer)
    shapes = {name: tensor.shape for name, tensor in persistent_tensors(read)}
    materialize(read, HubReader(tmp_path / "hub", read.hub_layout(), shapes), torch.device("cpu"))
    images = pixels(1, 1, 3, 16, 16)
    codes = model.eval().encode(images)
    assert torch.equal(codes, read.eval().encode(images))
    assert torch.equal(model.decode(codes), read.decode(codes))


def config(tmp_path: Path, change: dict[str, Any]) -> Path:
    published(tmp_path / "hub", FiniteScalarQuantizer((5, 4)))
    file = tmp_path / "hub" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return tmp_path / "hub"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["Emu3VQVAE"]}, "architectures is"),
        ({"quantizer": None}, "no shape or no quantizer"),
        ({"quantizer": {"_target_": "torch.nn.Linear"}}, "is torch.nn.Linear; only cantata.nn.quantize"),
        (
            {
                "quantizer": {
                    "_target_": "cantata.nn.quantize.fsq.FiniteScalarQuantizer",
                    "levels": {"a": {"_target_": "torch.zeros"}},
                }
            },
            "is torch.zeros; only",
        ),
        ({"quantizer": {"_target_": "cantata.nn.quantize.base.usage"}}, "config.json: "),
        ({"shape": {"encoder_channels": 8}}, "is missing"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        autoencoder_from_hub(config(tmp_path, change))


def test_the_processor_scales_to_the_range_of_training(tmp_path: Path) -> None:
    layout = Autoencoder(SHAPE, Nearest(32, 4)).hub_layout()
    layout.write_processor(None, tmp_path)  # type: ignore[arg-type]
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (written["image_mean"], written["image_std"]) == ([0.5] * 3, [0.5] * 3)
    assert written["size_divisor"] == 4
