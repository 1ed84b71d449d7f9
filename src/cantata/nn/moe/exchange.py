"""Experts spread over processes: tokens travel to them and back in uneven all-to-alls.

R  rows that leave: one for each (token, choice) here, sorted by expert
A  rows that arrive: in the order of the processes that they come from, each sorted by expert
N  processes of the group    e  experts of one process
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from cantata.nn.moe.dispatch import Dispatched, Order, expand, reduce
from cantata.nn.moe.router import count


class Splits(NamedTuple):
    """Rows to and from each process of the group, known on the host."""

    leaving: list[int]
    arriving: list[int]

    def back(self) -> Splits:
        return Splits(self.arriving, self.leaving)


@dataclass
class Journey:
    """Rows on their way to other processes."""

    splits: Splits
    group: ProcessGroup
    under_way: Tensor | None = None

    def arrive(self) -> Tensor:
        """Wait for the rows: in the order of the processes that they come from."""
        started, self.under_way = self.under_way, None
        assert started is not None
        return _wait(started)


class Sent(NamedTuple):
    """What `receive` needs."""

    token: Tensor
    journey: Journey
    received_Ne: Tensor
    """Rows from each process for each expert held here."""
    weights_TK: Tensor
    order: Order


class Return(NamedTuple):
    """What the way back needs."""

    splits: Splits
    weights_TK: Tensor
    order: Order


class ExchangeDispatcher:
    """Process n of the group holds experts n * e to (n + 1) * e - 1.

    Counts travel first and once, and wait for the device, since the sizes of the all-to-all must be known on
    the host. Nothing is dropped and nothing padded. A process without rows still takes part, in backward
    too. Collectives are torch's functional ones, so that recomputation can keep their results.
    """

    def __init__(self, num_experts: int, group: ProcessGroup) -> None:
        """Raises `ValueError` where the processes do not divide the experts."""
        if num_experts % group.size():
            raise ValueError(f"{group.size()} processes do not divide {num_experts} experts")
        self.num_experts = num_experts
        self.group = group

    def send(self, x_TD: Tensor, weights_TK: Tensor, expert_index_TK: Tensor) -> Sent:
        """See `Dispatcher`."""
        order = Order.of(expert_index_TK)
        size = self.group.size()
        leaving_Ne = count(expert_index_TK, self.num_experts).view(size, -1)
        received_Ne = _wait(_exchange(leaving_Ne, Splits([1] * size, [1] * size), self.group))
        journey = Journey(self.splits(leaving_Ne, received_Ne), self.group)
        token: Tensor = _Start.apply(expand(x_TD, order), journey)  # type: ignore[no-untyped-call]
        return Sent(token, journey, received_Ne, weights_TK, order)

    def splits(self, leaving_Ne: Tensor, received_Ne: Tensor) -> Splits:
        """The rows of each process, on the host; waits for the device."""
        leaving, arriving = torch.stack((leaving_Ne.sum(1), received_Ne.sum(1))).tolist()
        return Splits(leaving, arriving)

    def receive(self, sent: Sent) -> Dispatched:
        """See `Dispatcher`."""
        x_AD: Tensor = _Finish.apply(sent.token, sent.journey)  # type: ignore[no-untyped-call]
        found_A, arrival_A = _by_expert(sent.received_Ne, len(x_AD))
        state = Return(sent.journey.splits.back(), sent.weights_TK, sent.order)
        order = Order(found_A, arrival_A[:, None], found_A)
        return Dispatched(x_AD, None, sent.received_Ne.sum(0), order, state)

    def combine(self, y_ND: Tensor, state: Return) -> Tensor:
        """See `Dispatcher`."""
        journey = Journey(state.splits, self.group)
        token = _Start.apply(y_ND, journey)  # type: ignore[no-untyped-call]
        y_RD: Tensor = _Finish.apply(token, journey)  # type: ignore[no-untyped-call]
        return reduce(y_RD, state.weights_TK, state.order)


def _by_expert(received_Ne: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Where to find each row of the expert order among the arriving rows, and the inverse."""
    lengths = received_Ne.flatten()
    begins_Ne = (lengths.cumsum(0) - lengths).view_as(received_Ne)
    sorted_lengths = received_Ne.t().flatten()
    offsets = begins_Ne.t().flatten() - (sorted_lengths.cumsum(0) - sorted_lengths)
    rows_A = torch.arange(total, device=received_Ne.device)
    found_A = rows_A + torch.repeat_interleave(offsets, sorted_lengths, output_size=total)
    return found_A, torch.empty_like(found_A).index_copy_(0, found_A, rows_A)


def _exchange(rows: Tensor, splits: Splits, group: ProcessGroup) -> Tensor:
    """Start an all-to-all along the first dimension; the result must be waited for."""
    started: Tensor = torch.ops._c10d_functional.all_to_all_single(
        rows.contiguous(), splits.arriving, splits.leaving, group.group_name
    )
    return started


def _wait(started: Tensor) -> Tensor:
    arrived: Tensor = torch.ops._c10d_functional.wait_tensor(started)
    return arrived


class _Start(torch.autograd.Function):
    """Starts a journey; in backward, the gradients' journey back ends here.

    What autograd sees between start and finish is an empty token: the rows under way have other lengths in
    backward than in forward.
    """

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        journey.under_way = _exchange(x_RD, journey.splits, journey.group)
        return x_RD.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token: Tensor) -> tuple[Tensor, None]:
        return ctx.journey.arrive(), None


class _Finish(torch.autograd.Function):
    """Ends a journey; in backward, the gradients' journey back starts here.

    Between the two nodes backward runs what forward ran between `send` and `receive`.
    """

    @staticmethod
    def forward(ctx: Any, token: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        return journey.arrive()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AD: Tensor) -> tuple[Tensor, None]:
        journey = ctx.journey
        journey.under_way = _exchange(grad_AD, journey.splits.back(), journey.group)
        return grad_AD.new_empty(0), None
