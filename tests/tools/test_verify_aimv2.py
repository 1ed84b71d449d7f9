"""What AIMv2 is compared on: images of several shapes, and folders that transformers cannot read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cantata.core.errors import CantataError
from cantata.models.aimv2.apple import save_as_apple
from cantata.models.hub import save_to_hub
from cantata.tools.compared import GRADIENT
from cantata.tools.verify_aimv2 import compare_aimv2, packed_images, random_images
from tests.models.aimv2.small import NATIVE, VISION, contrastive, encoder, images_of


def test_squares_are_squares_and_native_images_have_shapes_of_their_own() -> None:
    assert [tuple(image.shape) for image in random_images(VISION)] == [(3, 16, 16)] * 3
    shapes = [tuple(image.shape) for image in random_images(NATIVE)]
    assert shapes == [(3, 32, 16), (3, 8, 32), (3, 4, 4)]
    tiny = random_images(replace(NATIVE, image_size=4))
    assert [tuple(image.shape) for image in tiny] == [(3, 4, 4)] * 3


def test_they_are_packed_patch_by_patch() -> None:
    pixels = random_images(NATIVE)
    found, expected = packed_images(pixels, NATIVE), images_of(pixels, NATIVE)
    assert torch.equal(found.patches_PC, expected.patches_PC)
    assert torch.equal(found.position_ids_P, expected.position_ids_P)
    assert (found.patches, found.features) == (expected.patches, expected.features)


@pytest.mark.parametrize("kind", ["encoder", "head", "pairs"])
def test_what_is_compared(kind: str, tmp_path: Path) -> None:
    """Of a head its feature, and with it every gradient; nothing else."""
    pytest.importorskip("transformers")
    vision = replace(NATIVE, use_head=kind == "head")
    model = contrastive() if kind == "pairs" else encoder(vision)
    save_to_hub(model, model.hub_layout(), tmp_path / "hub", 10**9)
    checks = list(compare_aimv2(tmp_path / "hub"))
    names = [check.name for check in checks if not check.name.startswith(GRADIENT)]
    assert (
        names
        == {
            "encoder": ["features"],
            "head": ["features", "pooled features"],
            "pairs": ["similarities"],
        }[kind]
    )
    compared = {check.name.removeprefix(GRADIENT) for check in checks} - set(names)
    assert compared == {name for name, _ in model.named_parameters()}
    assert [check for check in checks if not check.passed] == []


def test_a_folder_in_apples_words_cannot_be_compared(tmp_path: Path) -> None:
    """transformers would find none of its keys there and compare random values."""
    pytest.importorskip("transformers")
    model = encoder(VISION)
    save_as_apple(model, model.hub_layout(), tmp_path / "apple", 10**9)
    with pytest.raises(CantataError, match="transformers does not find its own keys"):
        list(compare_aimv2(tmp_path / "apple"))
