"""Images drawn in a batch: alone or together, guided or not, cached or not, greedy or drawn."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cantata.core.errors import ConfigError
from cantata.core.types import Batch
from cantata.data.collate import PackedCollator
from cantata.infer.image_generation import ImageGenerator
from cantata.infer.sampling import SamplingConfig
from cantata.models.emu3 import Emu3
from tests.data.helpers import mini_processor
from tests.models.emu3.small import TOKENS, reading_config, small_emu3, small_processor

GREEDY = SamplingConfig(1, 0.0, 0, 1.0, 1.0, (), 3)
DRAWN = replace(GREEDY, temperature=1.3, top_k=9, top_p=0.9)
PROMPTS = ["a red circle", "waves", "a cat on a mat, seen from above", "no"]
SIZES = [(3, 2), (1, 4), (2, 2), (4, 3)]
PROCESSOR = small_processor()


@pytest.fixture(scope="module")
def model() -> Emu3:
    return small_emu3(reading_config(initializer_range=0.4))


def images(
    model: nn.Module, prompts: list[str], sizes: list[tuple[int, int]], max_open: int = 4, **changes: Any
) -> list[NDArray[np.int64]]:
    given: dict[str, Any] = {"guidance": 3.0, "config": GREEDY} | changes
    generator = ImageGenerator(model, PackedCollator(PROCESSOR), max_positions=128, max_open=max_open)
    return generator.generate(prompts, sizes, **given)


def slowly(model: Emu3, text: str, size: tuple[int, int], guidance: float) -> NDArray[np.int64]:
    """Greedy, from whole forwards without a cache, after the log-softmax over the whole vocabulary."""
    sequences = [PROCESSOR.encode_image_prompt(one, *size).input_ids_T.tolist() for one in (text, "")]
    collator = PackedCollator(PROCESSOR)
    drawn = []
    for _ in range(size[0]):
        for _ in range(size[1]):
            cond, uncond = (_next(model, collator, ids) for ids in sequences)
            scores = uncond + guidance * (cond - uncond)
            code = int(scores[TOKENS.visual_offset : TOKENS.end_of_visual].argmax())
            drawn.append(code)
            for ids in sequences:
                ids.append(TOKENS.visual_offset + code)
        for ids in sequences:
            ids.append(TOKENS.eol)
    return np.array(drawn).reshape(size)


@torch.no_grad()
def _next(model: Emu3, collator: PackedCollator, ids: list[int]) -> Tensor:
    prompt = PROCESSOR.encode_image_prompt("", 1, 1)
    sample = replace(
        prompt,
        input_ids_T=np.array(ids, np.int32),
        weight_T=np.zeros(len(ids), np.float32),
        modality_ids_T=np.zeros(len(ids), np.int8),
    )
    batch = collator.collate([collator.row([sample])], len(ids))
    logits = model(batch, with_logits=True).logits_TV
    assert logits is not None
    return logits[-1].log_softmax(-1)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_batch_equals_the_slow_way_one_by_one(model: Emu3, guidance: float) -> None:
    found = images(model, PROMPTS, SIZES, guidance=guidance)
    for image, text, size in zip(found, PROMPTS, SIZES, strict=True):
        assert np.array_equal(image, slowly(model, text, size, guidance))
    assert len({image.tobytes() for image in found}) == len(found)


def test_guidance_changes_the_images(model: Emu3) -> None:
    pairs = zip(images(model, PROMPTS, SIZES), images(model, PROMPTS, SIZES, guidance=1.0), strict=True)
    assert any(not np.array_equal(*pair) for pair in pairs)


@pytest.mark.parametrize("config", [GREEDY, DRAWN])
@pytest.mark.parametrize("max_open", [1, 2, 3])
def test_what_is_drawn_at_once_does_not_matter(model: Emu3, config: SamplingConfig, max_open: int) -> None:
    together = images(model, PROMPTS, SIZES, config=config)
    for one, other in zip(images(model, PROMPTS, SIZES, max_open, config=config), together, strict=True):
        assert np.array_equal(one, other)


def test_a_model_without_a_cache_draws_the_same(model: Emu3) -> None:
    class Uncached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, batch: Batch, *, with_logits: bool = False) -> Any:
            return self.inner(batch, with_logits=with_logits)

    expected = images(model, PROMPTS, SIZES)
    assert all(map(np.array_equal, images(Uncached().eval(), PROMPTS, SIZES), expected))


def test_draws_follow_the_guided_probabilities(model: Emu3) -> None:
    """The first code of many images, each with a seed of its own."""
    count, guidance = 600, 2.0
    found = images(
        model,
        ["waves"] * count,
        [(1, 1)] * count,
        64,
        config=replace(DRAWN, top_k=0, top_p=1.0),
        guidance=guidance,
    )
    seen = Counter(int(image[0, 0]) for image in found)
    collator = PackedCollator(PROCESSOR)
    cond, uncond = (
        _next(model, collator, PROCESSOR.encode_image_prompt(text, 1, 1).input_ids_T.tolist())
        for text in ("waves", "")
    )
    scores = uncond + guidance * (cond - uncond)
    expected = (scores[TOKENS.visual_offset : TOKENS.end_of_visual] / DRAWN.temperature).softmax(-1)
    for code, probability in enumerate(expected.tolist()):
        assert abs(seen[code] / count - probability) < 4 * (probability / count) ** 0.5 + 1e-3


def test_a_training_model_draws_without_dropout_and_trains_on(model: Emu3) -> None:
    expected = images(model, PROMPTS, SIZES)
    model.train()
    assert all(map(np.array_equal, images(model, PROMPTS, SIZES), expected))
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance": -1.0}, "guidance=-1.0 must be at least 0"),
        ({"config": replace(GREEDY, stop=("x",))}, "an image has no stop texts"),
        ({"config": replace(GREEDY, repetition_penalty=1.1)}, "no repetition penalty"),
        ({"sizes": [(0, 3)]}, "image 1: .*0 x 3 codes"),
        ({"sizes": [(12, 12)]}, "12 x 12 codes and their text are 1.. tokens, and the model takes 128"),
        ({"sizes": [(1, 1)] * 2}, "1 prompts and 2 sizes"),
        ({"max_open": 0}, "0 images at once"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(model: Emu3, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        images(model, **({"prompts": ["a"], "sizes": [(1, 1)]} | changes))


def test_another_processor_is_refused(model: Emu3) -> None:
    with pytest.raises(ConfigError, match="AriaProcessor makes no tokens of images"):
        ImageGenerator(model, PackedCollator(mini_processor()), max_positions=9, max_open=1)
