"""Blocks that read images against their formula, and which layers they are."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from cantata.models.mllama.config import EXTRA_EMBEDDINGS
from cantata.models.mllama.decoder import CrossBlock, Decoder
from cantata.nn.decoder_block import DecoderBlock
from tests.models.mllama.small import small_text

X_TD = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
FEATURES_FD = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))


class Everything(NamedTuple):
    """Tokens 3, 1 and 4 attend to every feature; the last of them is no reader."""

    tokens_R: Tensor = torch.tensor([3, 1, 4])
    num_readers: int = 2

    def __call__(self, q_RHh: Tensor, k_FGh: Tensor, v_FGh: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q_RHh.shape[1] // x.shape[1], dim=1) for x in (k_FGh, v_FGh))
        scores = torch.einsum("rhd,fhd->rhf", q_RHh, k) / math.sqrt(q_RHh.shape[2])
        return torch.einsum("rhf,fhd->rhd", scores.softmax(2), v)


class Nothing(NamedTuple):
    """No token attends."""

    tokens_R: Tensor = torch.empty(0, dtype=torch.int64)
    num_readers: int = 0

    def __call__(self, q_RHh: Tensor, k_FGh: Tensor, v_FGh: Tensor) -> Tensor:
        return q_RHh + 0 * (k_FGh.sum() + v_FGh.sum())


def block(gate: float = 0.7) -> CrossBlock:
    torch.manual_seed(0)
    made = CrossBlock(small_text(initial_gate=gate))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name:
                parameter.normal_()
    return made


@torch.no_grad()
def test_it_is_its_formula() -> None:
    """Readers go through both halves, one that only attends through the first, others through neither."""
    module, reading = block(), Everything()
    module.cross_attn_mlp_gate.fill_(-0.4)
    eps = small_text().rms_norm_eps
    expected = X_TD.clone()
    for place, token in enumerate(reading.tokens_R.tolist()):
        x_1D = X_TD[token : token + 1]
        h_1D = nn.functional.rms_norm(x_1D, (32,), module.input_layernorm.weight, eps)
        x_1D = x_1D + math.tanh(0.7) * module.cross_attn(h_1D, FEATURES_FD, reading)
        if place < reading.num_readers:
            h_1D = nn.functional.rms_norm(x_1D, (32,), module.post_attention_layernorm.weight, eps)
            hidden = nn.functional.silu(module.mlp.gate_proj(h_1D)) * module.mlp.up_proj(h_1D)
            x_1D = x_1D + math.tanh(-0.4) * hidden @ module.mlp.down_proj.weight.T
        expected[token] = x_1D
    found = module(X_TD, FEATURES_FD, reading)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(found[[0, 2]], X_TD[[0, 2]])
    assert not torch.equal(found[4], X_TD[4])


def test_closed_gates_change_nothing_and_learn_first() -> None:
    module = block(gate=0.0)
    found = module(X_TD, FEATURES_FD, Everything())
    assert torch.equal(found, X_TD)
    found.square().sum().backward()
    learning = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {"cross_attn_attn_gate", "cross_attn_mlp_gate"}


def test_where_nothing_reads_every_parameter_has_a_gradient_of_zero() -> None:
    """So that ranks with and without images reduce the same."""
    module = block()
    found = module(X_TD, FEATURES_FD[:0], Nothing())
    assert torch.equal(found, X_TD)
    found.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("layers", [(), (1, 3), (0, 1, 2, 3, 4)])
def test_the_layers_that_read_images(layers: tuple[int, ...]) -> None:
    config = small_text(cross_attention_layers=layers)
    decoder = Decoder(config)
    kinds = [CrossBlock if index in layers else DecoderBlock for index in range(5)]
    assert [type(layer) for layer in decoder.layers] == kinds
    # Rows for tokens that can be read and never written: the image's among them.
    assert decoder.embed_tokens.num_embeddings == config.vocab_size + EXTRA_EMBEDDINGS
