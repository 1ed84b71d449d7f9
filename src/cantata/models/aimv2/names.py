"""What AIMv2's weights are called: here, in transformers, and by Apple.

Apple stacks q, k and v of an attention in one tensor. The other tensors differ by name, and some by leading
dimensions of 1.
"""

from __future__ import annotations

import re

_TO_HUB = (
    (r"^vision\.layers\.", "vision_model.encoder.layers."),
    (r"^vision\.", "vision_model."),
    (r"^text\.layers\.", "text_model.encoder.layers."),
    (r"^text\.", "text_model."),
    (r"^(visual_projection|text_projection)\.", r"\1."),
    (r"^logit_scale$", "logit_scale"),
)
"""Native name to the key of transformers' `Aimv2Model`; an image encoder alone has no `vision_model.`."""

_TO_APPLE = (
    (r"^vision_model\.", "image_encoder."),
    (r"^text_model\.", "text_encoder."),
    (r"^visual_projection\.", "image_projector."),
    (r"^text_projection\.", "text_projector."),
    (r"^logit_scale$", "log_logit_scale"),
    (r"embeddings\.patch_embed\.", "preprocessor.patchifier.proj."),
    (r"embeddings\.rms_norm\.", "preprocessor.patchifier.norm."),
    (r"embeddings\.token_embedding\.", "preprocessor.text_embedding."),
    (r"^(text_encoder\.)embeddings\.position_embedding\.weight$", r"\1preprocessor.positional_embedding"),
    (r"embeddings\.position_embedding\.weight$", "preprocessor.pos_embed"),
    (r"encoder\.layers\.", "trunk.blocks."),
    (r"\.attention\.qkv\.", ".attn.qkv."),
    (r"\.attention\.out_proj\.", ".attn.proj."),
    (r"\.ffn\.gate_proj\.", ".mlp.fc1."),
    (r"\.ffn\.down_proj\.", ".mlp.fc2."),
    (r"\.ffn\.up_proj\.", ".mlp.fc3."),
    (r"\.rms_norm([12])\.", r".norm_\1."),
    (r"^((?:image_encoder|text_encoder)\.)?rms_norm\.", r"\1trunk.post_trunk_norm."),
    (r"head\.k_proj\.", "head.k."),
    (r"head\.v_proj\.", "head.v."),
    (r"head\.output_proj\.", "head.linear."),
)
"""Key of transformers to Apple's, each pattern in turn."""

_FROM_APPLE = (
    (r"^image_encoder\.", "vision_model."),
    (r"^text_encoder\.", "text_model."),
    (r"^image_projector\.", "visual_projection."),
    (r"^text_projector\.", "text_projection."),
    (r"^log_logit_scale$", "logit_scale"),
    (r"preprocessor\.patchifier\.proj\.", "embeddings.patch_embed."),
    (r"preprocessor\.patchifier\.norm\.", "embeddings.rms_norm."),
    (r"preprocessor\.text_embedding\.", "embeddings.token_embedding."),
    (r"preprocessor\.(pos_embed|positional_embedding)$", "embeddings.position_embedding.weight"),
    (r"trunk\.blocks\.", "encoder.layers."),
    (r"\.attn\.qkv\.", ".attention.qkv."),
    (r"\.attn\.proj\.", ".attention.out_proj."),
    (r"\.mlp\.fc1\.", ".ffn.gate_proj."),
    (r"\.mlp\.fc2\.", ".ffn.down_proj."),
    (r"\.mlp\.fc3\.", ".ffn.up_proj."),
    (r"\.norm_([12])\.", r".rms_norm\1."),
    (r"trunk\.post_trunk_norm\.", "rms_norm."),
    (r"head\.k\.", "head.k_proj."),
    (r"head\.v\.", "head.v_proj."),
    (r"head\.linear\.", "head.output_proj."),
)
"""Apple's key to transformers', each pattern in turn; one of transformers' stays as it is."""

QKV = ("q_proj", "k_proj", "v_proj")
STACKED = ".attention.qkv."


def to_hub(name: str) -> str:
    """transformers' key of a native parameter; `KeyError` for a name that AIMv2 does not have."""
    for pattern, key in _TO_HUB:
        hub, matches = re.subn(pattern, key, name)
        if matches:
            return hub
    raise KeyError(name)


def to_apple(hub: str) -> str:
    """Apple's key of transformers'; of a stacked tensor that of `...attention.qkv...`."""
    return _replaced(hub, _TO_APPLE)


def from_file(stored: str) -> str | tuple[str, ...]:
    """transformers' key of one in a file, Apple's or theirs; three for what Apple stacks."""
    hub = _replaced(stored, _FROM_APPLE)
    if STACKED in hub:
        return tuple(hub.replace(".qkv.", f".{part}.") for part in QKV)
    return hub


def _replaced(key: str, patterns: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in patterns:
        key = re.sub(pattern, replacement, key)
    return key
