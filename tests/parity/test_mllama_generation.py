"""Greedy generation, cached and packed, against transformers' `generate`, token for token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cantata.core.samples import ImagePatches, Sample
from cantata.core.types import IMAGE as IMAGE_MODALITY
from cantata.core.types import TEXT
from cantata.data.collate import PackedCollator
from cantata.infer.generate import generate
from cantata.infer.sequences import CachedSequences, RepeatedSequences
from cantata.models.hub import save_to_hub
from cantata.models.mllama import Masking, Mllama
from cantata.models.mllama.hf import MllamaLayout
from cantata.tools import verify, verify_mllama
from tests.data.helpers import Letters
from tests.models.mllama.small import IMAGE, small_layout, small_mllama

transformers = pytest.importorskip("transformers")

NEW = 48
LAYOUT = small_layout()


class Processor(Letters):
    """Any tokens; patches are normalised already."""

    patch_values = 48
    vocab_size = 65
    pad_token_id = 0
    image_token_id = IMAGE


COLLATOR = PackedCollator(Processor())


def prompts(layout: MllamaLayout) -> list[verify.Sample]:
    """Without images, with one, with three of which two stand together; of different lengths and canvases."""
    generator = torch.Generator().manual_seed(5)
    samples = []
    for plan, length in (((), 13), ((5,), 5), ((1, 0, 7), 7), ((), 2), ((0, 0), 0)):
        assert layout.vision is not None
        images = verify_mllama.random_images(layout.vision, plan, generator)
        input_ids = verify._tokens(layout, length, generator)
        for number in range(len(plan)):
            words = 0 if number == len(plan) - 2 else 3
            input_ids += [IMAGE, *verify._tokens(layout, words, generator)]
        samples.append(verify.Sample(input_ids, 0, images))
    return samples


def native(sample: verify.Sample, layout: MllamaLayout) -> Sample:
    ids = np.array(sample.input_ids, np.int32)
    packed = verify_mllama.pack_images(
        layout.vision, sample.images, torch.from_numpy(np.flatnonzero(ids == IMAGE))
    )
    cut = [
        torch.split(given, list(packed.patches.lengths)) if sample.images else ()
        for given in (packed.patches_PC, packed.position_ids_P)
    ]
    images = tuple(
        ImagePatches(patches.numpy(), ids_P.numpy(), 1) for patches, ids_P in zip(*cut, strict=True)
    )
    modality = np.where(ids == IMAGE, IMAGE_MODALITY, TEXT).astype(np.int8)
    return Sample("t", ids, np.zeros(len(ids), np.float32), modality, images)


def theirs(model: Any, sample: verify.Sample, layout: MllamaLayout, eos: int | None) -> list[int]:
    inputs = verify.transformers_inputs(sample, layout)
    del inputs["labels"]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    found: Tensor = model.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=eos, pad_token_id=0
    )
    return found[0, len(sample.input_ids) :].tolist()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Mllama, Any]:
    model = small_mllama(LAYOUT, Masking.transformers)
    folder = tmp_path_factory.mktemp("hub") / "mllama"
    save_to_hub(model, model.hub_layout(), folder, max_shard_bytes=10**9)
    return model, transformers.MllamaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def ours(model: Mllama, samples: list[verify.Sample], stop: tuple[int, ...]) -> list[list[int]]:
    given = [native(sample, model.hub_layout()) for sample in samples]
    return generate(model, COLLATOR, given, max_new_tokens=NEW, stop_token_ids=stop, temperature=0.0, seed=0)


def test_a_batch_of_different_lengths_and_numbers_of_images(pair: tuple[Mllama, Any]) -> None:
    model, reference = pair
    samples = prompts(LAYOUT)
    expected = [theirs(reference, sample, LAYOUT, None) for sample in samples]
    found = ours(model, samples, ())
    assert found == expected
    assert all(len(tokens) == NEW for tokens in found)
    assert len({tuple(tokens) for tokens in found}) == len(found)
    # One that ends early leaves the others as they are.
    stop = found[2][7]
    ended = [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in found]
    assert len({len(tokens) for tokens in ended}) > 1
    assert ours(model, samples, (stop,)) == ended
    assert theirs(reference, samples[2], LAYOUT, stop) == [*ended[2], stop]


ADD, REMOVE, EXTEND = "add", "remove", "extend"
COMINGS_AND_GOINGS = (
    (ADD, 0), (ADD, 1, 2), (EXTEND,), (REMOVE, 0), (EXTEND,), (ADD, 3, 4), (EXTEND,), (REMOVE, 1),
    (REMOVE, 0), (EXTEND,), (REMOVE, 0), (REMOVE, 0), (ADD, 3), (EXTEND,), (ADD, 1), (EXTEND,),
)  # fmt: skip


@pytest.mark.parametrize("masking", Masking)
@torch.no_grad()
def test_both_caches_equal_running_all_again(masking: Masking) -> None:
    """Sequences come and go between steps, with images and without."""
    model = small_mllama(LAYOUT, masking).eval()
    samples = [native(sample, LAYOUT) for sample in prompts(LAYOUT)]
    fast, slow = CachedSequences(model, COLLATOR), RepeatedSequences(model, COLLATOR)
    generator = torch.Generator().manual_seed(0)
    open_ = 0
    for action, *numbers in COMINGS_AND_GOINGS:
        if action == REMOVE:
            fast.remove(numbers[0])
            slow.remove(numbers[0])
            open_ -= 1
            continue
        if action == ADD:
            found, expected = (side.add([samples[i] for i in numbers]) for side in (fast, slow))
            open_ += len(numbers)
        else:
            tokens = torch.randint(1, 64, (open_,), generator=generator).tolist()
            found, expected = fast.extend(tokens), slow.extend(tokens)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert open_ == 2
