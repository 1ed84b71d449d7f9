"""The MoE layer: router, dispatcher, experts and the shared expert."""

from __future__ import annotations

from torch import Tensor, nn

from cantata.core.types import RouterStats
from cantata.nn.mlp import SwiGLU
from cantata.nn.moe.dispatch import Dispatcher, LocalDispatcher
from cantata.nn.moe.experts import Experts
from cantata.nn.moe.router import TopKRouter


class MoELayer(nn.Module):
    """Top-k routed experts plus a shared expert that every token visits, added unscaled.

    `dispatcher` is replaced by a plan that spreads the experts over devices.
    """

    def __init__(self, router: TopKRouter, experts: Experts, shared_experts: SwiGLU) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared_experts = shared_experts
        self.dispatcher: Dispatcher = LocalDispatcher(router.num_experts)

    def forward(self, x_TD: Tensor, modality_ids_T: Tensor) -> tuple[Tensor, RouterStats]:
        weights_TK, expert_index_TK, stats = self.router(x_TD, modality_ids_T)
        x_RD, tokens_per_expert_E, state = self.dispatcher.dispatch(x_TD, expert_index_TK)
        y_RD = self.experts(x_RD, tokens_per_expert_E)
        y_TD = self.dispatcher.combine(y_RD, weights_TK, state)
        return y_TD + self.shared_experts(x_TD), stats
