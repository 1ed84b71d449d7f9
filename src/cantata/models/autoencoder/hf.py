"""Published folders of the autoencoder: our own layout, with native names as keys."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from cantata.core.build import build
from cantata.core.errors import ConfigError
from cantata.core.samples import Processor
from cantata.models.autoencoder.config import AutoencoderConfig
from cantata.models.autoencoder.quantizer_node import built, described
from cantata.models.hub import CONFIG, read_json, write_json
from cantata.nn.quantize.base import Quantizer

ARCHITECTURE = "CantataAutoencoder"
SHAPE_TARGET = "cantata.models.autoencoder.config.AutoencoderConfig"


class AutoencoderLayout(NamedTuple):
    """The published names and `config.json` of one autoencoder."""

    shape: AutoencoderConfig
    quantizer: Quantizer

    def hub_key(self, stored: str) -> str | None:
        """Files hold the hub's keys and no others."""
        return stored

    def to_hub(self, name: str) -> str:
        return name

    def hub_shape(self, name: str, shape: torch.Size) -> torch.Size:
        return shape

    def transformers_name(self, name: str) -> str:
        """transformers has no such model; the name stays."""
        return name

    def is_attention_output(self, name: str) -> bool:
        return False

    def hub_config(self) -> dict[str, object]:
        """`config.json`: what the constructor took, the quantiser by its class and arguments."""
        return {
            "architectures": [ARCHITECTURE],
            "model_type": "cantata_autoencoder",
            "shape": asdict(self.shape),
            "quantizer": described(self.quantizer),
        }

    def write_processor(self, processor: Processor, directory: Path) -> list[str]:
        """`preprocessor_config.json`: pixels from -1 to 1, sides cut to multiples of the factor."""
        write_preprocessor(directory, {"size_divisor": self.shape.factor})
        return []


def write_preprocessor(directory: Path, settings: dict[str, object]) -> None:
    """How pixels are scaled, as transformers' image processors name it."""
    content = {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": True,
        **settings,
    }
    write_json(directory / "preprocessor_config.json", content)


def read_hub_config(directory: str | Path) -> tuple[AutoencoderConfig, Quantizer]:
    """Shape and quantiser of an exported folder; `ConfigError` where it holds none or names another class."""
    path = Path(directory) / CONFIG
    config = read_json(path)
    if config.get("architectures") != [ARCHITECTURE]:
        found = config.get("architectures")
        raise ConfigError(f"{path}: architectures is {found!r}, not [{ARCHITECTURE!r}]")
    shape, quantizer = config.get("shape"), config.get("quantizer")
    if not isinstance(shape, dict) or not isinstance(quantizer, dict):
        raise ConfigError(f"{path}: no shape or no quantizer; export the run again")
    try:
        return build({**shape, "_target_": SHAPE_TARGET}), built(quantizer)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
