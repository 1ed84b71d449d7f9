"""Merged weights: the adapted model's logits, rounded once, and refused where one weight would be two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cantata.core.errors import ConfigError
from cantata.models.aria import Aria
from cantata.models.lora import LoRAConfig
from cantata.models.merge import MergedWeights
from cantata.tools.compared import relative_error
from cantata.tools.verify import pack, synthetic_samples
from tests.models.adapters import Base, lora, published, value_of
from tests.models.aria.small import small_aria


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return published(tmp_path_factory.mktemp("base") / "hub")


def merged(base: Base, model: Aria, config: LoRAConfig, dtype: torch.dtype | None = None) -> MergedWeights:
    return MergedWeights(model, base.layout, config, base.reader(), value_of(model), dtype)


@torch.no_grad()
def logits(base: Base, model: Aria) -> torch.Tensor:
    found = model(pack(synthetic_samples(base.layout, 3), base.layout), with_logits=True).logits_TV
    assert found is not None
    return found


@pytest.mark.parametrize(
    "config",
    [
        lora(targets=["*"], ranks={"*.fc1": 2}, rslora=True),
        lora(targets=["*"], dora=True, modules_to_save=["*.router.weight", "head.norm.weight"]),
        # Saved in full and adapted besides: both count.
        lora(targets=["text.layers.*"], modules_to_save=["*.q_proj.weight", "*.experts.fc1"]),
    ],
)
def test_the_merged_model_is_the_adapted_one(base: Base, config: LoRAConfig) -> None:
    adapted, whole = base.adapted(config), small_aria(base.layout)
    weights = merged(base, adapted, config)
    before = logits(base, whole)
    assert list(weights) == [name for name, _ in whole.named_parameters()]
    with torch.no_grad():
        for name in weights:
            whole.get_parameter(name).copy_(weights.read(name))
    expected = logits(base, adapted)
    assert relative_error(logits(base, whole), expected, expected) < 1e-5
    assert relative_error(before, expected, expected) > 1e-2


def test_sums_are_rounded_once(base: Base) -> None:
    config = lora(targets=["head", "*.experts.fc1"])
    model = base.adapted(config)
    wide, narrow = merged(base, model, config), merged(base, model, config, torch.bfloat16)
    for name in ("head.weight", "text.layers.0.mlp.experts.fc1", "head.norm.weight"):
        assert torch.equal(narrow.read(name), wide.read(name).bfloat16()), name


def test_what_is_saved_in_full_takes_the_bases_dtype(base: Base) -> None:
    config = lora(targets=["head"], modules_to_save=["head.norm.weight"])
    model = base.adapted(config).double()
    assert merged(base, model, config).read("head.norm.weight").dtype == torch.float32


@pytest.mark.parametrize("target", ["head", "text.embed_tokens"])
def test_one_weight_cannot_be_two(tmp_path: Path, target: str) -> None:
    tied = published(tmp_path / "hub", tie_word_embeddings=True)
    config = lora(targets=[target])
    with pytest.raises(ConfigError, match=f"{target} is adapted and shares its weight"):
        merged(tied, tied.adapted(config), config)
