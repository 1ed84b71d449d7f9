"""Averages of the weights over the steps, kept by the optimizer beside its moments.

An engine shards, offloads and saves them as it does moments, so nothing else knows of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from cantata.core.errors import ConfigError
from cantata.train.optim import OptimizerPartial

EMA = "ema"
"""Name of the average in a parameter's state; fp32, whatever the parameter is kept in."""


class AdamWithEMA(torch.optim.AdamW):
    """AdamW that also keeps an exponential moving average of every parameter.

    After update t of a parameter its average moves by `1 - min(decay, (1 + t) / (10 + t))` towards the new
    value; the first update copies it. The short memory of the first steps keeps initial values out.

    Args:
        params: parameter groups.
        ema_decay: the share of the average that stays in the long run; at least 0 and below 1.

    The others are AdamW's own.

    Raises:
        ConfigError: `ema_decay` is not in that range.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        fused: bool,
        ema_decay: float,
    ) -> None:
        if not 0 <= ema_decay < 1:
            raise ConfigError(f"optimizer.ema_decay={ema_decay} must be at least 0 and below 1")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)
        self.ema_decay = ema_decay

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update the parameters, then their averages."""
        loss = super().step(closure)
        parameters = [p for group in self.param_groups for p in group["params"] if p in self.state]
        if not parameters:
            return loss
        # One wait for the device at most, however many parameters.
        counts = torch.stack([self.state[p]["step"] for p in parameters]).tolist()
        for parameter, updates in zip(parameters, counts, strict=True):
            state = self.state[parameter]
            if EMA not in state:
                state[EMA] = parameter.detach().float().clone()
            # Shards alone: operations on DTensors are planned one by one.
            average, value = local(state[EMA]), local(parameter)
            if updates <= 1:
                # What it held may be no number, and 0 times that is none either.
                average.copy_(value)
            else:
                decay = min(self.ema_decay, (1 + updates) / (10 + updates))
                average.lerp_(value.float(), 1.0 - decay)
        return loss


def keeps_averages(optimizer: OptimizerPartial) -> bool:
    """Whether the optimizer that a partial makes is `AdamWithEMA`."""
    made = optimizer.func if isinstance(optimizer, partial) else optimizer
    return isinstance(made, type) and issubclass(made, AdamWithEMA)


def adam_state(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: Tensor
) -> dict[str, Tensor]:
    """The state that the first step of an optimizer of the Adam family would make for a parameter."""
    on_device = group["fused"] or group["capturable"]
    device = parameter.device if on_device else torch.device("cpu")
    state: dict[str, Tensor] = {"step": torch.zeros((), dtype=torch.float32, device=device)}
    moments = ["exp_avg", "exp_avg_sq"] + (["max_exp_avg_sq"] if group["amsgrad"] else [])
    state |= {name: torch.zeros_like(parameter, requires_grad=False) for name in moments}
    if isinstance(optimizer, AdamWithEMA):
        state[EMA] = parameter.detach().float().clone()
    return state


@contextmanager
def swapped(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> Iterator[bool]:
    """Put each parameter's average in its place, and the same bits back at the end.

    Before a parameter's first update its average is itself, whatever the state says: DeepSpeed's masters get
    their values after their state. Yields whether anything was swapped.
    """
    states = [(parameter, optimizer.state.get(parameter, {})) for parameter in parameters]
    held = [
        (local(p.detach()), local(state[EMA])) for p, state in states if EMA in state and state["step"] > 0
    ]
    before = [value.clone() for value, _ in held]
    with torch.no_grad():
        for value, average in held:
            value.copy_(average)
    try:
        yield bool(held)
    finally:
        with torch.no_grad():
            for (value, _), old in zip(held, before, strict=True):
                value.copy_(old)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
