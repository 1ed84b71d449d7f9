"""Imbalance as memory: the rows that one rank receives when experts are spread over ranks.

A row is a token at one of its experts. With `mesh.ep` ranks sharing the experts, a rank receives the rows of
its experts from the whole group, as many as the routers decide, and holds activations for each of them.

Shape suffixes as in `cantata.core.types`: L MoE layers, D hidden size; R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from cantata.nn.moe.dispatch import Dispatched
from cantata.nn.moe.layer import MoELayer
from cantata.train import humane
from cantata.train.loop import StepResult

MARGIN = 1.25
"""How much worse than at its last warning a layer must get to be named again."""
SHOWN = 3


class PeakRows:
    """The most rows that came to this rank's experts in one micro-batch of training, by layer.

    The sizes of the all-to-all are known on the host, so looking costs nothing. Evaluation is left out, and
    recomputation brings the same rows again. Make it before an engine takes the layers apart.
    """

    def __init__(self, layers: Sequence[MoELayer]) -> None:
        self._rows_L = [0] * len(layers)
        self.row_bytes_L = [0] * len(layers)
        """Bytes that a row's activations take, known once a micro-batch has run."""
        for index, layer in enumerate(layers):
            layer.experts.register_forward_pre_hook(self._watch(index, row_values(layer)))

    def take(self) -> list[int]:
        """The peaks since the last call."""
        rows_L, self._rows_L = self._rows_L, [0] * len(self._rows_L)
        return rows_L

    def _watch(self, index: int, values: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def look(module: nn.Module, inputs: tuple[Dispatched]) -> None:
            if torch.is_grad_enabled():
                [arrived] = inputs
                self._rows_L[index] = max(self._rows_L[index], len(arrived.order.token_R))
                self.row_bytes_L[index] = values * arrived.x_ND.element_size()

        hook: Callable[[nn.Module, tuple[Any, ...]], None] = look
        return hook


def row_values(layer: MoELayer) -> int:
    """Values that the experts keep of a row for backward: its input and both inputs of the gate."""
    _, hidden, inner = layer.experts.fc1.shape
    return hidden + inner


class Peak(NamedTuple):
    """The fullest rank in a layer."""

    layer: int
    rank: int
    rows: int
    row_bytes: int


class LoadWarning:
    """A listener that warns when one rank receives many more rows than its even share.

    It looks at every rank's largest micro-batch of every step, so the word comes before the memory runs out
    where imbalance grows over steps. A layer is named once, and again when it got worse by a quarter.

    Args:
        even_rows: rows that every rank receives in a micro-batch when all experts get equally many.
        threshold: times the even share from which on to warn.
        num_experts: of a layer; rank r holds those of coordinate r % ep.
        warn: shows a line to the user; called on rank 0 alone.
    """

    def __init__(
        self,
        peaks: PeakRows,
        *,
        even_rows: int,
        threshold: float,
        num_experts: int,
        ep: int,
        warn: Callable[[str], None],
    ) -> None:
        self._peaks = peaks
        self._even_rows = even_rows
        self._threshold = threshold
        self._experts_per_rank = num_experts // ep
        self._ep = ep
        self._warn = warn
        self._told: dict[int, int] = {}

    def after_step(self, result: StepResult) -> None:
        new = []
        for layer, (rows, rank) in enumerate(largest_over_ranks(self._peaks.take())):
            bar = max(self._threshold * self._even_rows, MARGIN * self._told.get(layer, 0))
            if rows > bar:
                self._told[layer] = rows
                new.append(Peak(layer, rank, rows, self._peaks.row_bytes_L[layer]))
        if new and dist.get_rank() == 0:
            self._warn(self._text(result.progress.step, sorted(new, key=lambda peak: -peak.rows)))

    def _text(self, step: int, peaks: Sequence[Peak]) -> str:
        worst, *others = peaks
        first = worst.rank % self._ep * self._experts_per_rank
        also = ", ".join(f"{peak.layer} ({self._times(peak)})" for peak in others[:SHOWN])
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        return (
            f"step {step}, layer {worst.layer}: rank {worst.rank} (experts {first} to "
            f"{first + self._experts_per_rank - 1}) received {worst.rows:,} rows of tokens in one "
            f"micro-batch, {self._times(worst)} the even share of {self._even_rows:,}; its experts keep "
            f"{humane.size(worst.rows * worst.row_bytes)} of activations in that layer instead of "
            f"{humane.size(self._even_rows * worst.row_bytes)}"
            + (f"; also in layer {also}{more}" if others else "")
            + ". Before memory runs out, raise the balance's aux_loss_coef or bias_update_rate, or lower "
            "train.micro_batch_size or train.sequence_length"
        )

    def _times(self, peak: Peak) -> str:
        return f"{peak.rows / self._even_rows:.1f} times"


def largest_over_ranks(values: Sequence[int]) -> list[tuple[int, int]]:
    """Each value's maximum over ranks and the first rank that has it; a collective on the host."""
    size, rank = dist.get_world_size(), dist.get_rank()
    coded = torch.tensor([value * size + size - 1 - rank for value in values], dtype=torch.int64)
    dist.all_reduce(coded, dist.ReduceOp.MAX)
    return [(code // size, size - 1 - code % size) for code in coded.tolist()]
