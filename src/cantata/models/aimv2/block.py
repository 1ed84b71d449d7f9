"""The transformer block that AIMv2's image encoder and text tower share."""

from __future__ import annotations

from torch import Tensor, nn

from cantata.nn.attention import Attend
from cantata.nn.matmul import Linear
from cantata.nn.mlp import SwiGLU
from cantata.nn.norm import RMSNorm


class Attention(nn.Module):
    """Multi-head attention without biases and without positions of its own."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.head_dim = hidden_size // num_heads
        self.q_proj = Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = Linear(hidden_size, hidden_size, bias=False)
        self.out_proj = Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x_TD: Tensor, attend: Attend) -> Tensor:
        # Counted, not -1: there may be no token.
        heads = (len(x_TD), x_TD.shape[1] // self.head_dim, self.head_dim)
        q, k, v = (proj(x_TD).view(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(q, k, v).flatten(-2))


class Block(nn.Module):
    """Attention, then a gated MLP, each behind an RMSNorm and with a residual."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.rms_norm1 = RMSNorm(hidden_size, eps)
        self.attention = Attention(hidden_size, num_heads)
        self.rms_norm2 = RMSNorm(hidden_size, eps)
        self.ffn = SwiGLU(hidden_size, intermediate_size)

    def forward(self, x_TD: Tensor, attend: Attend) -> Tensor:
        x_TD = x_TD + self.attention(self.rms_norm1(x_TD), attend)
        y_TD: Tensor = self.ffn(self.rms_norm2(x_TD))
        return x_TD + y_TD
