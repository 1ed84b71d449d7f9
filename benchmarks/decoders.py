"""The decoder that several benchmarks train: ours, and transformers' with the same weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from transformers import AriaTextConfig as PeerConfig
from transformers import AriaTextForCausalLM

from cantata.models.aria import Aria, AriaMoEConfig, AriaProjectorConfig, AriaTextConfig, AriaVisionConfig
from cantata.nn.moe.balance import BalanceConfig
from cantata.parallel.materialize import RandomInit, materialize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Shape(NamedTuple):
    """Sizes of a decoder."""

    hidden_size: int
    num_hidden_layers: int
    num_heads: int
    num_experts: int
    top_k: int
    num_shared_experts: int
    expert_size: int
    vocab_size: int

    @property
    def unbalanced(self) -> BalanceConfig:
        """No balance term: the peer has none either."""
        return BalanceConfig(0.0, self.num_experts, {}, 0.0, 0.0, 0.0)


def our_decoder(shape: Shape, balance: BalanceConfig) -> Aria:
    """The decoder in Aria, on the meta device; its tower is one narrow layer that sees no patches."""
    moe = AriaMoEConfig(
        shape.num_experts, shape.top_k, shape.num_shared_experts, shape.expert_size, 1, 1, balance
    )
    text = AriaTextConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        head_dim=shape.hidden_size // shape.num_heads,
        rope_theta=1e5,
        rms_norm_eps=1e-6,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.02,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        moe=moe,
    )
    vision = AriaVisionConfig(16, 16, 1, 1, 28, 14, 3, 1e-6, 0.02)
    with torch.device("meta"):
        return Aria(vision, AriaProjectorConfig({4: 1}, 0.02), text, image_token_id=9)


def filled(model: Aria) -> Aria:
    """With random values, in bf16."""
    materialize(model, RandomInit(model, seed=0), DEVICE)
    return model.to(torch.bfloat16).train()


def peer_decoder(shape: Shape, ours: Aria) -> nn.Module:
    """transformers' decoder with our weights."""
    config = PeerConfig(
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        intermediate_size=shape.expert_size,
        moe_num_experts=shape.num_experts,
        moe_topk=shape.top_k,
        moe_num_shared_experts=shape.num_shared_experts,
        vocab_size=shape.vocab_size,
        pad_token_id=0,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        use_cache=False,
    )
    model = AriaTextForCausalLM._from_config(
        config, attn_implementation="sdpa", experts_implementation="grouped_mm", dtype=torch.bfloat16
    )
    assert model.config._experts_implementation == "grouped_mm"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(ours.get_parameter(_our_name(name)))
    return model.to(DEVICE).train()


def _our_name(peer: str) -> str:
    name = peer.replace("lm_head.weight", "head.weight").replace("model.norm.", "head.norm.")
    name = name.replace("model.", "text.", 1) if name.startswith("model.") else name
    return name.replace(".experts.gate_up_proj", ".experts.fc1").replace(".experts.down_proj", ".experts.fc2")
