"""Llama's block against its formula, token by token."""

from __future__ import annotations

import torch
from torch import nn

from cantata.core.types import Segments
from cantata.nn.attention import PackedAttention
from cantata.nn.decoder_block import DecoderBlock
from cantata.nn.rope import rotary_tables, rotate

SAMPLES = Segments((2, 4))
POSITIONS = torch.tensor([0, 1, 0, 1, 2, 3])
TABLES = rotary_tables(POSITIONS, 8, 1e4, torch.float32)
X_TD = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))


def block(dropout: float = 0.0) -> DecoderBlock:
    torch.manual_seed(0)
    made = DecoderBlock(24, 40, 4, 2, 8, 1e-2, dropout)
    with torch.no_grad():
        for norm in (made.input_layernorm, made.post_attention_layernorm):
            norm.weight.normal_()
    return made


def run(module: DecoderBlock) -> torch.Tensor:
    found: torch.Tensor = module(X_TD, TABLES, PackedAttention(SAMPLES, causal=True))
    return found


@torch.no_grad()
def test_it_is_its_formula() -> None:
    """A token reads those of its own sample that are not after it; two heads share a key."""
    module = block()
    attention = module.self_attn
    h_TD = nn.functional.rms_norm(X_TD, (24,), module.input_layernorm.weight, 1e-2)
    q, k, v = (proj(h_TD).view(6, -1, 8) for proj in (attention.q_proj, attention.k_proj, attention.v_proj))
    q, k = rotate(q, TABLES), rotate(k, TABLES)
    rows = []
    for token in range(6):
        seen = list(range(0 if token < 2 else 2, token + 1))
        read = []
        for head in range(4):
            scores = torch.stack([(q[token, head] * k[other, head // 2]).sum() for other in seen]) / 8**0.5
            read.append(scores.softmax(0) @ v[seen, head // 2])
        rows.append(torch.cat(read))
    y_TD = X_TD + torch.stack(rows) @ attention.o_proj.weight.T
    z_TD = nn.functional.rms_norm(y_TD, (24,), module.post_attention_layernorm.weight, 1e-2)
    hidden_TF = nn.functional.silu(module.mlp.gate_proj(z_TD)) * module.mlp.up_proj(z_TD)
    expected = y_TD + hidden_TF @ module.mlp.down_proj.weight.T
    torch.testing.assert_close(run(module), expected, rtol=1e-6, atol=1e-6)


def test_dropout_is_before_each_residual_and_in_training_alone() -> None:
    dry, wet = block(), block(0.5)
    assert torch.equal(run(wet.eval()), run(dry.train()))
    seen: list[torch.Tensor] = []
    wet.dropout.register_forward_hook(lambda *given: seen.append(given[2]))
    found = run(wet.train())
    assert len(seen) == 2
    torch.testing.assert_close(found, X_TD + seen[0] + seen[1], rtol=0, atol=1e-6)
    assert all(0.2 < float((added == 0).float().mean()) < 0.8 for added in seen)
