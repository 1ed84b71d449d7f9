"""Quantisers of image tokenizers: rows of latents in, codes out; see `base`."""

from cantata.nn.quantize.base import Quantized, Quantizer
from cantata.nn.quantize.ema import EMAVectorQuantizer
from cantata.nn.quantize.fsq import FiniteScalarQuantizer
from cantata.nn.quantize.ibq import IndexBackpropagationQuantizer
from cantata.nn.quantize.lfq import LookupFreeQuantizer
from cantata.nn.quantize.residual import ResidualQuantizer
from cantata.nn.quantize.simvq import SimVQ
from cantata.nn.quantize.vq import VectorQuantizer

__all__ = [
    "EMAVectorQuantizer",
    "FiniteScalarQuantizer",
    "IndexBackpropagationQuantizer",
    "LookupFreeQuantizer",
    "Quantized",
    "Quantizer",
    "ResidualQuantizer",
    "SimVQ",
    "VectorQuantizer",
]
