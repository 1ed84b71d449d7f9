"""The native Aria against transformers': logits, loss, gradients and checkpoints both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cantata.models.aria import Aria, aria_from_hub
from cantata.models.aria.hf import AriaLayout
from cantata.models.aria.vision import patch_position_ids
from cantata.models.hub import load_from_hub, save_to_hub
from cantata.tools.compared import LOGITS_BOUND, relative_error
from cantata.tools.verify import compare, pack, synthetic_samples, transformers_inputs
from tests.models.aria.small import small_aria, small_layout
from tests.nn.moe.small import balance
from tests.parity.folders import assert_same_tensors

transformers = pytest.importorskip("transformers")

LAYOUTS = {
    "gqa-untied": small_layout(),
    "gqa-tied": small_layout(tie_word_embeddings=True),
    "mha-untied": small_layout(num_key_value_heads=4, rope_theta=5e6, head_dim=16),
    "mha-tied": small_layout(
        moe={"num_experts": 6, "top_k": 3, "balance": balance(6)},
        num_key_value_heads=4,
        tie_word_embeddings=True,
    ),
}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> AriaLayout:
    return LAYOUTS[request.param]


def exported(model: Aria, directory: Path) -> Any:
    """transformers' model of our checkpoint; every key must be found."""
    save_to_hub(model, model.hub_layout(), directory, max_shard_bytes=40_000)
    reference, report = transformers.AriaForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return reference


@torch.no_grad()
def native_logits(model: Aria, layout: AriaLayout) -> Tensor:
    logits = model(pack(synthetic_samples(layout, 3), layout), with_logits=True).logits_TV
    assert logits is not None
    return logits


@torch.no_grad()
def reference_logits(model: Any, layout: AriaLayout) -> Tensor:
    samples = synthetic_samples(layout, 3)
    return torch.cat([model(**transformers_inputs(sample, layout)).logits[0] for sample in samples])


@pytest.mark.parametrize("seed", [0, 1])
def test_logits_loss_and_every_gradient(layout: AriaLayout, tmp_path: Path, seed: int) -> None:
    model = small_aria(layout, seed)
    checks = list(compare(model, exported(model, tmp_path / "hub"), layout, seed))
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    assert len(checks) == 2 + trained
    assert [check for check in checks if not check.passed] == []


def test_a_wrong_weight_is_noticed(tmp_path: Path) -> None:
    layout = LAYOUTS["gqa-untied"]
    model = small_aria(layout)
    reference = exported(model, tmp_path / "hub")
    with torch.no_grad():
        model.projector.cross_attn.in_proj_bias[3] += 1e-3
    assert any(not check.passed for check in compare(model, reference, layout, 0))


def test_our_checkpoint_in_transformers(layout: AriaLayout, tmp_path: Path) -> None:
    model = small_aria(layout)
    reference = exported(model, tmp_path / "hub")
    assert len(list((tmp_path / "hub").glob("model-*-of-*.safetensors"))) > 1
    expected = reference_logits(reference, layout)
    assert relative_error(native_logits(model, layout), expected, expected) < LOGITS_BOUND


def test_their_checkpoint_here(layout: AriaLayout, tmp_path: Path) -> None:
    reference = exported(small_aria(layout), tmp_path / "ours")
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    model = aria_from_hub(tmp_path / "theirs")
    assert model.hub_layout() == layout
    load_from_hub(model, layout, tmp_path / "theirs")
    expected = reference_logits(reference, layout)
    assert relative_error(native_logits(model, layout), expected, expected) < LOGITS_BOUND


def test_keys_and_config_are_those_of_save_pretrained(layout: AriaLayout, tmp_path: Path) -> None:
    """Loading and saving again with transformers gives the same tensors under the same keys, bit for bit."""
    reference = exported(small_aria(layout), tmp_path / "ours")
    reference.save_pretrained(tmp_path / "theirs")
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    for section in ("text_config", "vision_config"):
        assert written[section].items() <= config[section].items()
    assert {k: v for k, v in written.items() if not k.endswith("_config")}.items() <= config.items()


@pytest.mark.parametrize(
    "shape", [(35, 35), (35, 24), (17, 35), (1, 35), (70, 70), (70, 49), (13, 70), (3, 5)]
)
def test_position_ids_of_partially_valid_masks(shape: tuple[int, int]) -> None:
    """The tower is asked for its positions: zero pixels, position i embedded as the number i."""
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

    rows, columns = shape
    side = 35 if max(shape) <= 35 else 70
    config = Idefics3VisionConfig(hidden_size=1, image_size=980, patch_size=14, num_attention_heads=1)
    embeddings = Idefics3VisionEmbeddings(config)
    with torch.no_grad():
        embeddings.patch_embedding.bias.zero_()
        embeddings.position_embedding.weight.copy_(torch.arange(4900)[:, None])
    mask = torch.zeros(1, side, side, dtype=torch.bool)
    mask[:, :rows, :columns] = True
    found = embeddings(torch.zeros(1, 3, side * 14, side * 14), mask)[0, mask[0].flatten(), 0]
    assert patch_position_ids(rows, columns, 70).tolist() == found.tolist()
