"""The exchange against the local dispatcher: same rows, same sums, same gradients, on unequal ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cantata.nn.moe.dispatch import Dispatcher, LocalDispatcher, expand, reduce
from cantata.nn.moe.exchange import ExchangeDispatcher
from tests.distributed.spawn import run_ranks

pytestmark = pytest.mark.distributed

EXPERTS, TOP_K, HIDDEN = 6, 2, 4
# Rank 1 sends nothing; in "one expert" all rows go to rank 0, and the others receive none.
TOKENS = (5, 0, 3)


def make_inputs(rank: int, case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    tokens = TOKENS[rank]
    x_TD = torch.randn(tokens, HIDDEN, generator=generator).to(dtype).requires_grad_()
    index_TK = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :TOP_K]
    if case == "one expert":
        index_TK = torch.tensor([[0, 1]]).repeat(tokens, 1)
    weights_TK = torch.rand(tokens, TOP_K, generator=generator).requires_grad_()
    return x_TD, index_TK, weights_TK, torch.randn(tokens, HIDDEN, generator=generator).to(dtype)


def through(dispatcher: Dispatcher, first: int, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Expert e multiplies by e + 1; `first` is the first expert here."""
    x_TD, index_TK, weights_TK, grad_TD = inputs
    between = (x_TD * 3).sin()
    sent = dispatcher.send(x_TD, weights_TK, index_TK)
    between = between * 2
    x_ND, weights_NK, tokens_per_expert_E, order, state = dispatcher.receive(sent)
    x_RD = expand(x_ND, order)
    expert_E = torch.arange(first + 1, first + 1 + len(tokens_per_expert_E), dtype=x_RD.dtype)
    y_RD = x_RD * expert_E.repeat_interleave(tokens_per_expert_E)[:, None]
    y_ND = reduce(y_RD, torch.ones(order.row_TK.shape) if weights_NK is None else weights_NK, order)
    y_TD = dispatcher.combine(y_ND, state) + between
    grad_x, grad_weights = torch.autograd.grad(y_TD, (x_TD, weights_TK), grad_TD)
    return {"y": y_TD.detach(), "x": grad_x, "weights": grad_weights, "counts": tokens_per_expert_E}


def compare() -> list[tuple[str, dict[str, Tensor], dict[str, Tensor]]]:
    rank, size = dist.get_rank(), dist.get_world_size()
    exchange = ExchangeDispatcher(EXPERTS, dist.group.WORLD)  # type: ignore[arg-type]
    found: list[Any] = []
    for case in ("spread", "one expert"):
        for dtype in (torch.float32, torch.bfloat16):
            inputs = make_inputs(rank, case, dtype)
            spread = through(exchange, rank * EXPERTS // size, inputs)
            found.append((f"{case} {dtype}", spread, through(LocalDispatcher(EXPERTS), 0, inputs)))
    return found


@pytest.fixture(scope="module")
def ranks() -> list[list[tuple[str, dict[str, Tensor], dict[str, Tensor]]]]:
    return run_ranks(compare, 3)


def test_equals_the_local_dispatcher_to_the_bit(ranks: Any) -> None:
    for rank in ranks:
        for case, spread, local in rank:
            for name in ("y", "x", "weights"):
                assert torch.equal(spread[name], local[name]), (case, name)


def test_every_choice_arrives_where_its_expert_is(ranks: Any) -> None:
    for case, _, _ in ranks[0]:
        arrived = torch.cat([next(s for c, s, _ in rank if c == case)["counts"] for rank in ranks])
        wanted = sum(next(local for c, _, local in rank if c == case)["counts"] for rank in ranks)
        assert torch.equal(arrived, wanted)
    assert next(s for c, s, _ in ranks[2] if c.startswith("one expert"))["counts"].tolist() == [0, 0]


class _TwoProcesses:
    def size(self) -> int:
        return 2


def test_experts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="2 processes do not divide 5 experts"):
        ExchangeDispatcher(5, _TwoProcesses())  # type: ignore[arg-type]
