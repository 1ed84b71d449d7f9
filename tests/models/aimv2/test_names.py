"""Three vocabularies of the same weights, into each other."""

from __future__ import annotations

import pytest

from cantata.models.aimv2.names import QKV, from_file, to_apple, to_hub
from tests.models.aimv2.small import contrastive

NAMES = [name for name, _ in contrastive().named_parameters()]

TABLE = {
    "vision.embeddings.patch_embed.bias": (
        "vision_model.embeddings.patch_embed.bias",
        "image_encoder.preprocessor.patchifier.proj.bias",
    ),
    "vision.embeddings.position_embedding.weight": (
        "vision_model.embeddings.position_embedding.weight",
        "image_encoder.preprocessor.pos_embed",
    ),
    "text.embeddings.position_embedding.weight": (
        "text_model.embeddings.position_embedding.weight",
        "text_encoder.preprocessor.positional_embedding",
    ),
    "vision.layers.1.rms_norm2.weight": (
        "vision_model.encoder.layers.1.rms_norm2.weight",
        "image_encoder.trunk.blocks.1.norm_2.weight",
    ),
    "text.rms_norm.weight": ("text_model.rms_norm.weight", "text_encoder.trunk.post_trunk_norm.weight"),
    "text.layers.0.ffn.up_proj.weight": (
        "text_model.encoder.layers.0.ffn.up_proj.weight",
        "text_encoder.trunk.blocks.0.mlp.fc3.weight",
    ),
    "vision.head.output_proj.bias": ("vision_model.head.output_proj.bias", "image_encoder.head.linear.bias"),
    "visual_projection.weight": ("visual_projection.weight", "image_projector.weight"),
    "logit_scale": ("logit_scale", "log_logit_scale"),
}
"""Native, transformers', Apple's."""


@pytest.mark.parametrize("native", TABLE)
def test_the_published_words(native: str) -> None:
    hub, apple = TABLE[native]
    assert native in NAMES
    assert (to_hub(native), to_apple(hub)) == (hub, apple)


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_every_key_comes_back_from_either_vocabulary(prefix: str) -> None:
    """Of an encoder alone too, whose keys have no first word."""
    keys = [to_hub(name) for name in NAMES]
    keys = [key.removeprefix("vision_model.") for key in keys if key.startswith("vision_model.") or prefix]
    for key in keys:
        assert from_file(key) == key
        if not any(part in key for part in QKV) or ".head." in key or key.startswith("head."):
            assert from_file(to_apple(key)) == key


def test_what_apple_stacks_is_three() -> None:
    stacked = to_apple("text_model.encoder.layers.3.attention.qkv.weight")
    assert stacked == "text_encoder.trunk.blocks.3.attn.qkv.weight"
    assert from_file(stacked) == tuple(f"text_model.encoder.layers.3.attention.{part}.weight" for part in QKV)


@pytest.mark.parametrize("name", ["decoder.embed_tokens.weight", "logit_scale.weight", "my.vision.weight"])
def test_names_of_nothing_published(name: str) -> None:
    with pytest.raises(KeyError, match=name):
        to_hub(name)
