"""Elements in 4 or 8 bits, a scale for each block of them: what `PackedWeight` stores, by bitsandbytes.

M  matrices of a weight: its experts, or 1    B  bytes of one    S  blocks of one
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from enum import Enum
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from cantata.core.errors import ConfigError


class Packing(Enum):
    """What an element of a frozen matrix rests in, beside an fp32 scale for each block of elements."""

    none = "none"
    """The dtype that it computes in."""
    int8 = "int8"
    """8 bits: 255 even steps up to the largest of 256 elements."""
    nf4 = "nf4"
    """4 bits: quantiles of a normal distribution, up to the largest of 64 (arXiv:2305.14314, section 3)."""


BLOCK = {Packing.int8: 256, Packing.nf4: 64}
"""Elements that share a scale."""
_PER_BYTE = {Packing.int8: 1, Packing.nf4: 2}


def require_library() -> None:
    """Raises `ConfigError` where bitsandbytes is not installed."""
    _library()


def matrices(shape: Sequence[int]) -> tuple[int, int]:
    """How many matrices a weight is, and the elements of one."""
    return prod(shape[:-2]), prod(shape[-2:])


def sizes(shape: Sequence[int], packing: Packing) -> tuple[int, int, int]:
    """(M, B, S) of a weight: its last block is filled up."""
    count, elements = matrices(shape)
    blocks = -(-elements // BLOCK[packing])
    return count, blocks * BLOCK[packing] // _PER_BYTE[packing], blocks


def packed_bytes(shape: Sequence[int], packing: Packing) -> int:
    """What a weight of this shape occupies at rest."""
    count, of_codes, blocks = sizes(shape, packing)
    return count * (of_codes + blocks * torch.float32.itemsize)


def pack(flat: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """Codes (uint8) and scales (fp32) of whole blocks, both flat."""
    library, block = _library(), BLOCK[packing]
    if packing is Packing.nf4:
        codes, state = library.quantize_4bit(flat, blocksize=block, quant_type="nf4")
    else:
        codes, state = library.quantize_blockwise(flat, code=_even_steps(flat.device), blocksize=block)
    return codes.view(-1), state.absmax


def unpack(codes: Tensor, scales: Tensor, dtype: torch.dtype, packing: Packing) -> Tensor:
    """The elements of whole blocks, flat."""
    library = _library()
    shape = (codes.numel() * _PER_BYTE[packing],)
    state = library.QuantState(scales, shape=shape, dtype=dtype, blocksize=BLOCK[packing])
    whole: Tensor
    if packing is Packing.nf4:
        state.quant_type = "nf4"
        whole = library.dequantize_4bit(codes[:, None], state)
    else:
        state.code = _even_steps(codes.device)
        whole = library.dequantize_blockwise(codes, state)
    return whole.view(-1)


@cache
def _even_steps(device: torch.device) -> Tensor:
    # One value twice: the library wants 256, and an even number of them would leave zero out.
    return torch.arange(-128, 128, device=device).clamp_(min=-127) / 127


def _library() -> Any:
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ModuleNotFoundError as error:
        if error.name != "bitsandbytes":
            raise
        raise ConfigError(
            "lora.quantize_base needs bitsandbytes: pip install cantata[quantized], or set it to none"
        ) from error
