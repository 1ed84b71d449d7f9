"""AdamW's averages: the update by hand, the state from the start, and the swap, bit by bit."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cantata.core.errors import ConfigError
from cantata.train.ema import AdamWithEMA, adam_state, swapped
from cantata.train.optim import optimizer_defaults

ADAM: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
DECAY = 0.3
"""The bound of the third update and of all that follow."""


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,), (2,))]


def step(optimizer: torch.optim.Optimizer, values: list[nn.Parameter], seed: int) -> None:
    """The last parameter has a gradient in even steps alone."""
    generator = torch.Generator().manual_seed(seed)
    for value in values:
        value.grad = torch.randn(value.shape, generator=generator).to(value.dtype)
    if seed % 2:
        values[-1].grad = None
    optimizer.step()


@pytest.mark.parametrize("fused", [True, False])
def test_averages_are_those_written_out_and_weights_adamws(fused: bool) -> None:
    ours, theirs = parameters(), parameters()
    optimizer = AdamWithEMA(ours, **ADAM, fused=fused, ema_decay=DECAY)
    plain = torch.optim.AdamW(theirs, **ADAM, fused=fused)
    averages: list[Tensor] = []
    for seed in range(8):
        step(optimizer, ours, seed)
        step(plain, theirs, seed)
        if seed == 0:
            averages = [value.detach().clone() for value in theirs]
        else:
            for index, value in enumerate(theirs):
                updates = seed + 1 if index < 2 else seed // 2 + 1
                decay = min(DECAY, (1 + updates) / (10 + updates)) if updates > 1 else 0.0
                averages[index] = decay * averages[index] + (1 - decay) * value.detach()
    for value, other, average in zip(ours, theirs, averages, strict=True):
        assert torch.equal(value, other)
        torch.testing.assert_close(optimizer.state[value]["ema"], average, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fused", [True, False])
def test_state_made_at_the_start_changes_nothing(fused: bool) -> None:
    early, late = parameters(), parameters()
    optimizers = [AdamWithEMA(values, **ADAM, fused=fused, ema_decay=DECAY) for values in (early, late)]
    group = optimizers[0].param_groups[0]
    for value in early:
        optimizers[0].state[value] = adam_state(optimizers[0], group, value)
        assert torch.equal(optimizers[0].state[value]["ema"], value)
    for seed in range(0, 6, 2):
        for optimizer, values in zip(optimizers, (early, late), strict=True):
            step(optimizer, values, seed)
    for one, other in zip(early, late, strict=True):
        states = [optimizer.state[value] for optimizer, value in zip(optimizers, (one, other), strict=True)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_averages_of_bf16_are_fp32() -> None:
    value = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = AdamWithEMA([value], **(ADAM | {"lr": 1e-2}), fused=False, ema_decay=0.999)
    for seed in range(4):
        step(optimizer, [value], 2 * seed)
    average = optimizer.state[value]["ema"]
    assert average.dtype == torch.float32
    assert not torch.equal(average, average.bfloat16().float())
    before = value.detach().clone()
    with swapped(optimizer, [value]):
        assert torch.equal(value, average.bfloat16())
    assert torch.equal(value, before)


def test_swapping_is_exact_even_where_the_body_fails() -> None:
    values = parameters()
    optimizer = AdamWithEMA(values, **ADAM, fused=False, ema_decay=DECAY)
    for value in values:
        optimizer.state[value] = adam_state(optimizer, optimizer.param_groups[0], value)
        optimizer.state[value]["ema"].fill_(float("nan"))
    with swapped(optimizer, values) as are_averages:
        assert not are_averages
        assert not values[0].isnan().any()
    for seed in (0, 2):
        step(optimizer, values, seed)
    before = [value.detach().clone() for value in values]
    averages = [optimizer.state[value]["ema"].clone() for value in values]
    seen = []

    def fail() -> None:
        with swapped(optimizer, values) as are_averages:
            seen.append(are_averages and all(map(torch.equal, values, averages)))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [True]
    assert all(map(torch.equal, values, before))
    assert all(torch.equal(optimizer.state[v]["ema"], a) for v, a in zip(values, averages, strict=True))


def test_a_plain_optimizer_has_no_averages() -> None:
    values = parameters()
    optimizer = torch.optim.AdamW(values, **ADAM)
    step(optimizer, values, 0)
    with swapped(optimizer, values) as are_averages:
        assert not are_averages


def test_its_settings_are_read_as_those_of_adamw() -> None:
    assert optimizer_defaults(partial(AdamWithEMA, **ADAM, fused=True, ema_decay=0.9)) == (0.1, 0.1)
    for decay in (1.0, -0.1):
        with pytest.raises(
            ConfigError, match=rf"optimizer\.ema_decay={decay} must be at least 0 and below 1"
        ):
            AdamWithEMA(parameters(), **ADAM, fused=False, ema_decay=decay)
