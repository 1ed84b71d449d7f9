"""Compiled blocks equal eager ones.

Bound 1e-5 in fp32, relative to the largest value: compiled kernels fuse and reorder sums.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from cantata.core.types import Segments
from cantata.models.aria.config import AriaMoEConfig, AriaTextConfig
from cantata.models.aria.decoder import DecoderBlock
from cantata.nn.attention import PackedAttention
from cantata.nn.rope import rotary_tables
from cantata.parallel.compile import apply_compile
from cantata.parallel.materialize import RandomInit, materialize
from cantata.parallel.recompute import Recompute, apply_recompute
from tests.distributed.standin import HIDDEN as STAND_IN_HIDDEN
from tests.distributed.standin import build_on_meta
from tests.nn.moe.small import balance, one_sample

TOKENS, HIDDEN, HEAD = 24, 32, 8
MOE = AriaMoEConfig(
    num_experts=4,
    top_k=2,
    num_shared_experts=1,
    expert_intermediate_size=16,
    num_groups=1,
    top_groups=1,
    balance=balance(4, aux=1e-2, z=1e-3, bias=1e-3),
)
CONFIG = AriaTextConfig(
    vocab_size=64,
    hidden_size=HIDDEN,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=HEAD,
    rope_theta=1e4,
    rms_norm_eps=1e-5,
    max_position_embeddings=128,
    tie_word_embeddings=False,
    initializer_range=0.02,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    moe=MOE,
)


def build() -> DecoderBlock:
    generator = torch.Generator().manual_seed(0)
    block = DecoderBlock(CONFIG)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return block


def gradients(block: DecoderBlock) -> list[Tensor]:
    x_TD = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()
    tables = rotary_tables(torch.arange(TOKENS), HEAD, 1e4, torch.float32)
    attend = PackedAttention(Segments((10, 12)), causal=True)
    y_TD, stats = block(x_TD, tables, one_sample(torch.zeros(TOKENS, dtype=torch.int64)), attend)
    (y_TD.square().mean() + stats.mass_ME.square().mean() + stats.z_sum).backward()
    found = [x_TD.grad, *(parameter.grad for parameter in block.parameters())]
    return [gradient for gradient in found if gradient is not None]


@pytest.mark.slow
def test_a_compiled_block_equals_the_eager_one_and_keeps_its_names() -> None:
    eager, compiled = build(), build()
    apply_compile(compiled, "cpu")
    for actual, wanted in zip(gradients(compiled), gradients(eager), strict=True):
        assert (actual - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert [name for name, _ in compiled.named_parameters()] == [name for name, _ in eager.named_parameters()]


def test_recompute_goes_inside_the_compiled_region(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a block without the breaks that CPU attention and experts make."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = []
    for compiled in (False, True):
        model = build_on_meta(blocks=1)
        materialize(model, RandomInit(model, 3), torch.device("cpu"))
        block = model.blocks[0]
        if compiled:
            apply_recompute(block, Recompute.full)
            apply_compile(block, "cpu")
        x_TD = torch.randn(16, STAND_IN_HIDDEN, generator=torch.Generator().manual_seed(0))
        y_TD, stats = block(x_TD)
        (y_TD.square().mean() + stats.z_sum).backward()
        found.append([parameter.grad for parameter in block.parameters()])
    for actual, wanted in zip(*found, strict=True):
        assert (actual - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_equal_blocks_share_their_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    counters = torch._dynamo.utils.counters

    def graphs(blocks: int) -> int:
        torch._dynamo.reset()
        counters.clear()
        for block in [build() for _ in range(blocks)]:
            apply_compile(block, "cpu")
            gradients(block)
        return int(counters["stats"]["unique_graphs"])

    assert graphs(6) == graphs(2)
