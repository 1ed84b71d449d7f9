"""The contrastive model as one: unit features, its scale, its parts, and what it says of itself."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cantata.core.errors import ConfigError
from cantata.models.aimv2 import Aimv2Contrastive, contrastive_from_hub
from cantata.models.hub import save_to_hub
from cantata.models.protocol import LanguageModel, PairEncoder, Trainable
from tests.models.aimv2.small import (
    KINDS,
    TEXT,
    VISION,
    contrastive,
    encoder,
    pair_batch,
    pair_processor,
    processor,
)


@pytest.mark.parametrize("kind", KINDS)
def test_features_do_not_depend_on_company(kind: str) -> None:
    model, whole = contrastive(KINDS[kind]), pair_batch(4, KINDS[kind])
    with torch.no_grad():
        together = model(whole)
        alone = [model(pair_batch(1, KINDS[kind], seed=0))]
    torch.testing.assert_close(together.image_ID[:1], alone[0].image_ID, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together.text_SD[:1], alone[0].text_SD, rtol=1e-5, atol=1e-6)
    for features in (together.image_ID, together.text_SD):
        torch.testing.assert_close(features.norm(dim=1), torch.ones(4), rtol=1e-6, atol=0)


def test_the_scale_is_limited() -> None:
    model = contrastive()
    with torch.no_grad():
        model.init_parameter("logit_scale", model.logit_scale, torch.Generator())
        assert model.scale().item() == pytest.approx(1 / 0.07, rel=1e-6)
        model.logit_scale.fill_(math.log(1000))
    assert model.scale().item() == 100.0


def test_what_it_says_of_itself() -> None:
    model = contrastive()
    for kind in (Trainable, LanguageModel, PairEncoder):
        assert isinstance(model, kind)
    held = [f"{unit.name}.{name}" for unit in model.units() for name, _ in unit.module.named_parameters()]
    assert len(held) == len(set(held))
    rest = {name for name, _ in model.named_parameters()} - set(held)
    assert {name.partition(".")[0] for name in rest} == {
        *("vision", "text", "visual_projection", "text_projection", "logit_scale"),
    }
    assert all(".layers." not in name for name in rest)
    assert model.flops_per_token(8.0) == 6 * 2 * 24 * (4 * 24 + 3 * 40) + 6 * 2 * 24 * 8.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_length": 30}, "max_length gives 30, more than model.text.max_position_embeddings=20"),
        ({"text_end": "<|im_end|>"}, "text_end is token"),
        ({"patch_size": 2, "max_patches": 64}, "patch_size gives 12"),
    ],
)
def test_a_processor_that_does_not_fit(change: dict[str, Any], message: str) -> None:
    model = contrastive()
    model.check_processor(pair_processor())
    with pytest.raises(ConfigError, match=re.escape(message)):
        model.check_processor(pair_processor(**change))
    with pytest.raises(ConfigError, match="set collator=aimv2_pairs"):
        model.check_processor(processor())


def on_encoder(folder: Path, use_head: bool) -> Aimv2Contrastive:
    model = encoder(replace(VISION, use_head=use_head))
    save_to_hub(model, model.hub_layout(), folder, 10**9)
    return Aimv2Contrastive(replace(VISION, use_head=True), TEXT, 12, 100.0, vision_weights=str(folder))


@pytest.mark.parametrize("use_head", [True, False])
def test_its_tower_may_come_from_a_folder_whose_head_may_be_lacking(use_head: bool, tmp_path: Path) -> None:
    model = on_encoder(tmp_path / "hub", use_head)
    [part] = model.parts()
    tower = {name for name, _ in model.named_parameters() if name.startswith("vision.")}
    head = {name for name in tower if name.startswith("vision.head.")}
    assert head
    assert part.names == (tower if use_head else tower - head)
    assert part.directory == str(tmp_path / "hub")
    assert contrastive().parts() == ()


def test_a_folder_gives_back_the_model(tmp_path: Path) -> None:
    model = contrastive()
    save_to_hub(model, model.hub_layout(), tmp_path / "hub", 10**9)
    read = contrastive_from_hub(tmp_path / "hub")
    assert read.hub_layout() == model.hub_layout()
    assert read.weights == str(tmp_path / "hub")
    on_encoder(tmp_path / "alone", use_head=True)
    with pytest.raises(ConfigError, match="holds an image encoder alone"):
        contrastive_from_hub(tmp_path / "alone")


def test_what_cannot_be_built() -> None:
    with pytest.raises(ConfigError, match="use_head=false"):
        Aimv2Contrastive(VISION, TEXT, 12, 100.0)
    with pytest.raises(ConfigError, match="are both given"):
        Aimv2Contrastive(replace(VISION, use_head=True), TEXT, 12, 100.0, "a", "b")
