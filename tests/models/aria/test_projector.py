"""Which patches make which features, and how many."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cantata.core.types import Segments
from cantata.models.aria.projector import Projector
from tests.models.aria.small import small_aria, small_layout

LAYOUT = small_layout()
PATCHES, FEATURES = Segments((3, 12, 4)), Segments((2, 5, 2))


def projector() -> Projector:
    return small_aria(LAYOUT).projector


def patches() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(PATCHES.total, LAYOUT.vision.hidden_size, generator=generator)


@pytest.mark.parametrize("image", range(3))
def test_an_image_is_projected_as_if_it_were_alone(image: int) -> None:
    module, x_PD = projector(), patches()
    together = module(x_PD, PATCHES, FEATURES)
    assert together.shape == (FEATURES.total, LAYOUT.text.hidden_size)
    own_PD = x_PD[PATCHES.ids() == image]
    alone = module(own_PD, Segments((len(own_PD),)), Segments((FEATURES.lengths[image],)))
    torch.testing.assert_close(together[FEATURES.ids() == image], alone, rtol=0, atol=1e-6)


def test_fewer_features_are_the_first_ones() -> None:
    """Each query reads the image by itself, and a smaller image takes the first of them."""
    module, x_PD = projector(), patches()[:4]
    few, many = (module(x_PD, Segments((4,)), Segments((count,))) for count in (2, 5))
    torch.testing.assert_close(few, many[:2], rtol=0, atol=1e-6)
    assert not torch.allclose(many[0], many[1])


def test_patches_are_a_set() -> None:
    """Positions entered with the vision tower; the projector knows no order."""
    module, x_PD = projector(), patches()[:12]
    shape = Segments((12,)), Segments((5,))
    torch.testing.assert_close(module(x_PD.flip(0), *shape), module(x_PD, *shape), rtol=0, atol=1e-6)


def test_unequal_numbers_of_images_are_refused() -> None:
    with pytest.raises(ValueError, match="2 query segments but 3 key segments"):
        projector()(patches(), PATCHES, Segments((2, 5)))
