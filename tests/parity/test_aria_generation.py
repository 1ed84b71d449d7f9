"""Greedy generation, cached and packed, against transformers' `generate`, token for token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cantata.core.samples import ImagePatches, Sample
from cantata.core.types import IMAGE, TEXT
from cantata.data.collate import PackedCollator
from cantata.infer.generate import generate
from cantata.models.aria import Aria
from cantata.models.aria.hf import AriaLayout
from cantata.models.aria.vision import patch_position_ids
from cantata.models.hub import save_to_hub
from cantata.tools import verify
from tests.data.helpers import Letters
from tests.models.aria.small import small_aria, small_layout
from tests.nn.moe.small import balance

transformers = pytest.importorskip("transformers")

NEW = 64
LAYOUTS = {
    "gqa-untied": small_layout(),
    "mha-tied": small_layout(
        moe={"num_experts": 6, "top_k": 3, "balance": balance(6)},
        num_key_value_heads=4,
        tie_word_embeddings=True,
        rope_theta=5e6,
    ),
}


class Processor(Letters):
    """Any tokens; patches are normalised already."""

    patch_values = 12
    vocab_size = 64
    pad_token_id = 0


COLLATOR = PackedCollator(Processor())


def prompts(layout: AriaLayout) -> list[verify.Sample]:
    """Without images, with one of either size, and with three; of different lengths."""
    generator = torch.Generator().manual_seed(5)
    samples = []
    for sides, length in (((), 13), ((4,), 5), ((2,), 9), ((4, 4, 4), 7), ((), 2)):
        input_ids, images = verify._tokens(layout, length, generator), []
        for number, side in enumerate(sides):
            rows, columns = side, max(1, side - number)
            images.append(torch.randn(rows, columns, layout.vision.patch_values, generator=generator))
            features = layout.projector.patch_to_query[side**2]
            input_ids += [layout.image_token_id] * features + verify._tokens(layout, 3, generator)
        samples.append(verify.Sample(input_ids, sides[0] if sides else 0, images))
    return samples


def native(sample: verify.Sample, layout: AriaLayout) -> Sample:
    ids = np.array(sample.input_ids, np.int32)
    is_image = ids == layout.image_token_id
    images = tuple(
        ImagePatches(
            image.flatten(0, 1).numpy(),
            patch_position_ids(image.shape[0], image.shape[1], layout.vision.grid).numpy(),
            layout.projector.patch_to_query[sample.side**2],
        )
        for image in sample.images
    )
    modality = np.where(is_image, IMAGE, TEXT).astype(np.int8)
    return Sample("t", ids, np.zeros(len(ids), np.float32), modality, images)


def theirs(model: Any, sample: verify.Sample, layout: AriaLayout, eos: int | None) -> list[int]:
    inputs = verify.transformers_inputs(sample, layout)
    del inputs["labels"]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    found: Tensor = model.generate(
        **inputs,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0,
        suppress_tokens=[layout.image_token_id],
    )
    return found[0, len(sample.input_ids) :].tolist()


@pytest.fixture(scope="module", params=LAYOUTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Aria, Any]:
    model = small_aria(LAYOUTS[request.param])
    folder = tmp_path_factory.mktemp("hub") / "aria"
    save_to_hub(model, model.hub_layout(), folder, max_shard_bytes=10**9)
    return model, transformers.AriaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def ours(model: Aria, samples: list[verify.Sample], stop: tuple[int, ...]) -> list[list[int]]:
    given = [native(sample, model.hub_layout()) for sample in samples]
    return generate(model, COLLATOR, given, max_new_tokens=NEW, stop_token_ids=stop, temperature=0.0, seed=0)


def test_a_batch_of_different_lengths_and_numbers_of_images(pair: tuple[Aria, Any]) -> None:
    model, reference = pair
    layout = model.hub_layout()
    samples = prompts(layout)
    expected = [theirs(reference, sample, layout, None) for sample in samples]
    found = ours(model, samples, ())
    assert found == expected
    assert all(len(tokens) == NEW for tokens in found)
    assert len({tuple(tokens) for tokens in found}) == len(found)
    # One that ends early leaves the others as they are.
    stop = found[3][7]
    ended = [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in found]
    assert len({len(tokens) for tokens in ended}) > 1
    assert ours(model, samples, (stop,)) == ended
    assert theirs(reference, samples[3], layout, stop) == [*ended[3], stop]
