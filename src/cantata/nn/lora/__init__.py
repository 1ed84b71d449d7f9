"""Low-rank adapters (Hu et al., 2021, arXiv:2106.09685) of linear layers, embeddings, heads and experts."""

from cantata.nn.lora.adapt import MAGNITUDE, adapt, fill_factor, is_adaptable, is_factor
from cantata.nn.lora.blockwise import Packing, packed_bytes, require_library
from cantata.nn.lora.experts import LoRAExperts
from cantata.nn.lora.linear import LoRALinear, dora_magnitude, magnitude_change, row_norms
from cantata.nn.lora.merge import dora_weight, embedding_delta, experts_delta, linear_delta
from cantata.nn.lora.packed import PackedWeight
from cantata.nn.lora.settings import LoRASettings
from cantata.nn.lora.vocabulary import LoRAEmbedding, LoRAHead

__all__ = [
    "MAGNITUDE",
    "LoRAEmbedding",
    "LoRAExperts",
    "LoRAHead",
    "LoRALinear",
    "LoRASettings",
    "PackedWeight",
    "Packing",
    "adapt",
    "dora_magnitude",
    "dora_weight",
    "embedding_delta",
    "experts_delta",
    "fill_factor",
    "is_adaptable",
    "is_factor",
    "linear_delta",
    "magnitude_change",
    "packed_bytes",
    "require_library",
    "row_norms",
]
