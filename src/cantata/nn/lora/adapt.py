"""Give a module its adapter, and the adapter its first values."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cantata.nn.head import LanguageHead
from cantata.nn.lora.experts import LoRAExperts
from cantata.nn.lora.linear import LoRALinear
from cantata.nn.lora.settings import LoRASettings
from cantata.nn.lora.vocabulary import LoRAEmbedding, LoRAHead
from cantata.nn.matmul import Linear
from cantata.nn.moe.experts import Experts

_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    Linear: LoRALinear,
    nn.Embedding: LoRAEmbedding,
    LanguageHead: LoRAHead,
    Experts: LoRAExperts,
}

MAGNITUDE = "lora_magnitude"
_FACTORS = ("lora_A", "lora_B", MAGNITUDE, *(f"fc{i}_lora_{part}" for i in (1, 2) for part in "AB"))


def is_adaptable(module: nn.Module) -> bool:
    """Whether `adapt` takes the module: exactly these kinds, since another's forward may differ."""
    return type(module) in _KINDS


def is_factor(name: str) -> bool:
    """Whether a parameter, by its name in a model, belongs to an adapter."""
    return name.rpartition(".")[2] in _FACTORS


def adapt(module: nn.Module, settings: LoRASettings | Mapping[str, LoRASettings]) -> nn.Module:
    """The module's adapted twin, which shares its parameters and attributes, to be put in its place.

    Args:
        module: one that `is_adaptable`, on the meta device or any other.
        settings: of experts by matrix ("fc1", "fc2"), each optional.
    """
    kind = _KINDS.get(type(module))
    if kind is None:
        raise TypeError(
            f"{type(module).__name__} takes no adapter; only {', '.join(k.__name__ for k in _KINDS)}"
        )
    twin = copy.copy(module)
    twin.__class__ = kind
    # The copy is shallow: without one of its own the factors would land in the module's registry too.
    twin._parameters = dict(module._parameters)
    assert isinstance(twin, LoRALinear | LoRAEmbedding | LoRAHead | LoRAExperts)
    twin.add_factors(settings)  # type: ignore[arg-type]
    return twin


def fill_factor(name: str, tensor: Tensor, generator: torch.Generator, *, embedding: bool = False) -> None:
    """Write the initial values of a factor, which leave the module as it was.

    A is Kaiming-uniform with `a = sqrt(5)` over its inputs, that is within `1 / sqrt(inputs)`, and B zero. An
    embedding's A is zero and its B normal. So does Microsoft's loralib, and PEFT after it.

    A magnitude begins with no change.

    Args:
        name: the parameter's last component, such as "lora_A" or "fc1_lora_B".
        tensor: the whole parameter.
        embedding: whether it is a `LoRAEmbedding`'s.
    """
    part = name[-1]
    if name not in _FACTORS:
        raise ValueError(f"fill_factor: {name} is no factor")
    with torch.no_grad():
        if name == MAGNITUDE or (part == "A") == embedding:
            tensor.zero_()
        elif embedding:
            tensor.normal_(generator=generator)
        else:
            # Inputs come second in (r, in) and in (E, in, r).
            bound = 1 / math.sqrt(tensor.shape[1])
            tensor.uniform_(-bound, bound, generator=generator)
