"""Apple's own folders: files in their published layout are read, and written again key by key."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cantata.core.errors import ConfigError
from cantata.models.aimv2 import contrastive_from_hub, encoder_from_hub
from cantata.models.aimv2.apple import save_as_apple
from cantata.models.hub import load_from_hub
from tests.models.aimv2.small import NATIVE, TEXT, VISION, contrastive, encoder

FLAT = {
    "architectures": ["AIMv2Model"],
    "model_type": "aimv2",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_channels": 3,
    "image_size": 16,
    "patch_size": 4,
    "rms_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "projection_dropout": 0.0,
    "qkv_bias": False,
    "use_bias": False,
}
"""An image encoder's `config.json` as Apple publishes it, in small."""


def published_blocks(prefix: str, size: int, width: int, count: int = 2) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}trunk.post_trunk_norm.weight": (size,)}
    for i in range(count):
        block = f"{prefix}trunk.blocks.{i}"
        shapes |= {
            f"{block}.attn.qkv.weight": (3 * size, size),
            f"{block}.attn.proj.weight": (size, size),
            f"{block}.norm_1.weight": (size,),
            f"{block}.norm_2.weight": (size,),
            f"{block}.mlp.fc1.weight": (width, size),
            f"{block}.mlp.fc2.weight": (size, width),
            f"{block}.mlp.fc3.weight": (width, size),
        }
    return shapes


def published_encoder(prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}preprocessor.patchifier.proj.weight": (32, 3, 4, 4),
        f"{prefix}preprocessor.patchifier.proj.bias": (32,),
        f"{prefix}preprocessor.patchifier.norm.weight": (32,),
        f"{prefix}preprocessor.pos_embed": (1, 16, 32),
        **published_blocks(prefix, 32, 48),
    }


def published_whole() -> dict[str, tuple[int, ...]]:
    return {
        **published_encoder("image_encoder."),
        "image_encoder.head.cls_token": (1, 1, 32),
        "image_encoder.head.k.weight": (32, 32),
        "image_encoder.head.v.weight": (32, 32),
        "image_encoder.head.linear.weight": (32, 32),
        "image_encoder.head.linear.bias": (32,),
        "text_encoder.preprocessor.text_embedding.weight": (6144, 24),
        "text_encoder.preprocessor.positional_embedding": (20, 24),
        **published_blocks("text_encoder.", 24, 40),
        "image_projector.weight": (12, 32),
        "text_projector.weight": (12, 24),
        "log_logit_scale": (),
    }


def folder(path: Path, shapes: dict[str, tuple[int, ...]], config: dict[str, object]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return tensors


def test_an_encoder_is_read_and_written(tmp_path: Path) -> None:
    tensors = folder(tmp_path / "theirs", published_encoder(), FLAT)
    model = encoder_from_hub(tmp_path / "theirs")
    assert model.vision_config == replace(VISION, initializer_range=0.02)
    load_from_hub(model, model.hub_layout(), tmp_path / "theirs")
    block = model.vision.layers[1]
    qkv = tensors["trunk.blocks.1.attn.qkv.weight"]
    for place, part in enumerate((block.attention.q_proj, block.attention.k_proj, block.attention.v_proj)):
        assert torch.equal(part.weight, qkv[32 * place : 32 * (place + 1)])
    # Apple's MLP is fc2(silu(fc1(x)) * fc3(x)).
    assert torch.equal(block.ffn.gate_proj.weight, tensors["trunk.blocks.1.mlp.fc1.weight"])
    assert torch.equal(block.ffn.up_proj.weight, tensors["trunk.blocks.1.mlp.fc3.weight"])
    assert torch.equal(block.ffn.down_proj.weight, tensors["trunk.blocks.1.mlp.fc2.weight"])
    save_as_apple(model, model.hub_layout(), tmp_path / "ours", 10**9)
    assert_same(load_file(tmp_path / "ours" / "model.safetensors"), tensors)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert FLAT.items() <= written.items()


def test_a_contrastive_model_is_read_and_written(tmp_path: Path) -> None:
    text = {key: value for key, value in vars(TEXT).items() if key != "initializer_range"}
    vision = {key: value for key, value in FLAT.items() if key not in ("architectures", "model_type")}
    config = {"model_type": "aimv2", "projection_dim": 12, "max_logit_scale": 100.0}
    sections = {"vision_config": vision, "text_config": text}
    tensors = folder(tmp_path / "theirs", published_whole(), config | sections)
    model = contrastive_from_hub(tmp_path / "theirs")
    load_from_hub(model, model.hub_layout(), tmp_path / "theirs")
    assert torch.equal(model.logit_scale[0], tensors["log_logit_scale"])
    assert torch.equal(model.vision.head.cls_token, tensors["image_encoder.head.cls_token"].flatten())
    save_as_apple(model, model.hub_layout(), tmp_path / "ours", 10**9)
    assert_same(load_file(tmp_path / "ours" / "model.safetensors"), tensors)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].shape == tensor.shape, key
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("kind", ["fixed", "native", "contrastive"])
def test_there_and_back(kind: str, tmp_path: Path) -> None:
    builders = {"fixed": lambda seed: encoder(VISION, seed), "native": lambda seed: encoder(NATIVE, seed)}
    build = builders.get(kind, lambda seed: contrastive(seed=seed))
    model, other = build(0), build(1)
    save_as_apple(model, model.hub_layout(), tmp_path / "apple", 20_000)
    read = contrastive_from_hub if kind == "contrastive" else encoder_from_hub
    assert read(tmp_path / "apple").hub_layout() == model.hub_layout()
    load_from_hub(other, other.hub_layout(), tmp_path / "apple")
    for (name, expected), found in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(found, expected), name


@pytest.mark.parametrize(
    ("key", "shape", "problem"),
    [
        ("trunk.blocks.0.attn.qkv.weight", (95, 32), "misshapen"),
        ("trunk.blocks.0.attn.qkv.weight", (64, 32), "misshapen"),
        ("trunk.blocks.0.mlp.fc3.weight", None, "1 missing: encoder.layers.0.ffn.up_proj.weight"),
        ("trunk.blocks.2.norm_1.weight", (32,), "1 unexpected: encoder.layers.2.rms_norm1.weight"),
    ],
)
def test_what_does_not_fit_is_named(
    key: str, shape: tuple[int, ...] | None, problem: str, tmp_path: Path
) -> None:
    shapes = published_encoder()
    if shape is None:
        del shapes[key]
    else:
        shapes[key] = shape
    folder(tmp_path / "theirs", shapes, FLAT)
    model = encoder_from_hub(tmp_path / "theirs")
    with pytest.raises(ConfigError, match=problem):
        load_from_hub(model, model.hub_layout(), tmp_path / "theirs")
