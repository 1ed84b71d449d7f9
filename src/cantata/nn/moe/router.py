"""The router: which experts a token visits, with what weight, and what that says of the balance."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cantata.core.types import MODALITIES, RouterStats
from cantata.nn.matmul import linear


class Routing(NamedTuple):
    """Where each token goes."""

    weights_TK: Tensor
    """Share of each chosen expert, fp32; sums to 1 over K."""
    expert_index_TK: Tensor
    """The chosen experts, int64."""
    stats: RouterStats


class TopKRouter(nn.Module):
    """Picks the top k experts by logit; their weights are a softmax over those k logits, in fp32.

    With `use_expert_bias`, a persistent fp32 buffer is added to the logits when experts are picked and
    nowhere else (loss-free balancing, Wang et al., 2024); `balance.update_expert_bias` moves it.
    """

    expert_bias_E: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        aux_loss_coef: float,
        z_loss_coef: float,
        use_expert_bias: bool,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k
        self.aux_loss_coef = aux_loss_coef
        self.z_loss_coef = z_loss_coef
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        bias_E = torch.zeros(num_experts, dtype=torch.float32) if use_expert_bias else None
        self.register_buffer("expert_bias_E", bias_E)

    def forward(self, x_TD: Tensor, modality_ids_T: Tensor) -> Routing:
        logits_TE = linear(x_TD, self.weight).float()
        if self.expert_bias_E is None:
            top_TK, expert_index_TK = torch.topk(logits_TE, self.top_k, dim=-1)
        else:
            expert_index_TK = torch.topk(logits_TE + self.expert_bias_E, self.top_k, dim=-1).indices
            top_TK = logits_TE.gather(-1, expert_index_TK)
        stats = router_stats(logits_TE, expert_index_TK, modality_ids_T, self.aux_loss_coef, self.z_loss_coef)
        return Routing(top_TK.softmax(dim=-1), expert_index_TK, stats)


def router_stats(
    logits_TE: Tensor,
    expert_index_TK: Tensor,
    modality_ids_T: Tensor,
    aux_loss_coef: float,
    z_loss_coef: float,
) -> RouterStats:
    """Balance of one layer over the tokens that are not padding.

    The auxiliary loss is `E / (k T^2) * sum_i(P_i n_i)` (Fedus et al., 2021), where `P_i` is the summed
    probability of expert i and `n_i` the number of tokens that chose it; the z loss is the mean of
    `logsumexp(logits)^2` (Zoph et al., 2022).
    """
    num_experts, top_k = logits_TE.shape[1], expert_index_TK.shape[1]
    counts_ME = count_by_modality(expert_index_TK, modality_ids_T, num_experts)
    valid_T = (modality_ids_T >= 0).to(logits_TE.dtype)
    tokens = valid_T.sum().clamp_min(1)
    lse_T = logits_TE.logsumexp(dim=-1)
    # Matrix by matrix: a vector would be squeezed in place, which selective recomputation forbids.
    mass_E = (valid_T[None] @ (logits_TE - lse_T[:, None]).exp())[0]
    counts_E = counts_ME.sum(0).to(logits_TE.dtype)
    aux = num_experts / top_k * (mass_E @ counts_E) / tokens.square()
    z = (valid_T @ lse_T.square()) / tokens
    return RouterStats(aux_loss_coef * aux + z_loss_coef * z, aux.detach(), z.detach(), counts_ME)


def count_by_modality(expert_index_TK: Tensor, modality_ids_T: Tensor, num_experts: int) -> Tensor:
    """Tokens that chose each expert, by modality, without padding: int64, (M, E)."""
    bins = len(MODALITIES) * num_experts
    padding_T1 = (modality_ids_T < 0)[:, None]
    index_TK = torch.where(padding_T1, bins, modality_ids_T[:, None] * num_experts + expert_index_TK)
    return count(index_TK, bins + 1)[:bins].view(len(MODALITIES), num_experts)


def count(index: Tensor, bins: int) -> Tensor:
    """How often each of `bins` values occurs, int64; unlike bincount it never waits for the device."""
    zeros = torch.zeros(bins, dtype=torch.int64, device=index.device)
    return zeros.scatter_add(0, index.flatten(), torch.ones_like(index).flatten())
