"""The native AIMv2 against transformers': features, pooled ones, similarities, and folders both ways.

The text tower is compared with eager attention and an explicit mask of ones: without, theirs sees ahead.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cantata.core.types import Segments
from cantata.models.aimv2 import contrastive_from_hub, encoder_from_hub
from cantata.models.aimv2.config import Aimv2VisionConfig
from cantata.models.hub import load_from_hub, save_to_hub
from tests.models.aimv2.small import NATIVE, VISION, contrastive, encoder, images_of, random_pixels

transformers = pytest.importorskip("transformers")

BOUND = 1e-5
SQUARES = [(16, 16)] * 3
SHAPES = [(8, 20), (12, 4), (40, 16), (4, 4)]
ENCODERS = {
    "fixed": (VISION, SQUARES),
    "fixed, head": (replace(VISION, use_head=True), SQUARES),
    "native": (NATIVE, SHAPES),
    "native, head": (replace(NATIVE, use_head=True), SHAPES),
}
TOWERS = {"fixed": (VISION, SQUARES), "native": (NATIVE, SHAPES[:3])}


def theirs(kind: str, directory: Path) -> Any:
    """transformers' model of a folder; every key must be found."""
    model, report = getattr(transformers, kind).from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    scale = float(expected.detach().abs().max())
    assert float((found - expected).detach().abs().max()) <= BOUND * scale


def texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [[*torch.randint(1, 6000, (n,), generator=generator).tolist(), 0] for n in (4, 9, 1)]


def text_features(model: Any) -> Tensor:
    ids = [torch.tensor(text) for text in texts()]
    segments = Segments(tuple(map(len, ids)))
    positions = torch.cat([torch.arange(len(one)) for one in ids])
    return model.text_features(torch.cat(ids), positions, segments)


def their_pairs(reference: Any, pixels: list[Tensor]) -> Tensor:
    """Similarities times the scale, (images, texts), one image and one text at a time."""
    with torch.no_grad():
        rows = [
            [
                reference(
                    input_ids=torch.tensor([text]),
                    pixel_values=image[None],
                    attention_mask=torch.ones(1, len(text), dtype=torch.int64),
                ).logits_per_image[0, 0]
                for text in texts()
            ]
            for image in pixels
        ]
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("case", ENCODERS)
def test_features_pooled_features_and_gradients(case: str, tmp_path: Path) -> None:
    vision, sizes = ENCODERS[case]
    model = encoder(vision)
    save_to_hub(model, model.hub_layout(), tmp_path / "hub", max_shard_bytes=20_000)
    reference = theirs("Aimv2VisionModel", tmp_path / "hub")
    pixels = random_pixels(*sizes)
    images = images_of(pixels, vision)
    features = model(images)
    outputs = [reference(pixel_values=image[None]) for image in pixels]
    expected = torch.cat([output.last_hidden_state[0] for output in outputs])
    assert_near(features, expected)
    if vision.use_head:
        pooled = torch.cat([output.pooler_output for output in outputs])
        found = model.vision.pooled(images)
        assert_near(found, pooled)
        features, expected = found, pooled
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    (features * weight).sum().backward()
    (expected * weight).sum().backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    layout = model.hub_layout()
    for name, parameter in model.named_parameters():
        wanted = gradients[layout.transformers_name(name)].reshape(parameter.shape)
        error = float((parameter.grad - wanted).abs().max()) / float(wanted.abs().max())
        assert error <= 1e-4, (name, error)


@pytest.mark.parametrize("case", TOWERS)
def test_similarities_of_images_and_texts(case: str, tmp_path: Path) -> None:
    vision, sizes = TOWERS[case]
    model = contrastive(vision)
    save_to_hub(model, model.hub_layout(), tmp_path / "hub", max_shard_bytes=10**9)
    reference = theirs("Aimv2Model", tmp_path / "hub")
    pixels = random_pixels(*sizes)
    with torch.no_grad():
        images = images_of(pixels, model.vision_config)
        found = model.scale() * model.image_features(images) @ text_features(model).t()
    assert_near(found, their_pairs(reference, pixels))


def test_a_wrong_weight_is_noticed(tmp_path: Path) -> None:
    model = contrastive()
    save_to_hub(model, model.hub_layout(), tmp_path / "hub", max_shard_bytes=10**9)
    reference = theirs("Aimv2Model", tmp_path / "hub")
    pixels = random_pixels(*SQUARES)
    with torch.no_grad():
        model.text.rms_norm.weight[2] += 1e-3
        images = images_of(pixels, model.vision_config)
        found = model.scale() * model.image_features(images) @ text_features(model).t()
    with pytest.raises(AssertionError):
        assert_near(found, their_pairs(reference, pixels))


@pytest.mark.parametrize("case", ENCODERS)
def test_their_encoder_here(case: str, tmp_path: Path) -> None:
    vision, sizes = ENCODERS[case]
    model = encoder(vision)
    save_to_hub(model, model.hub_layout(), tmp_path / "ours", max_shard_bytes=10**9)
    reference = theirs("Aimv2VisionModel", tmp_path / "ours")
    found = read_back(reference, tmp_path, encoder_from_hub)
    assert found.vision_config == vision
    pixels = random_pixels(*sizes)
    with torch.no_grad():
        expected = [reference(pixel_values=image[None]).last_hidden_state[0] for image in pixels]
        assert_near(found(images_of(pixels, vision)), torch.cat(expected))


def test_their_contrastive_model_here(tmp_path: Path) -> None:
    model = contrastive()
    save_to_hub(model, model.hub_layout(), tmp_path / "ours", max_shard_bytes=10**9)
    reference = theirs("Aimv2Model", tmp_path / "ours")
    found = read_back(reference, tmp_path, contrastive_from_hub)
    assert found.hub_layout() == model.hub_layout()
    pixels = random_pixels(*SQUARES)
    with torch.no_grad():
        images = images_of(pixels, found.vision_config)
        similar = found.scale() * found.image_features(images) @ text_features(found).t()
    assert_near(similar, their_pairs(reference, pixels))


def read_back(reference: nn.Module, folder: Path, build: Any) -> Any:
    """Their model with other weights, saved by them and read here; nothing lies there but what they read."""
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    reference.save_pretrained(folder / "theirs", max_shard_size="40KB")
    model = build(folder / "theirs")
    load_from_hub(model, model.hub_layout(), folder / "theirs")
    return model


@pytest.mark.parametrize("whole", [False, True])
def test_keys_and_config_are_those_of_save_pretrained(whole: bool, tmp_path: Path) -> None:
    """Loading and saving again with transformers gives the same tensors under the same keys, bit for bit."""
    model = contrastive() if whole else encoder(replace(VISION, use_head=True))
    save_to_hub(model, model.hub_layout(), tmp_path / "ours", max_shard_bytes=10**9)
    theirs("Aimv2Model" if whole else "Aimv2VisionModel", tmp_path / "ours").save_pretrained(
        tmp_path / "theirs"
    )
    ours, again = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[key], again[key]) and ours[key].shape == again[key].shape for key in ours)
    written, config = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs")
    )
    sections = [key for key in written if key.endswith("_config")]
    for section in sections:
        assert written[section].items() <= config[section].items()
    assert {k: v for k, v in written.items() if k not in sections}.items() <= config.items()


def test_sides_that_patches_do_not_divide_are_cropped_there(tmp_path: Path) -> None:
    """Why our processor resizes: transformers leaves out the rest without a word."""
    vision: Aimv2VisionConfig = NATIVE
    model = encoder(vision)
    save_to_hub(model, model.hub_layout(), tmp_path / "hub", max_shard_bytes=10**9)
    reference = theirs("Aimv2VisionModel", tmp_path / "hub")
    [pixels] = random_pixels((11, 22))
    with torch.no_grad():
        found = reference(pixel_values=pixels[None]).last_hidden_state[0]
        assert_near(model(images_of([pixels[:, :8, :20].contiguous()], vision)), found)
