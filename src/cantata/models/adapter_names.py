"""How the parts of an adapter are called and shaped in PEFT's files.

PEFT keeps a linear layer's factors as we do, an embedding's under names of their own, and those of all
experts of a matrix in two: A (E * r, in), expert after expert, and B (out, r * E), rank after rank. A
convolution's are convolutions. Two matrices of one experts module are wrapped one in the other, the first
one innermost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cantata.models.lora import EXPERT_MATRICES, base_names
from cantata.models.protocol import HubLayout
from cantata.nn.lora import is_factor

PREFIX = "base_model.model."


class Stored(NamedTuple):
    """One factor in a file: its key, and its shape after the dimensions were put into `order`."""

    key: str
    shape: torch.Size
    native_shape: torch.Size
    order: tuple[int, ...]
    """Undoes itself."""

    def pack(self, native: Tensor) -> Tensor:
        """Ours as PEFT keeps it."""
        return native.permute(self.order).reshape(self.shape).contiguous()

    def unpack(self, stored: Tensor) -> Tensor:
        """PEFT's as we keep it."""
        return stored.reshape([self.native_shape[i] for i in self.order]).permute(self.order)


class Target(NamedTuple):
    """An adapted part of a model."""

    name: str
    """As patterns see it: `text.layers.0.mlp.experts.fc1`."""
    weight: str
    """The native parameter that it adapts."""
    module: str
    """What PEFT is told to adapt: a module in transformers' model, or a parameter of experts."""
    rank: int
    stored: dict[str, Stored]
    """By the factor's native name."""
    is_ignored: bool
    """PEFT writes and loads its factors and computes without them: see `HubLayout.is_attention_output`."""

    @property
    def is_experts(self) -> bool:
        return self.name == self.weight

    @property
    def magnitude(self) -> str | None:
        """Native name of DoRA's magnitude."""
        return next((name for name in self.stored if name.endswith("lora_magnitude")), None)

    def factor(self, letter: str) -> str:
        """The native name of A or B."""
        return next(name for name in self.stored if name.endswith(f"lora_{letter}"))


def adapter_targets(model: nn.Module, layout: HubLayout) -> list[Target]:
    """Every adapted part of an adapted model (on the meta device, or not), as PEFT keeps it."""
    found = []
    for path, module in model.named_modules():
        own = {
            name: p.shape for name, p in module.named_parameters(recurse=False) if is_factor(f"{path}.{name}")
        }
        parts = [part for part in EXPERT_MATRICES if f"{part}_lora_A" in own]
        if parts:
            found += [_experts(path, part, len(parts) - 1 - i, own, layout) for i, part in enumerate(parts)]
        elif own:
            found.append(_layer(path, module, own, layout))
    return found


def saved_parameters(model: nn.Module) -> list[str]:
    """Native parameters that an adapter holds in full (`lora.modules_to_save`)."""
    base = base_names(model)
    return [name for name, _ in model.named_parameters() if name not in base and not is_factor(name)]


def hub_parameters(model: nn.Module, layout: HubLayout) -> Iterator[tuple[str, str, torch.Size]]:
    """Native name, name in transformers' model and shape there of every parameter that is no adapter's."""
    for name, parameter in model.named_parameters():
        if not is_factor(name):
            yield name, layout.transformers_name(name), layout.hub_shape(name, parameter.shape)


def _experts(path: str, part: str, depth: int, own: dict[str, torch.Size], layout: HubLayout) -> Target:
    """One matrix of an experts module, inside `depth` others."""
    name = f"{path}.{part}"
    module = layout.transformers_name(name)
    key = PREFIX + module.rpartition(".")[0] + ".base_layer" * depth
    a, b = own[f"{part}_lora_A"], own[f"{part}_lora_B"]
    stored = {
        f"{name}_lora_A": Stored(f"{key}.lora_A.weight", torch.Size((a[0] * a[2], a[1])), a, (0, 2, 1)),
        f"{name}_lora_B": Stored(f"{key}.lora_B.weight", torch.Size((b[2], b[1] * b[0])), b, (2, 1, 0)),
    }
    return Target(name, name, module, a[2], stored, is_ignored=False)


def _layer(path: str, module: nn.Module, own: dict[str, torch.Size], layout: HubLayout) -> Target:
    """A linear layer, an embedding or a head."""
    weight = f"{path}.weight"
    name = layout.transformers_name(weight).removesuffix(".weight")
    a, b = own["lora_A"], own["lora_B"]
    if isinstance(module, nn.Embedding):
        there = {"lora_A": ("lora_embedding_A", a), "lora_B": ("lora_embedding_B", b)}
    else:
        kernel = layout.hub_shape(weight, torch.Size((b[0], a[1])))[1:]
        ones = (1,) * (len(kernel) - 1)
        there = {
            "lora_A": ("lora_A.weight", torch.Size((a[0], *kernel))),
            "lora_B": ("lora_B.weight", torch.Size((*b, *ones))),
            "lora_magnitude": ("lora_magnitude_vector", torch.Size((1, b[0], *ones) if ones else b[:1])),
        }
    stored = {
        f"{path}.{factor}": Stored(
            f"{PREFIX}{name}.{key}", shape, own[factor], tuple(range(len(own[factor])))
        )
        for factor, (key, shape) in there.items()
        if factor in own
    }
    return Target(path, weight, name, a[0], stored, layout.is_attention_output(weight))
