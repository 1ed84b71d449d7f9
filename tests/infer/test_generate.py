"""Decoding packed prompts is decoding each alone, on one rank and on two."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

from cantata.core.samples import Example, ImagePatches, Sample
from cantata.core.types import IMAGE, TEXT, Batch, ModelOutput
from cantata.data.collate.packed import PackedCollator
from cantata.infer.generate import generate
from cantata.models.aria.config import AriaMoEConfig, AriaProjectorConfig, AriaTextConfig, AriaVisionConfig
from cantata.models.aria.model import Aria
from tests.distributed.spawn import run_ranks
from tests.nn.moe.small import balance

IMAGE_TOKEN, STOP, VOCABULARY, PATCH_VALUES = 9, 2, 40, 192


class Processor:
    pad_token_id = 0
    image_token_id = IMAGE_TOKEN
    vocab_size = VOCABULARY
    patch_values = PATCH_VALUES
    stop_token_ids = (STOP,)

    def encode(self, example: Example, key: str) -> Sample:
        raise NotImplementedError

    def encode_prompt(self, example: Example, key: str = "prompt") -> Sample:
        raise NotImplementedError

    def decode(self, token_ids: Sequence[int]) -> str:
        raise NotImplementedError


class Counter(nn.Module):
    """Expects after each token the next number, and after 19 or 29 the stop; keeps what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, ...]] = []

    def forward(self, batch: Batch, *, with_logits: bool = False) -> ModelOutput:
        assert with_logits
        assert not self.training
        assert batch.num_targets == 0
        self.seen.append(batch.samples.lengths)
        following = batch.input_ids_T + 1
        following[(following == 20) | (following == 30)] = STOP
        logits_TV = nn.functional.one_hot(following, VOCABULARY).float()
        return ModelOutput(torch.zeros(()), torch.zeros(0), None, logits_TV)


COLLATOR = PackedCollator(Processor())


def text(*ids: int) -> Sample:
    return Sample(
        "t:0", np.array(ids, np.int32), np.zeros(len(ids), bool), np.full(len(ids), TEXT, np.int8), ()
    )


def picture(seed: int, patches: int, *ids: int) -> Sample:
    """Two image tokens, then text."""
    pixels = np.random.default_rng(seed).integers(0, 256, (patches, PATCH_VALUES), np.uint8)
    return Sample(
        f"i:{seed}",
        np.array([IMAGE_TOKEN, IMAGE_TOKEN, *ids], np.int32),
        np.zeros(2 + len(ids), bool),
        np.array([IMAGE, IMAGE, *[TEXT] * len(ids)], np.int8),
        (ImagePatches(pixels, np.arange(patches, dtype=np.int64), 2),),
    )


def aria() -> Aria:
    text_config = AriaTextConfig(
        VOCABULARY,
        32,
        2,
        4,
        2,
        8,
        1e4,
        1e-6,
        512,
        False,
        0.5,
        1,
        STOP,
        0,
        AriaMoEConfig(4, 2, 1, 16, 1, 1, balance(4)),
    )
    model = Aria(
        AriaVisionConfig(32, 64, 1, 2, 32, 8, 3, 1e-6, 0.2),
        AriaProjectorConfig({16: 2}, 0.2),
        text_config,
        IMAGE_TOKEN,
    )
    for name, parameter in model.named_parameters():
        model.init_parameter(name, parameter.data, torch.Generator().manual_seed(len(name)))
    return model


PROMPTS = [text(10, 11), picture(1, 16, 12), picture(2, 6, 13, 14, 15), text(1)]


def decode(
    model: nn.Module, prompts: Sequence[Sample], temperature: float = 0.0, seed: int = 0
) -> list[list[int]]:
    return generate(
        model,
        COLLATOR,
        prompts,
        max_new_tokens=12,
        stop_token_ids=(STOP,),
        temperature=temperature,
        seed=seed,
    )


def test_each_prompt_goes_on_to_its_own_stop() -> None:
    model = Counter()
    assert decode(model, [text(5, 17), text(25), text(19)]) == [[18, 19], [26, 27, 28, 29], []]
    assert model.training


def test_what_is_done_is_not_run_again() -> None:
    model = Counter()
    decode(model, [text(5, 17), text(25)])
    assert model.seen == [(2, 1), (3, 2), (4, 3), (4,), (5,)]


def test_at_most_so_many_tokens() -> None:
    assert generate(
        Counter(), COLLATOR, [text(10)], max_new_tokens=3, stop_token_ids=(STOP,), temperature=0.0, seed=0
    ) == [[11, 12, 13]]


def test_the_image_placeholder_is_never_generated() -> None:
    assert IMAGE_TOKEN not in decode(Counter(), [text(IMAGE_TOKEN - 1)])[0]


def test_no_prompt_is_an_error() -> None:
    with pytest.raises(ValueError, match="no prompt"):
        decode(Counter(), [])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_together_is_one_by_one(temperature: float) -> None:
    model = aria()
    together = decode(model, PROMPTS, temperature)
    # A prompt draws by its place, so each is decoded alone with the seed of its place.
    alone = [decode(model, [prompt], temperature, seed=index)[0] for index, prompt in enumerate(PROMPTS)]
    assert together == alone
    assert len({tuple(tokens) for tokens in together}) > 1


def test_a_temperature_draws_and_a_seed_repeats() -> None:
    model = aria()
    assert decode(model, PROMPTS, 5.0, seed=1) == decode(model, PROMPTS, 5.0, seed=1)
    assert decode(model, PROMPTS, 5.0, seed=1) != decode(model, PROMPTS, 5.0, seed=2)


def calls_on_rank() -> tuple[list[list[int]], int]:
    model = Counter()
    prompts = [[text(18)], [text(25), text(15)]][torch.distributed.get_rank()]
    return decode(model, prompts), len(model.seen)


def test_every_rank_runs_the_model_equally_often() -> None:
    assert run_ranks(calls_on_rank, 2) == [([[19]], 5), ([[26, 27, 28, 29], [16, 17, 18, 19]], 5)]
