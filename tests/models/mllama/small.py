"""Mllamas of a few thousand parameters, and a processor for them."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import torch

from cantata.models.mllama import Masking, Mllama, MllamaProcessor, MllamaTextConfig, MllamaVisionConfig
from cantata.models.mllama.hf import MllamaLayout
from cantata.nn.rope import Llama3Scaling

IMAGE = 64
"""The image token: beyond the vocabulary, as published."""


def small_vision(**changes: Any) -> MllamaVisionConfig:
    """Tiles of 2 x 2 patches, 3 + 2 layers."""
    config = MllamaVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_global_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_channels=3,
        max_num_tiles=4,
        intermediate_layers=(0, 2),
        image_mean=(0.48, 0.46, 0.41),
        image_std=(0.27, 0.26, 0.28),
        layer_norm_eps=1e-5,
        initializer_range=0.2,
    )
    return replace(config, **changes)


def small_text(**changes: Any) -> MllamaTextConfig:
    """Five layers, two of them for images."""
    config = MllamaTextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        cross_attention_layers=(1, 3),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope_theta=1e4,
        rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 32),
        rms_norm_eps=1e-5,
        max_position_embeddings=128,
        initializer_range=0.2,
        initial_gate=0.0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return replace(config, **changes)


def small_layout(vision: MllamaVisionConfig | str | None = "small", **text: Any) -> MllamaLayout:
    tower = small_vision() if isinstance(vision, str) else vision
    return MllamaLayout(tower, small_text(**text), IMAGE)


def small_mllama(
    layout: MllamaLayout, masking: Masking = Masking.meta, seed: int = 0, perturb: bool = True
) -> Mllama:
    """Initialised from the seed; `perturb` moves norms, biases and gates, so that tests see them."""
    model = Mllama(*layout, masking)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            model.init_parameter(name, tensor, generator)
            if perturb and tensor.dim() == 1:
                tensor += (0.5 if "gate" in name else 0.1) * torch.randn(tensor.shape, generator=generator)
    return model


def small_processor(**changes: Any) -> MllamaProcessor:
    """With the package's tokenizer; tiles as `small_vision` has them."""
    given: dict[str, Any] = {
        "tokenizer": "embedded:tokenizer.json",
        "image_size": 8,
        "max_num_tiles": 4,
        "patch_size": 4,
        "image_token": "<|img|>",
        "begin_token": "<|reserved_6|>",
        "header_start": "<|im_start|>",
        "header_end": "<|reserved_7|>",
        "message_end": "<|im_end|>",
        "document_end": "<|endoftext|>",
        "pad_token": "<|pad|>",
        "chat_template": None,
    }
    return MllamaProcessor(**(given | changes))
