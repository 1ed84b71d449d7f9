"""The decoder that pretraining throws away, and the head that predicts pixels."""

from __future__ import annotations

import torch
from torch import nn

from cantata.models.aimv2.decoder import Decoder, PixelHead
from tests.models.aimv2.small import DECODER


def test_the_connector_leads_from_the_encoders_width() -> None:
    decoder = Decoder(DECODER, 32)
    assert decoder.connector.weight.shape == (24, 32)
    assert decoder.connector.bias is None
    assert decoder.embed_tokens.weight.shape == (DECODER.vocab_size, 24)
    assert len(decoder.layers) == DECODER.num_hidden_layers
    attention = decoder.layers[0].get_submodule("self_attn")
    # Every head has keys and values of its own.
    assert attention.get_parameter("k_proj.weight").shape == attention.get_parameter("q_proj.weight").shape


@torch.no_grad()
def test_a_patch_is_predicted_from_a_normed_place() -> None:
    torch.manual_seed(0)
    head, x_RD = PixelHead(DECODER, 48), torch.randn(5, 24)
    head.norm.weight.normal_()
    normed = nn.functional.rms_norm(x_RD, (24,), head.norm.weight, DECODER.rms_norm_eps)
    expected = normed @ head.output.weight.T + head.output.bias
    torch.testing.assert_close(head(x_RD), expected, rtol=1e-6, atol=1e-6)
