"""A collator that makes what the model cannot read is refused before anything is built."""

from __future__ import annotations

import pytest

from cantata.core.build import build
from cantata.core.config import compose, load
from cantata.core.errors import ConfigError
from cantata.train.stage import PretrainStage, build_model


def check(*overrides: str) -> None:
    composed = compose("pretrain", ["experiment=aria_mini", *overrides])
    stage = load(composed.node, PretrainStage, composed.origins)
    build_model(stage).check_processor(build(stage.collator).processor)  # type: ignore[operator]


def test_the_shipped_collator_fits() -> None:
    check()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.image_token_id=77", r"image_token gives 9; the model needs 77"),
        ("collator.processor.position_grid=4", r"position_grid gives 4; the model needs 8"),
        ("collator.processor.features_per_image=32", r"features_per_image gives 32; the model needs 16"),
        ("model.text.vocab_size=3000", r"has 6144 tokens, more than model.text.vocab_size=3000"),
        ("model.vision.num_channels=1", r"patch_size gives 192; the model needs 64"),
    ],
)
def test_what_does_not_fit_is_named(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(override)
