"""One decoder block: who sees whom, and what it says of its routing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cantata.core.types import IMAGE, PADDING, RouterStats, Segments, TokenGroups
from cantata.models.aria.decoder import DecoderBlock, build_moe_layer
from cantata.nn.attention import PackedAttention
from cantata.nn.rope import rotary_tables
from tests.models.aria.small import small_aria, small_layout
from tests.nn.moe.small import balance

LAYOUT = small_layout()
SAMPLES = Segments((5, 3, 6))
TEXT = LAYOUT.text


def block() -> DecoderBlock:
    layer = small_aria(LAYOUT).text.layers[0]
    assert isinstance(layer, DecoderBlock)
    return layer


def inputs() -> Tensor:
    return torch.randn(SAMPLES.total, TEXT.hidden_size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def run(
    layer: DecoderBlock, x_TD: Tensor, modality_ids_T: Tensor | None = None, start: int = 0
) -> tuple[Tensor, RouterStats]:
    positions_T = torch.cat([torch.arange(length) + start for length in SAMPLES.lengths])
    tables = rotary_tables(positions_T, TEXT.head_dim, TEXT.rope_theta, x_TD.dtype)
    if modality_ids_T is None:
        modality_ids_T = torch.zeros(SAMPLES.total, dtype=torch.int64)
    groups = TokenGroups(modality_ids_T, SAMPLES.ids(), len(SAMPLES.lengths))
    y_TD, stats = layer(x_TD, tables, groups, PackedAttention(SAMPLES, causal=True))
    return y_TD, stats


@pytest.mark.parametrize("changed", range(SAMPLES.total))
def test_a_token_reaches_itself_and_the_later_ones_of_its_sample(changed: int) -> None:
    layer, x_TD = block(), inputs()
    before, _ = run(layer, x_TD)
    x_TD[changed] += 1
    after, _ = run(layer, x_TD)
    sample_T = SAMPLES.ids()
    sees_T = (sample_T == sample_T[changed]) & (torch.arange(SAMPLES.total) >= changed)
    # Another routing of the changed token groups the others' rows anew, which rounds them anew.
    moved_T = (before - after).abs().amax(-1) > 1e-5
    assert torch.equal(moved_T, sees_T)


def test_only_distances_between_positions_matter() -> None:
    layer, x_TD = block(), inputs()
    torch.testing.assert_close(run(layer, x_TD)[0], run(layer, x_TD, start=7)[0], rtol=0, atol=1e-5)


def test_what_the_sublayers_write_to_the_residual_is_all_that_is_added() -> None:
    layer, x_TD = block(), inputs()
    with torch.no_grad():
        for last in (layer.self_attn.o_proj.weight, layer.mlp.experts.fc2):
            last.zero_()
        layer.mlp.shared_experts.down_proj.weight.zero_()
    assert torch.equal(run(layer, x_TD)[0], x_TD)


def test_every_token_but_padding_is_counted_top_k_times_under_its_modality() -> None:
    modality_ids_T = torch.zeros(SAMPLES.total, dtype=torch.int64)
    modality_ids_T[:4], modality_ids_T[-2:] = IMAGE, PADDING
    _, stats = run(block(), inputs(), modality_ids_T)
    assert stats.tokens_per_expert_ME.sum(-1).tolist() == [8 * TEXT.moe.top_k, 4 * TEXT.moe.top_k, 0]


def test_the_balance_bias_is_built_only_where_it_moves() -> None:
    assert build_moe_layer(TEXT).router.expert_bias_E is None
    moving = build_moe_layer(small_layout(moe={"balance": balance(4, bias=0.01)}).text)
    assert moving.router.expert_bias_E is not None
    assert moving.router.expert_bias_E.shape == (TEXT.moe.num_experts,)
