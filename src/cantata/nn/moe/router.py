"""The router: which experts a token visits, with what weight, and what that says of the balance.

S  samples of the micro-batch    G  groups of experts
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cantata.core.types import MODALITIES, RouterStats, TokenGroups
from cantata.nn.matmul import linear


class Routing(NamedTuple):
    """Where each token goes."""

    weights_TK: Tensor
    """Share of each chosen expert, fp32; sums to 1 over K."""
    expert_index_TK: Tensor
    """The chosen experts, int64."""
    stats: RouterStats | None
    """None where no token groups were given."""


class TopKRouter(nn.Module):
    """Picks the top k experts by logit; their weights are a softmax over those k logits, in fp32.

    With `use_expert_bias`, a persistent fp32 buffer is added to the logits when experts are picked and
    nowhere else (loss-free balancing, Wang et al., 2024); `balance.update_expert_bias` moves it.

    With `top_groups` below `num_groups`, a token picks among the experts of its best groups only, a group
    being as good as its best expert (device-limited routing, DeepSeek-AI 2024, arXiv:2405.04434, 2.1.4).
    Groups are runs of consecutive experts, as the ranks of a mesh hold them.
    """

    expert_bias_E: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        num_groups: int,
        top_groups: int,
        use_expert_bias: bool,
        sequence_stats: bool,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.sequence_stats = sequence_stats
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        bias_E = torch.zeros(num_experts, dtype=torch.float32) if use_expert_bias else None
        self.register_buffer("expert_bias_E", bias_E)

    def forward(self, x_TD: Tensor, groups: TokenGroups | None) -> Routing:
        logits_TE = linear(x_TD, self.weight).float()
        expert_index_TK, top_TK = self._choose(logits_TE)
        stats = None
        if groups is not None:
            # A frozen router cannot follow its balance terms; they must not bend what comes before it either.
            seen_TE = logits_TE if self.weight.requires_grad else logits_TE.detach()
            stats = router_stats(seen_TE, expert_index_TK, groups, self.sequence_stats)
        return Routing(top_TK.softmax(dim=-1), expert_index_TK, stats)

    def _choose(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen experts and their logits."""
        if self.expert_bias_E is None and self.top_groups == self.num_groups:
            top_TK, expert_index_TK = torch.topk(logits_TE, self.top_k, dim=-1)
            return expert_index_TK, top_TK
        scores_TE = logits_TE.detach()
        if self.expert_bias_E is not None:
            scores_TE = scores_TE + self.expert_bias_E
        if self.top_groups < self.num_groups:
            scores_TE = limit_groups(scores_TE, self.num_groups, self.top_groups)
        expert_index_TK = torch.topk(scores_TE, self.top_k, dim=-1).indices
        return expert_index_TK, logits_TE.gather(-1, expert_index_TK)


def limit_groups(scores_TE: Tensor, num_groups: int, top_groups: int) -> Tensor:
    """The scores with -inf for experts outside each token's `top_groups` best groups."""
    scores_TGe = scores_TE.view(len(scores_TE), num_groups, -1)
    best_TG = torch.topk(scores_TGe.amax(dim=-1), top_groups, dim=-1).indices
    closed_TG = torch.ones_like(scores_TGe[..., 0], dtype=torch.bool).scatter(-1, best_TG, False)
    return scores_TGe.masked_fill(closed_TG[..., None], float("-inf")).view_as(scores_TE)


def router_stats(
    logits_TE: Tensor, expert_index_TK: Tensor, groups: TokenGroups, sequence_stats: bool
) -> RouterStats:
    """The sums of one layer from which `balance.balance_loss` makes its terms."""
    num_experts = logits_TE.shape[1]
    modalities = torch.arange(len(MODALITIES), device=logits_TE.device)
    member_MT = (groups.modality_T == modalities[:, None]).to(logits_TE.dtype)
    lse_T = logits_TE.logsumexp(dim=-1)
    probabilities_TE = (logits_TE - lse_T[:, None]).exp()
    # Matrices all the way: a vector would be squeezed in place, which selective recomputation forbids.
    z_sum = (member_MT @ lse_T.square()[:, None]).sum()
    sequence_sum = z_sum.new_zeros(())
    if sequence_stats:
        sequence_sum = _sequence_sum(probabilities_TE, expert_index_TK, groups)
    counts_ME = count_by_modality(expert_index_TK, groups.modality_T, num_experts)
    return RouterStats(member_MT @ probabilities_TE, z_sum, sequence_sum, counts_ME)


def _sequence_sum(probabilities_TE: Tensor, expert_index_TK: Tensor, groups: TokenGroups) -> Tensor:
    """`sum_s T_s * (E / (k T_s^2) * sum_i P_si n_si)`: DeepSeek-V3's sequence-wise loss, by its tokens.

    DeepSeek-AI 2024, arXiv:2412.19437, 2.1.2, where every sequence has the same length.
    """
    num_experts, top_k = probabilities_TE.shape[1], expert_index_TK.shape[1]
    rows = groups.num_samples + 1
    mass_SE = probabilities_TE.new_zeros(rows, num_experts).index_add(0, groups.sample_T, probabilities_TE)
    bins_TK = groups.sample_T[:, None] * num_experts + expert_index_TK
    counts_SE = count(bins_TK, rows * num_experts).view(rows, num_experts).to(mass_SE.dtype)
    tokens_S1 = (counts_SE.sum(1, keepdim=True) / top_k).clamp_min(1)
    aux_SE = num_experts / top_k * mass_SE * counts_SE / tokens_S1
    return aux_SE[: groups.num_samples].sum()


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
