"""Causal self-attention of a language model's decoder."""

from __future__ import annotations

from torch import Tensor, nn

from cantata.nn.attention import Attend
from cantata.nn.matmul import Linear
from cantata.nn.rope import RotaryTables, rotate


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions, without biases, as in Llama.

    hidden_size: width of the tokens.
    num_heads, num_kv_heads: heads of queries, and of keys and values; the second divides the first.
    head_dim: width of a head.
    """

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
        self.q_proj = Linear(hidden_size, q_size, bias=False)
        self.k_proj = Linear(hidden_size, kv_size, bias=False)
        self.v_proj = Linear(hidden_size, kv_size, bias=False)
        self.o_proj = Linear(q_size, hidden_size, bias=False)

    def forward(self, x_TD: Tensor, tables: RotaryTables, attend: Attend) -> Tensor:
        """What the tokens read, (T, D); `attend` says which of them see which."""
        heads = (len(x_TD), -1, self.head_dim)
        q, k, v = (proj(x_TD).view(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(attend(rotate(q, tables), rotate(k, tables), v).flatten(-2))
