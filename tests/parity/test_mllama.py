"""The native Mllama against transformers': logits, loss, gradients and checkpoints both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cantata.models.hub import load_from_hub, save_to_hub
from cantata.models.mllama import Masking, Mllama, mllama_from_hub
from cantata.models.mllama.hf import MllamaLayout
from cantata.tools import verify_mllama
from cantata.tools.verify import (
    LOGITS_BOUND,
    compare,
    pack,
    relative_error,
    synthetic_samples,
    transformers_inputs,
)
from tests.models.mllama.small import IMAGE, small_layout, small_mllama, small_vision
from tests.parity.folders import assert_same_tensors

transformers = pytest.importorskip("transformers")

BOUND = 1e-5
"""Of logits, loss and gradients; tighter than `cantata verify`'s of gradients, which holds for any size."""
GATE_BOUND = 5e-5
"""Of a gate's gradient: one number, in which thousands of terms cancel, held against itself."""
LAYOUTS = {
    "gqa-llama3": small_layout(),
    "mha-plain": small_layout(
        small_vision(max_num_tiles=2, intermediate_layers=(1,), image_size=12),
        num_key_value_heads=4,
        rope_scaling=None,
        cross_attention_layers=(0, 1, 4),
    ),
    "text alone": small_layout(None),
}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> MllamaLayout:
    return LAYOUTS[request.param]


def exported(model: Mllama, directory: Path) -> Any:
    """transformers' model of our checkpoint; every key must be found."""
    save_to_hub(model, model.hub_layout(), directory, max_shard_bytes=40_000)
    text_alone = model.vision_config is None
    kind = transformers.MllamaForCausalLM if text_alone else transformers.MllamaForConditionalGeneration
    reference, report = kind.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return reference


def is_gate(check: str) -> bool:
    leaf = check.rpartition(".")[2]
    return leaf.startswith("gate_") or leaf.endswith("gate")


@torch.no_grad()
def native_logits(model: Mllama, layout: MllamaLayout) -> Tensor:
    logits = model(pack(synthetic_samples(layout, 3), layout), with_logits=True).logits_TV
    assert logits is not None
    return logits


@torch.no_grad()
def reference_logits(model: Any, layout: MllamaLayout) -> Tensor:
    samples = synthetic_samples(layout, 3)
    return torch.cat([model(**transformers_inputs(sample, layout)).logits[0] for sample in samples])


def test_the_samples_have_no_image_one_several_and_neighbours() -> None:
    """What every comparison below rests on."""
    samples = synthetic_samples(LAYOUTS["gqa-llama3"], 0)
    assert [len(sample.images) for sample in samples] == [0, 1, 3, 2]
    shapes = {tuple(image.shape[:2]) for sample in samples for image in sample.images}
    assert len(shapes) == 4
    ids = samples[2].input_ids
    first, *rest = [place for place, token in enumerate(ids) if token == IMAGE]
    assert rest == [first + 6, first + 7]


@pytest.mark.parametrize("seed", [0, 1])
def test_logits_loss_and_every_gradient(layout: MllamaLayout, tmp_path: Path, seed: int) -> None:
    model = small_mllama(layout, Masking.transformers, seed)
    checks = list(compare(model, exported(model, tmp_path / "hub"), layout, seed))
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    assert len(checks) == 2 + trained
    assert [c for c in checks if c.error > (GATE_BOUND if is_gate(c.name) else BOUND)] == []


def test_metas_masking_differs_where_text_stands_before_an_image(tmp_path: Path) -> None:
    """Parity needs the switch: without it logits differ, from the first word of a sample with images on."""
    layout = LAYOUTS["gqa-llama3"]
    model = small_mllama(layout, Masking.meta)
    expected = reference_logits(exported(model, tmp_path / "hub"), layout)
    found = native_logits(model, layout)
    lengths = [len(sample.input_ids) for sample in synthetic_samples(layout, 3)]
    text, *pictured = torch.split(found - expected, lengths)
    assert text.abs().max() < 1e-5
    assert all(part.abs().max() > 1e-3 for part in pictured)


def test_a_wrong_weight_is_noticed(tmp_path: Path) -> None:
    layout = LAYOUTS["gqa-llama3"]
    model = small_mllama(layout, Masking.transformers)
    reference = exported(model, tmp_path / "hub")
    with torch.no_grad():
        model.get_parameter("vision.between.layernorm.bias")[3] += 1e-2
    assert any(not check.passed for check in compare(model, reference, layout, 0))


def test_their_checkpoint_here(layout: MllamaLayout, tmp_path: Path) -> None:
    reference = exported(small_mllama(layout), tmp_path / "ours")
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    model = mllama_from_hub(tmp_path / "theirs", Masking.transformers)
    found = model.hub_layout()
    assert found.text == layout.text
    load_from_hub(model, found, tmp_path / "theirs")
    expected = reference_logits(reference, layout)
    assert relative_error(native_logits(model, layout), expected, expected) < LOGITS_BOUND


def test_keys_and_config_are_those_of_save_pretrained(layout: MllamaLayout, tmp_path: Path) -> None:
    """Loading and saving again with transformers gives the same tensors under the same keys, bit for bit."""
    reference = exported(small_mllama(layout), tmp_path / "ours")
    reference.save_pretrained(tmp_path / "theirs")
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    for section in ("text_config", "vision_config"):
        assert written.get(section, {}).items() <= config.get(section, {}).items()
    own = {key: value for key, value in written.items() if not key.endswith("_config")}
    # transformers' own default, which it leaves out.
    assert not own.pop("tie_word_embeddings")
    assert own.items() <= config.items()


def test_text_alone_reads_a_whole_checkpoint(tmp_path: Path) -> None:
    """The tower's keys are passed over, and what is left is the language model."""
    whole, alone = LAYOUTS["gqa-llama3"], LAYOUTS["text alone"]
    model = small_mllama(whole)
    save_to_hub(model, whole, tmp_path / "hub", max_shard_bytes=10**9)
    text = small_mllama(alone, seed=1)
    load_from_hub(text, alone, tmp_path / "hub")
    samples = synthetic_samples(alone, 3)
    expected = model(pack(samples, whole), with_logits=True).logits_TV
    found = text(pack(samples, alone), with_logits=True).logits_TV
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_the_mask_is_that_of_transformers_processor() -> None:
    from transformers.models.mllama.processing_mllama import (
        convert_sparse_cross_attention_mask_to_dense,
        get_cross_attention_token_mask,
    )

    vision = small_vision()
    generator = torch.Generator().manual_seed(0)
    for ids in ([5, IMAGE, 7], [IMAGE, IMAGE, 5, 6], [5, IMAGE, 6, 6, IMAGE, IMAGE, IMAGE, 7, IMAGE]):
        count = ids.count(IMAGE)
        images = verify_mllama.random_images(vision, range(count), generator)
        found = verify_mllama.image_inputs(vision, ids, images, IMAGE)["cross_attention_mask"]
        tiles = [image.shape[0] * image.shape[1] for image in images]
        sparse = get_cross_attention_token_mask(ids, IMAGE)
        expected = convert_sparse_cross_attention_mask_to_dense([sparse], [tiles], 4, len(ids))
        assert torch.equal(found, torch.from_numpy(expected))
