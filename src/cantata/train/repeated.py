"""Runs a few of a model's equal blocks in place of all of them.

Of equal blocks in a row each keeps as much for backward as the others, and makes as much of gradients. So
the dry run takes the first three and the last; what the second keeps counts for the skipped ones too, from
the end of the last one's forward until its own backward has ended, when all have their gradients. What is
alive while block i runs backward is a linear function of i: it is highest at one of the ends, and these run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from cantata.models.protocol import Unit
from cantata.train.live_bytes import LiveBytes, Purpose

FEWEST = 6
"""Equal blocks in a row that are worth it."""

Run = list[nn.Module]


def equal_blocks(units: Sequence[Unit]) -> list[Run]:
    """Blocks that follow one another and have parts of the same shapes; only long runs."""
    runs = [[unit.module for unit in run] for is_block, run in groupby(units, key=_shape) if is_block]
    return [run for run in runs if len(run) >= FEWEST]


def _shape(unit: Unit) -> Any:
    """Nothing for what is no block."""
    if not unit.is_block:
        return None
    parameters = unit.module.named_parameters()
    return type(unit.module), [(name, p.shape, p.dtype, p.requires_grad) for name, p in parameters]


def shorten(run: Run, live: LiveBytes, gradient_bytes: Callable[[nn.Module], int]) -> None:
    """Run three of the blocks and the last; the others hand on what they are given.

    Args:
        run: of `equal_blocks`; their forwards are replaced.
        gradient_bytes: what stays of a block's gradients.
    """
    # What the second gives out may die once the third has read it; what the third gives out goes on.
    _, second, _, *skipped, last = run
    kept = _Kept(live, len(skipped), sum(map(gradient_bytes, skipped)))
    _after(second, kept.second)
    for block in skipped:
        block.forward = kept.skip
    _after(last, kept.last)


def _after(block: nn.Module, watch: Callable[..., Any]) -> None:
    forward = block.forward
    block.forward = lambda *args, **kwargs: watch(lambda: forward(*args, **kwargs), args[0])


class _Kept:
    """What the skipped blocks would hold."""

    def __init__(self, live: LiveBytes, blocks: int, gradient_bytes: int) -> None:
        self._live = live
        self._blocks = blocks
        self._gradient_bytes = gradient_bytes
        self._bytes: Counter[Purpose] = Counter()

    def second(self, call: Callable[[], Any], x: Tensor) -> Any:
        """The block that stands for the skipped ones; its input's gradient ends its backward."""
        result, self._made = self._live.recorded(call)
        self._rest = None if isinstance(result, Tensor) else result[1:]
        if torch.is_grad_enabled() and x.requires_grad:
            x.register_hook(self._in_backward)  # type: ignore[no-untyped-call]
        return result

    def skip(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As a block's result: its input in the first place, the rest of what the second returned behind."""
        return x if self._rest is None else (x, *self._rest)

    def last(self, call: Callable[[], Any], x: Tensor) -> Any:
        """Only now is known what of the second block's stays."""
        result = call()
        self._rest = None
        # Without gradients its output is all that is left, and goes.
        if x.requires_grad:
            for held in self._made:
                self._bytes[held.purpose] += self._blocks * held.size
        self._made.clear()
        for purpose, size in self._bytes.items():
            self._live.add(size, purpose)
        return result

    def _in_backward(self, gradient: Tensor) -> None:
        for purpose, size in self._bytes.items():
            self._live.add(-size, purpose)
        self._bytes.clear()
        self._live.add(self._gradient_bytes, Purpose.gradients)
