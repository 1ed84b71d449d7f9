"""Which parts of a model get low-rank adapters (Hu et al. 2021, arXiv:2106.09685); all else stays as it came.

A *target* is a linear layer, an embedding, an output head, or one of the two matrices of a layer's experts.
It is called by its module's name, as in `text.layers.0.self_attn.q_proj` or `text.layers.0.mlp.experts.fc1`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from cantata.core.errors import ConfigError
from cantata.core.suggest import hint
from cantata.models.protocol import Trainable
from cantata.nn.lora import LoRASettings, Packing, adapt, is_adaptable
from cantata.nn.matmul import Linear
from cantata.nn.moe.experts import Experts

EXPERT_MATRICES = ("fc1", "fc2")
_ADAPTED = "_cantata_adapted"


@dataclass(frozen=True)
class LoRAConfig:
    """The keys under `lora`."""

    r: int
    """Rank of the adapters."""
    alpha: float
    """Their output is scaled by alpha / r, with rslora by alpha / sqrt(r)."""
    dropout: float
    """Share of an adapter's inputs that training zeroes."""
    rslora: bool
    """Scale by alpha / sqrt(r) (arXiv:2312.03732)."""
    dora: bool
    """Learn the magnitude of each output by itself (arXiv:2402.09353), in linear layers."""
    targets: list[str]
    """Patterns on the names of targets."""
    ranks: dict[str, int]
    """Other ranks by pattern; the last match decides."""
    modules_to_save: list[str]
    """Patterns on parameter names: trained in full and kept with the adapter."""
    adapter: str | None
    """Folder of a saved adapter to go on from; null starts a new one."""
    quantize_base: Packing
    """What the frozen matrices of the repeated blocks rest in: `none` (the compute dtype), `int8`, `nf4`."""

    def __post_init__(self) -> None:
        for key, rank in (("r", self.r), *((f"ranks.{pattern!r}", r) for pattern, r in self.ranks.items())):
            if rank < 1:
                raise ConfigError(f"lora.{key}={rank} must be at least 1")
        if not 0 < self.alpha < float("inf"):
            raise ConfigError(f"lora.alpha={self.alpha} must be a number above 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout={self.dropout} must be at least 0 and below 1")
        if not self.targets:
            raise ConfigError("lora.targets names nothing; to train whole parameters use cantata sft")

    def settings(self, target: str, *, dora: bool) -> LoRASettings:
        """What a target gets."""
        ranks = [rank for pattern, rank in self.ranks.items() if fnmatchcase(target, pattern)]
        rank = ranks[-1] if ranks else self.r
        return LoRASettings(rank, self.alpha, self.dropout, self.rslora, dora)


class Matched(NamedTuple):
    """A line of the start-up report."""

    pattern: str
    targets: int
    parameters: int
    """Elements of the whole adapters."""


class _Adapted(NamedTuple):
    base: frozenset[str]
    matched: list[Matched]
    packing: Packing


def apply_lora(model: nn.Module, config: LoRAConfig) -> None:
    """Put adapters into a model on the meta device, in place, and freeze all else.

    Names and shapes of the model's own parameters stay.

    Raises `ConfigError` where a pattern matches nothing.
    """
    own = [name for name, _ in model.named_parameters()]
    chosen = _chosen(list(targets(model)), config)
    saved = _saved(own, config)
    model.requires_grad_(False)
    added: dict[str, list[int]] = {pattern: [] for pattern in config.targets}
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts):
            given = {part: f"{name}.{part}" for part in EXPERT_MATRICES if f"{name}.{part}" in chosen}
            wanted = {part: config.settings(target, dora=False) for part, target in given.items()}
            made = adapt(module, wanted) if wanted else module
        elif name in chosen:
            given = {"": name}
            dora = config.dora and isinstance(module, nn.Linear)
            made = adapt(module, config.settings(name, dora=dora))
        else:
            continue
        if made is not module:
            _replace(model, name, made)
            for part, target in given.items():
                added[chosen[target]].append(_elements(made, module, part))
    for name in saved:
        model.get_parameter(name).requires_grad_(True)
    lines = [Matched(pattern, len(sizes), sum(sizes)) for pattern, sizes in added.items()]
    setattr(model, _ADAPTED, _Adapted(frozenset(own) - frozenset(saved), lines, config.quantize_base))


def base_names(model: nn.Module) -> frozenset[str]:
    """Parameters that an adapted model keeps as they came: they are no part of its checkpoints."""
    return _adapted(model).base


def matched(model: nn.Module) -> list[Matched]:
    """What each pattern of `lora.targets` has added; a target counts for the first one that matches it."""
    return _adapted(model).matched


def packing(model: nn.Module) -> Packing:
    """What `packed_names` rest in, once an engine has the model."""
    return _adapted(model).packing


def packed_names(model: nn.Module) -> frozenset[str]:
    """Parameters that `lora.quantize_base` packs: matrices of linear layers and experts in repeated blocks.

    Those that are not trained in full. Embeddings, norms, routers, projector and head stay as they are: they
    are few, and rounding hurts most where everything passes through.
    """
    adapted = _adapted(model)
    if adapted.packing is Packing.none:
        return frozenset()
    if not isinstance(model, Trainable):
        raise TypeError(f"{type(model).__name__} lacks units; see cantata.models.protocol")
    names = (
        f"{unit.name}.{path}.{leaf}"
        for unit in model.units()
        if unit.is_block
        for path, module in unit.module.named_modules()
        for leaf in _matrices(module)
    )
    return frozenset(names) & adapted.base


def _matrices(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, Experts):
        return EXPERT_MATRICES
    return ("weight",) if isinstance(module, Linear) else ()


def _adapted(model: nn.Module) -> _Adapted:
    found: _Adapted = getattr(model, _ADAPTED, _Adapted(frozenset(), [], Packing.none))
    return found


def targets(model: nn.Module) -> Iterator[str]:
    """The name of every target of a model without adapters."""
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            yield from (f"{name}.{part}" for part in EXPERT_MATRICES)
        elif is_adaptable(module):
            yield name


def _chosen(names: list[str], config: LoRAConfig) -> dict[str, str]:
    """The pattern that each chosen target counts for."""
    for key, patterns in (("targets", config.targets), ("ranks", config.ranks)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                inside = any(fnmatchcase(name, f"*.{pattern}") for name in names)
                near = f"; write '*.{pattern}'" if inside else hint(pattern, _patterns(names))
                raise ConfigError(
                    f"lora.{key}: {pattern!r} matches no linear layer, embedding, head or experts{near}"
                )
    chosen = {}
    for name in names:
        first = next((pattern for pattern in config.targets if fnmatchcase(name, pattern)), None)
        if first is not None:
            chosen[name] = first
    return chosen


def _saved(names: list[str], config: LoRAConfig) -> list[str]:
    for pattern in config.modules_to_save:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"lora.modules_to_save: {pattern!r} matches no parameter{hint(pattern, _patterns(names))}"
            )
    return [name for name in names if any(fnmatchcase(name, p) for p in config.modules_to_save)]


def _patterns(names: list[str]) -> set[str]:
    """What the names have in common: one for all layers, since a model has too many names to list."""
    return {re.sub(r"\.\d+\.", ".*.", name) for name in names}


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _elements(adapted: nn.Module, base: nn.Module, part: str) -> int:
    """Elements that adapting has added, of experts those of one matrix."""
    before = {name for name, _ in base.named_parameters()}
    added: Mapping[str, nn.Parameter] = dict(adapted.named_parameters(recurse=False))
    return sum(p.numel() for name, p in added.items() if name not in before and name.startswith(part))
