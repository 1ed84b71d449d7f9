"""Small Arias with adapters whose factors are not zero, and the folders that they adapt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cantata.models.adapter_writer import AdapterWriter
from cantata.models.aria import Aria
from cantata.models.aria.hf import AriaLayout
from cantata.models.hub import HubReader, parameter_shapes, save_to_hub
from cantata.models.lora import LoRAConfig, apply_lora
from cantata.nn.lora import Packing, is_factor
from tests.models.aria.small import small_aria, small_layout

LINEARS = [
    "vision.layers.*",
    "projector.cross_attn.[qkv]_proj",
    "projector.cross_attn.linear",
    "projector.feed_*",
]
EVERYTHING = ["text.*", "head", "vision.*", *LINEARS[1:]]
"""All that PEFT can keep: not the output of the projector's attention."""


def lora(**changes: Any) -> LoRAConfig:
    """Every part adapted with rank 4, unless said otherwise."""
    settings: dict[str, Any] = {
        "r": 4,
        "alpha": 8,
        "dropout": 0.0,
        "rslora": False,
        "dora": False,
        "targets": EVERYTHING,
        "ranks": {},
        "modules_to_save": [],
        "adapter": None,
        "quantize_base": Packing.none,
    }
    return LoRAConfig(**settings | changes)


@dataclass(frozen=True)
class Base:
    """A published small Aria."""

    folder: Path
    layout: AriaLayout

    def reader(self) -> HubReader:
        return HubReader(self.folder, self.layout, parameter_shapes(small_aria(self.layout)))

    def adapted(self, config: LoRAConfig, seed: int = 0) -> Aria:
        """With random factors, and with what is saved in full moved off its base values."""
        model = small_aria(self.layout)
        apply_lora(model, config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if is_factor(name):
                    parameter.copy_(0.1 * noise)
                elif parameter.requires_grad:
                    parameter.add_(0.1 * noise)
        return model.eval()

    def transformers(self) -> Any:
        import transformers

        return transformers.AriaForConditionalGeneration.from_pretrained(self.folder, dtype=torch.float32)


def published(folder: Path, **text: Any) -> Base:
    layout = small_layout(**text)
    save_to_hub(small_aria(layout), layout, folder, 10**9)
    return Base(folder, layout)


def write(base: Base, model: Aria, config: LoRAConfig, folder: Path) -> list[str]:
    """Our adapter in `folder`; returns the notes."""
    folder.mkdir()
    return AdapterWriter(model, base.layout, config, str(base.folder)).write(folder, value_of(model), None)


def value_of(model: Aria) -> Any:
    def read(name: str) -> Tensor:
        return model.get_parameter(name).detach()

    return read
