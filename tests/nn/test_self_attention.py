"""Self-attention of a decoder, against its formula head by head."""

from __future__ import annotations

import pytest
import torch

from cantata.core.types import Segments
from cantata.nn.attention import PackedAttention
from cantata.nn.rope import rotary_tables, rotate
from cantata.nn.self_attention import SelfAttention


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@torch.no_grad()
def test_each_head_reads_its_own_keys(num_kv_heads: int) -> None:
    torch.manual_seed(0)
    layer, samples = SelfAttention(16, 4, num_kv_heads, 6), Segments((3, 5))
    assert [name for name, _ in layer.named_parameters()] == [f"{part}_proj.weight" for part in "qkvo"]
    x_TD = torch.randn(8, 16)
    tables = rotary_tables(torch.tensor([0, 1, 2, 0, 1, 2, 3, 4]), 6, 1e4, torch.float32)
    heads = []
    q, k, v = (proj(x_TD).view(8, -1, 6) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = rotate(q, tables), rotate(k, tables)
    sample_T = samples.ids()
    hidden = (sample_T[:, None] != sample_T) | torch.ones(8, 8, dtype=torch.bool).triu(1)
    for head in range(4):
        group = head // (4 // num_kv_heads)
        scores = (q[:, head] @ k[:, group].T / 6**0.5).masked_fill(hidden, -torch.inf)
        heads.append(scores.softmax(-1) @ v[:, group])
    expected = torch.stack(heads, 1).flatten(1) @ layer.o_proj.weight.T
    found = layer(x_TD, tables, PackedAttention(samples, causal=True))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
