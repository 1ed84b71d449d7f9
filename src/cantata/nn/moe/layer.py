"""The MoE layer: router, dispatcher, experts and the shared expert."""

from __future__ import annotations

from torch import Tensor, nn

from cantata.core.types import RouterStats, TokenGroups
from cantata.nn.mlp import SwiGLU
from cantata.nn.moe.dispatch import Dispatcher, LocalDispatcher
from cantata.nn.moe.experts import Experts
from cantata.nn.moe.router import TopKRouter


class MoELayer(nn.Module):
    """Top-k routed experts plus a shared expert that every token visits, added unscaled.

    Without token groups, as in generation, nothing is said of the routing.

    `dispatcher` is replaced by a plan that spreads the experts over devices.
    """

    def __init__(self, router: TopKRouter, experts: Experts, shared_experts: SwiGLU) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared_experts = shared_experts
        self.dispatcher: Dispatcher = LocalDispatcher(router.num_experts)

    def forward(self, x_TD: Tensor, groups: TokenGroups | None) -> tuple[Tensor, RouterStats | None]:
        weights_TK, expert_index_TK, stats = self.router(x_TD, groups)
        sent = self.dispatcher.send(x_TD, weights_TK, expert_index_TK)
        shared_TD = self.shared_experts(x_TD)
        arrived = self.dispatcher.receive(sent)
        return self.dispatcher.combine(self.experts(arrived), arrived.state) + shared_TD, stats
