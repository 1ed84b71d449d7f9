"""Which parameters are trained, at which learning rate, with which weight decay."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import nn

from cantata.core.errors import ConfigError
from cantata.core.suggest import hint
from cantata.models.lora import base_names


@dataclass(frozen=True)
class ParameterRule:
    """What a pattern under `parameters` asks for."""

    learning_rate: float | None
    """Base rate of the matched parameters; null keeps the optimizer's `lr`."""
    weight_decay: float | None
    """Decay of the matched matrices; null keeps the optimizer's `weight_decay`."""
    frozen: bool
    """Leave the matched parameters as they are."""


class GroupSummary(NamedTuple):
    """A line of the start-up report."""

    name: str
    tensors: int
    parameters: int
    """Elements of the whole, unsharded tensors."""
    learning_rate: float | None
    """None for frozen parameters."""
    weight_decay: float | None


OptimizerPartial = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""An optimizer's class with every argument but its parameter groups."""


def optimizer_defaults(optimizer: OptimizerPartial) -> tuple[float, float]:
    """(lr, weight_decay) that a partial optimizer was given, or that its signature says."""
    arguments = inspect.signature(optimizer).parameters
    values = {name: float(arguments[name].default) for name in ("lr", "weight_decay")}
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise ConfigError(f"optimizer.{name}={value} must be a number, at least 0")
    return values["lr"], values["weight_decay"]


def parameter_groups(
    model: nn.Module, rules: Mapping[str, ParameterRule], base_lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Optimizer groups of the trained parameters; freezes those that a rule freezes.

    The last rule whose pattern (`fnmatch`, on the parameter's name) matches decides; what the model
    itself has frozen stays frozen. Tensors of fewer than two dimensions (norms and biases) never
    decay. Each group carries `name`, `lr`, `weight_decay` and `base_lr`, which schedules multiply.

    Raises:
        ConfigError: a pattern matches no parameter, or means to train what adapters leave frozen, or nothing
            is left to train.
    """
    named = dict(model.named_parameters())
    for pattern in rules:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise ConfigError(f"parameters.{pattern!r} matches no parameter{_near(pattern, named)}")
    base = base_names(model)
    for pattern, rule in rules.items():
        if not rule.frozen and base.issuperset(name for name in named if fnmatchcase(name, pattern)):
            raise ConfigError(
                f"parameters.{pattern!r} matches only what adapters leave frozen; to train it in full, name "
                "it under lora.modules_to_save"
            )
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in named.items():
        match = deciding_pattern(name, rules)
        rule = rules[match] if match is not None else ParameterRule(None, None, frozen=False)
        if rule.frozen:
            parameter.requires_grad_(False)
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim >= 2
        rate = base_lr if rule.learning_rate is None else rule.learning_rate
        decay = weight_decay if rule.weight_decay is None else rule.weight_decay
        group = groups.setdefault(
            (match or "default", decays),
            {
                "name": (match or "default") + ("" if decays else " (no decay)"),
                "params": [],
                "lr": rate,
                "base_lr": rate,
                "weight_decay": decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    if not groups:
        raise ConfigError("parameters: every parameter is frozen, nothing is left to train")
    return list(groups.values())


def deciding_pattern(name: str, rules: Mapping[str, ParameterRule]) -> str | None:
    """The last pattern that matches a parameter's name."""
    return next((pattern for pattern in reversed(list(rules)) if fnmatchcase(name, pattern)), None)


def describe_groups(groups: Sequence[Mapping[str, Any]], model: nn.Module) -> list[GroupSummary]:
    """What is trained, group by group, and last what is frozen; made before anything is partitioned."""
    lines = [
        GroupSummary(
            group["name"],
            len(group["params"]),
            sum(parameter.numel() for parameter in group["params"]),
            group["base_lr"],
            group["weight_decay"],
        )
        for group in groups
    ]
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    if frozen:
        count = sum(parameter.numel() for parameter in frozen)
        lines.append(GroupSummary("frozen", len(frozen), count, None, None))
    return lines


def _near(pattern: str, names: Mapping[str, object]) -> str:
    """Names and parents of names, as patterns are mostly written for whole modules."""
    stems = {".".join(name.split(".")[: depth + 1]) for name in names for depth in range(name.count(".") + 1)}
    wanted = pattern.replace("*", "").strip(".")
    near = hint(wanted, stems)
    return near if near.startswith("; nearest") else hint(wanted, {name.split(".")[0] for name in names})
