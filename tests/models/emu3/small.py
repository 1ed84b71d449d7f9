"""Emu3s of a few thousand parameters, their processor, and batches for them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from cantata.core.samples import Codes, Document, Sample
from cantata.core.types import Batch
from cantata.data.collate import PackedCollator
from cantata.models.emu3 import Emu3, Emu3Processor, Emu3TextConfig, Emu3Tokens

TOKENS = Emu3Tokens(
    bos=6144,
    eos=6145,
    pad=1,
    boi=6146,
    img=6147,
    eol=6148,
    eof=6149,
    eoi=6150,
    visual_offset=6160,
    codebook_size=16,
)


def small_config(**changes: Any) -> Emu3TextConfig:
    config = Emu3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope_theta=1e4,
        rms_norm_eps=1e-5,
        dropout=0.1,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return replace(config, **changes)


def small_emu3(config: Emu3TextConfig, seed: int = 0, perturb: bool = True) -> Emu3:
    """In evaluation mode, initialised from the seed; `perturb` moves norms off 1, so that tests see them."""
    model = Emu3(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            model.init_parameter(name, tensor, generator)
            if perturb and tensor.dim() == 1:
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    return model


def small_processor(**changes: Any) -> Emu3Processor:
    given: dict[str, Any] = {
        "tokenizer": "embedded:tokenizer.json",
        "tokens": TOKENS,
        "text_weight": 1.0,
        "vision_weight": 0.5,
        "chat_template": None,
    }
    return Emu3Processor(**(given | changes))


def reading_config(**changes: Any) -> Emu3TextConfig:
    """Of a model that reads what `small_processor` makes."""
    ids = {"bos_token_id": TOKENS.bos, "eos_token_id": TOKENS.eos, "pad_token_id": TOKENS.pad}
    return small_config(**({"vocab_size": TOKENS.size} | ids | changes))


def grid(frames: int, rows: int, columns: int, seed: int = 0) -> Codes:
    generator = np.random.default_rng(seed)
    return Codes(generator.integers(0, TOKENS.codebook_size, (frames, rows, columns)))


def samples(processor: Emu3Processor) -> list[Sample]:
    """Text alone, text and image in both orders, a clip; of different lengths."""
    documents = (
        ("Is't possible?",),
        ("a red circle", grid(1, 3, 4)),
        (grid(1, 2, 2, 1), " a cat"),
        ("waves", grid(2, 2, 3, 2)),
    )
    return [processor.encode(Document(parts), f"s:{i}") for i, parts in enumerate(documents)]


def batch_of(processor: Emu3Processor, given: Sequence[Sample], padding: int = 0) -> Batch:
    collator = PackedCollator(processor)
    row = collator.row(given)
    return collator.collate([row], sum(row.lengths) + padding)
