"""Generation with a cache while sharded models train: the tokens of the slow way, and training untouched."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from cantata.core.samples import ImagePatches, Sample
from cantata.core.types import IMAGE, TEXT
from cantata.data.collate import PackedCollator
from cantata.infer import generate as module
from cantata.infer.sequences import CachedSequences, RepeatedSequences
from cantata.train.objectives import NextToken
from tests.distributed import test_deepspeed_aria as zero
from tests.distributed import test_fsdp2_aria as fsdp
from tests.distributed.spawn import run_ranks
from tests.infer.test_generate import Processor

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ENGINES: dict[str, Callable[[], Any]] = {"fsdp2": lambda: fsdp.engine_of(zero.build_aria())}
if find_spec("deepspeed") is not None:
    ENGINES["zero 3"] = lambda: zero.engine_of(zero.build_aria(), zero_stage=3)
    ENGINES["zero 3 tied"] = lambda: zero.engine_of(zero.build_aria(tied=True), zero_stage=3)


def prompt(*ids: int, with_image: bool = False) -> Sample:
    given = np.array([9] * 4 * with_image + list(ids), np.int32)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 192), np.uint8)
    images = (ImagePatches(pixels, np.arange(6), 4),) if with_image else ()
    modality = np.where(given == 9, IMAGE, TEXT).astype(np.int8)
    return Sample("p", given, np.zeros(len(given), np.float32), modality, images)


PROMPTS = ([prompt(12, 13, with_image=True), prompt(20)], [prompt(21, 22, 23)])
"""Of two ranks, of which one has no image."""


def answers(engine: Any, sequences: type) -> list[list[int]]:
    settings: dict[str, Any] = {"stop_token_ids": (), "temperature": 0.0, "seed": 0}
    new = 9 - 3 * dist.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "open_sequences", sequences)
        collator, prompts = PackedCollator(Processor()), PROMPTS[dist.get_rank()]
        return module.generate(engine.model, collator, prompts, max_new_tokens=new, **settings)


def step(engine: Any) -> None:
    for index, batch in enumerate(zero.MICRO_BATCHES[dist.get_rank() :: 2], start=1):
        engine.forward_backward(batch, NextToken(zero.BALANCE), zero.TOTALS, last=index == 2)
    engine.step(1.0)


def play(name: str, generates: bool) -> tuple[list[Any], list[list[int]], torch.Tensor]:
    """Two steps with what is said before, between and after, and logits at the end."""
    engine = ENGINES[name]()
    cached, slow = [], []
    for is_last in (False, False, True):
        if generates:
            cached.append(answers(engine, CachedSequences))
            slow.append(answers(engine, RepeatedSequences))
        if not is_last:
            step(engine)
    with torch.no_grad():
        logits_TV = engine.model(zero.MICRO_BATCHES[0], with_logits=True).logits_TV
    return cached, slow, logits_TV.clone()


def both() -> dict[str, Any]:
    return {name: (play(name, True), play(name, False)) for name in ENGINES}


def test_cached_is_uncached_and_training_goes_on_as_without() -> None:
    for results in run_ranks(both, 2):
        for name, ((cached, slow, end), (_, _, expected)) in results.items():
            assert cached == slow, name
            assert len({str(tokens) for tokens in cached}) > 1, name
            assert torch.equal(end, expected), name
