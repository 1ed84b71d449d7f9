"""Aria's decoder: Llama's blocks with a mixture of experts in each."""

from __future__ import annotations

from torch import Tensor, nn

from cantata.core.types import RouterStats, TokenGroups
from cantata.models.aria.config import AriaTextConfig
from cantata.nn.attention import Attend
from cantata.nn.mlp import SwiGLU
from cantata.nn.moe.experts import Experts
from cantata.nn.moe.layer import MoELayer
from cantata.nn.moe.router import TopKRouter
from cantata.nn.norm import RMSNorm
from cantata.nn.rope import RotaryTables
from cantata.nn.self_attention import SelfAttention


class DecoderBlock(nn.Module):
    """Attention, then the MoE layer, each behind an RMSNorm and with a residual."""

    def __init__(self, config: AriaTextConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(
            config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = build_moe_layer(config)

    def forward(
        self, x_TD: Tensor, tables: RotaryTables, groups: TokenGroups | None, attend: Attend
    ) -> tuple[Tensor, RouterStats | None]:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), tables, attend)
        y_TD, stats = self.mlp(self.post_attention_layernorm(x_TD), groups)
        return x_TD + y_TD, stats


def build_moe_layer(config: AriaTextConfig) -> MoELayer:
    moe, size = config.moe, config.hidden_size
    router = TopKRouter(
        size,
        moe.num_experts,
        moe.top_k,
        num_groups=moe.num_groups,
        top_groups=moe.top_groups,
        use_expert_bias=moe.balance.bias_update_rate > 0,
        sequence_stats=moe.balance.sequence_aux_loss_coef > 0,
    )
    experts = Experts(moe.num_experts, size, moe.expert_intermediate_size)
    shared = SwiGLU(size, moe.num_shared_experts * moe.expert_intermediate_size)
    return MoELayer(router, experts, shared)
