"""Tokenizers of Emu3's kind with few parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cantata.models.emu3.vqvae import Emu3VQVAE, Emu3VQVAEConfig
from cantata.nn.quantize.vq import VectorQuantizer
from tests.models.autoencoder.small import filled, pixels


def small_shape(**changes: Any) -> Emu3VQVAEConfig:
    settings: dict[str, Any] = {
        "base_channels": 32,
        "channel_multipliers": (1, 2),
        "num_res_blocks": 1,
        "attention_levels": (1,),
        "z_channels": 4,
        "temporal_factor": 4,
    }
    return Emu3VQVAEConfig(**settings | changes)


def small_vqvae(shape: Emu3VQVAEConfig, seed: int = 0) -> Emu3VQVAE:
    """In evaluation, with pixels of the usual range and codes that lie where latents do."""
    quantizer = VectorQuantizer(64, shape.z_channels, 0.25, False, "straight_through")
    model = filled(Emu3VQVAE(shape, quantizer), seed)
    assert isinstance(model, Emu3VQVAE)
    seen: list[Tensor] = []
    hook = quantizer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 3:
                parameter.mul_(2.0)
        model.last_layer.get_parameter("weight").mul_(0.15)
        model.eval()(pixels(4, 1, 3, 4 * shape.factor, 4 * shape.factor, seed=seed))
        spread, mean = torch.std_mean(seen[0], dim=0)
        quantizer.codebook_KD.copy_(torch.randn(64, 4, generator=torch.Generator().manual_seed(seed)))
        quantizer.codebook_KD.mul_(spread).add_(mean)
    hook.remove()
    return model
