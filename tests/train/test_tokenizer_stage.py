"""What only the tokenizer's stage builds: loaders of pixels, and the objective with its networks."""

from __future__ import annotations

from typing import Any

import pytest

from cantata.core.config import compose, load
from cantata.core.errors import ConfigError
from cantata.core.types import PixelBatch
from cantata.train.stage import build_model
from cantata.train.tokenizer_stage import TokenizerStage, build_image_data, build_objective
from tests.recipes.runner import TINY_VQ


def stage_of(*overrides: str) -> TokenizerStage:
    composed = compose("vq", [*TINY_VQ, *overrides])
    return load(composed.node, TokenizerStage, composed.origins)


def test_batches_are_pixels_with_the_models_number_of_codes() -> None:
    stage = stage_of("collator.sizes=[[16,24]]")
    loader, held_out = build_image_data(stage, build_model(stage))
    batch = next(iter(loader))
    assert isinstance(batch, PixelBatch)
    assert batch.pixels_BTCHW.shape == (4, 1, 3, 16, 24)
    assert batch.num_tokens == 4 * (4 * 6)
    assert batch.is_real_B.all()
    first = next(iter(held_out))
    assert first.pixels_BTCHW.shape == (4, 1, 3, 16, 24)
    assert not set(batch.keys) & set(first.keys)


def test_the_objective_has_what_the_config_names() -> None:
    stage = stage_of()
    objective, critic = build_objective(stage, build_model(stage))
    assert critic is None
    assert objective.critic is None
    assert objective.perceptual is None
    small = ("critic.discriminator.base_channels=8", "critic.discriminator.norm_groups=2")
    stage = stage_of("critic=patchgan", *small)
    model: Any = build_model(stage)
    objective, critic = build_objective(stage, model)
    assert critic is not None
    assert objective.critic is critic
    assert objective.last_layer is model.last_layer
    assert objective.metrics is not None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("mesh.ep=2",), "mesh.ep=2: an image tokenizer has no experts"),
        (("critic=patchgan", "critic.start_generator=1"), "it learns before the model heeds it"),
        (("checkpoint.best={metric: eval/psnr, mode: max}",), "checkpoint.best.metric needs evaluations"),
        (("perceptual=lpips",), "perceptual.vgg16 must be given"),
        (("loss.l1=-1",), "loss.l1=-1.0 must be a number, at least 0"),
    ],
)
def test_what_cannot_be_is_refused_where_it_is_read(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stage_of(*overrides)


def test_sizes_are_the_models(tmp_path: Any) -> None:
    stage = stage_of("collator.sizes=[[16,18]]")
    with pytest.raises(ConfigError, match="both sides must be multiples of 4"):
        build_image_data(stage, build_model(stage))
