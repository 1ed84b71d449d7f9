"""The block that encoder and text tower share, against its formula head by head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cantata.core.types import Segments
from cantata.models.aimv2.block import Attention, Block
from cantata.nn.attention import PackedAttention
from cantata.nn.norm import RMSNorm

SEGMENTS = Segments((3, 5))


def random(count: int, width: int = 12) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0))


def slow_attention(layer: Attention, x_TD: Tensor) -> Tensor:
    """Segment by segment, head by head: softmax of the scaled products, without positions."""
    heads = x_TD.shape[1] // layer.head_dim
    rows = []
    for x_SD in x_TD.split(SEGMENTS.lengths):
        q, k, v = (
            (x_SD @ proj.weight.T).chunk(heads, dim=1) for proj in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        read = [(q[h] @ k[h].T / layer.head_dim**0.5).softmax(1) @ v[h] for h in range(heads)]
        rows.append(torch.cat(read, dim=1) @ layer.out_proj.weight.T)
    return torch.cat(rows)


@torch.no_grad()
def test_attention_has_neither_biases_nor_positions() -> None:
    torch.manual_seed(0)
    layer, x_TD = Attention(12, 3), random(8)
    attend = PackedAttention(SEGMENTS, causal=False)
    assert [name for name, _ in layer.named_parameters()] == [
        f"{part}.weight" for part in ("q_proj", "k_proj", "v_proj", "out_proj")
    ]
    torch.testing.assert_close(layer(x_TD, attend), slow_attention(layer, x_TD), rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_block_adds_attention_and_then_a_gated_mlp() -> None:
    torch.manual_seed(0)
    block, x_TD = Block(12, 20, 3, 1e-2), random(8)
    for norm in (block.rms_norm1, block.rms_norm2):
        norm.weight.normal_()

    def normed(norm: RMSNorm, x: Tensor) -> Tensor:
        return norm.weight * x / (x.square().mean(1, keepdim=True) + 1e-2).sqrt()

    y_TD = x_TD + slow_attention(block.attention, normed(block.rms_norm1, x_TD))
    z_TD = normed(block.rms_norm2, y_TD)
    hidden_TF = nn.functional.silu(block.ffn.gate_proj(z_TD)) * block.ffn.up_proj(z_TD)
    expected = y_TD + hidden_TF @ block.ffn.down_proj.weight.T
    found = block(x_TD, PackedAttention(SEGMENTS, causal=False))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_no_token_is_no_output_and_a_gradient_of_zero() -> None:
    """A rank without images runs the tower all the same."""
    block = Block(12, 20, 3, 1e-5)
    found = block(random(0), PackedAttention(Segments(()), causal=False))
    assert found.shape == (0, 12)
    found.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in block.parameters())
