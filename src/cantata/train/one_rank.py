"""A model as one rank of many computes with it: its own experts, and tokens that come from everywhere.

Nothing here needs a process group, so one process can ask what a rank among hundreds would hold.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from cantata.models.protocol import Trainable
from cantata.nn.moe.exchange import ExchangeDispatcher, Sent, Splits
from cantata.parallel.expert import check_ranks


class Elements(NamedTuple):
    """Elements of tensors as a rank computes with them, before anything shards them."""

    dense: int
    experts: int
    """Of the num_experts / ep experts of each layer that are the rank's."""

    @staticmethod
    def of(parameters: Iterable[Tensor], experts: set[int]) -> Elements:
        """`experts` holds the ids of the parameters that belong to experts: see `expert_ids`."""
        counts = [0, 0]
        for parameter in parameters:
            counts[id(parameter) in experts] += parameter.numel()
        return Elements(*counts)


def expert_ids(model: Trainable) -> set[int]:
    """The ids of the parameters that belong to experts."""
    return {id(parameter) for layer in model.moe_layers() for parameter in layer.experts.parameters()}


def on_one_rank(model: Trainable, ep: int) -> Trainable:
    """A copy that holds the experts of one rank of `ep` and routes to it as many rows as leave it.

    Args:
        model: whole and on the meta device; it stays as it is.
        ep: ranks that the experts are spread over.

    Raises:
        ConfigError: the ranks do not divide the experts.
    """
    local = copy.deepcopy(model)
    for layer in local.moe_layers() if ep > 1 else ():
        num_experts = layer.router.num_experts
        check_ranks(num_experts, ep)
        for name, parameter in list(layer.experts.named_parameters(recurse=False)):
            part = parameter.new_empty((num_experts // ep, *parameter.shape[1:]))
            setattr(layer.experts, name, nn.Parameter(part, requires_grad=parameter.requires_grad))
        layer.dispatcher = BalancedExchange(num_experts, ep)
    return local


class BalancedExchange(ExchangeDispatcher):
    """Routing without values: every rank sends every other the same number of rows."""

    def __init__(self, num_experts: int, ranks: int) -> None:
        super().__init__(num_experts, cast(ProcessGroup, _Ranks(ranks)))
        self._rows = 0

    def send(self, x_TD: Tensor, weights_TK: Tensor, expert_index_TK: Tensor) -> Sent:
        """See `Dispatcher`."""
        self._rows = expert_index_TK.numel()
        sent: Sent = super().send(x_TD, weights_TK, expert_index_TK)
        return sent

    def splits(self, leaving_Ne: Tensor, received_Ne: Tensor) -> Splits:
        """The rows shared out evenly; those that are left over go to the first ranks."""
        ranks = self.group.size()
        each = [self._rows // ranks + (rank < self._rows % ranks) for rank in range(ranks)]
        return Splits(each, each)


class _Ranks:
    """As much of a process group as shapes need: its name is never looked up without storage."""

    group_name = "none"

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks

    def size(self) -> int:
        return self._ranks

    def __deepcopy__(self, memo: Any) -> _Ranks:
        return self
