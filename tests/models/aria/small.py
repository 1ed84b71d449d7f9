"""Arias of a few thousand parameters, and batches for them."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import torch

from cantata.models.aria import Aria, AriaMoEConfig, AriaProjectorConfig, AriaTextConfig, AriaVisionConfig
from cantata.models.aria.hf import AriaLayout
from tests.nn.moe.small import balance


def small_layout(moe: dict[str, Any] | None = None, **text: Any) -> AriaLayout:
    """Two projector entries (squares of 2 and of 4 patches), 2 + 2 layers; overrides for text and moe."""
    experts = AriaMoEConfig(
        num_experts=4,
        top_k=2,
        num_shared_experts=2,
        expert_intermediate_size=24,
        num_groups=1,
        top_groups=1,
        balance=balance(4),
    )
    decoder = AriaTextConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        moe=replace(experts, **(moe or {})),
    )
    vision = AriaVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=2,
        num_channels=3,
        layer_norm_eps=1e-6,
        initializer_range=0.2,
    )
    projector = AriaProjectorConfig(patch_to_query={4: 2, 16: 5}, initializer_range=0.2)
    return AriaLayout(vision, projector, replace(decoder, **text), image_token_id=9)


def small_aria(layout: AriaLayout, seed: int = 0, perturb: bool = True) -> Aria:
    """Initialised from the seed; `perturb` moves norms and biases off 1 and 0, so that tests see them."""
    model = Aria(*layout)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            model.init_parameter(name, tensor, generator)
            if perturb and tensor.dim() == 1 and not name.endswith("expert_bias_E"):
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    return model
