"""AIMv2 in Apple's own words, as its released code loads it: names, stacked attention and `config.json`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from cantata.models.aimv2 import names
from cantata.models.aimv2.config import Aimv2TextConfig, Aimv2VisionConfig
from cantata.models.aimv2.hf import WHOLE_TYPE, Aimv2Layout, Aimv2VisionLayout
from cantata.models.hub import HubWriter

_COMMON = {"attention_dropout": 0.0, "projection_dropout": 0.0, "qkv_bias": False, "use_bias": False}


class _AppleLayout:
    """Apple's names over a layout of transformers': what `HubWriter` wants of one."""

    def __init__(self, inner: Aimv2VisionLayout | Aimv2Layout) -> None:
        self.inner = inner

    def to_hub(self, name: str) -> str:
        return names.to_apple(self.inner.to_hub(name))

    def hub_shape(self, name: str, shape: torch.Size) -> torch.Size:
        is_position = name == "vision.embeddings.position_embedding.weight"
        return torch.Size((1, *shape)) if is_position else self.inner.hub_shape(name, shape)

    def hub_config(self) -> dict[str, object]:
        vision = _section(self.inner.vision)
        if isinstance(self.inner, Aimv2VisionLayout):
            return {"architectures": ["AIMv2Model"], "model_type": WHOLE_TYPE, **vision}
        return {
            "architectures": ["AIMv2Model"],
            "model_type": WHOLE_TYPE,
            "projection_dim": self.inner.projection_dim,
            "max_logit_scale": self.inner.max_logit_scale,
            "vision_config": vision,
            "text_config": _section(self.inner.text),
        }


def save_as_apple(
    model: nn.Module, layout: Aimv2VisionLayout | Aimv2Layout, directory: str | Path, max_shard_bytes: int
) -> None:
    """Write an unsharded model under Apple's names; `RunError` where the disk refuses."""
    with HubWriter(directory, _AppleLayout(layout), max_shard_bytes) as writer:
        waiting: list[Tensor] = []
        for name, parameter in model.named_parameters():
            part = next((part for part in names.QKV if f".attention.{part}." in name), None)
            if part is None:
                writer.write(name, parameter)
                continue
            waiting.append(parameter.detach())
            if len(waiting) == len(names.QKV):
                writer.write(name.replace(f".{part}.", ".qkv."), torch.cat(waiting))
                waiting = []


def _section(config: Aimv2VisionConfig | Aimv2TextConfig) -> dict[str, object]:
    """Apple's configs have the settings under the same names."""
    return {**_COMMON, **vars(config)}
