"""Decoding packed prompts is decoding each alone, on one rank and on two."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cantata.core.errors import ConfigError
from cantata.core.samples import Example, ImagePatches, Sample
from cantata.core.types import IMAGE, TEXT, Batch, ModelOutput
from cantata.data.collate.packed import PackedCollator
from cantata.infer.generate import Generator, generate
from cantata.infer.sampling import SamplingConfig
from cantata.infer.sequences import RepeatedSequences
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
        return "".join(f"{token} " for token in token_ids)

    def spell(self, token_ids: Sequence[int]) -> str:
        return self.decode(token_ids)


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


def test_a_seed_is_a_prompts_own_whatever_is_beside_it() -> None:
    settings = config(temperature=3.0, seed=7)
    everything = generator(aria()).generate(PROMPTS, settings)
    others = generator(aria()).generate([PROMPTS[0], text(3), PROMPTS[2], text(33, 34)], settings)
    assert others[0] == everything[0]
    assert others[2] == everything[2]


def config(**changes: Any) -> SamplingConfig:
    settings = {"max_new_tokens": 12, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    return SamplingConfig(**({"repetition_penalty": 1.0, "stop": ()} | settings | changes))


def generator(model: nn.Module, max_positions: int = 100, max_open: int = 4) -> Generator:
    return Generator(model, COLLATOR, max_positions=max_positions, max_open=max_open)


def test_answers_have_tokens_text_and_an_end() -> None:
    answers = generator(Counter()).generate([text(26), text(10)], config(max_new_tokens=4))
    assert answers[0] == ([27, 28, 29], "27 28 29 ", True)
    assert answers[1] == ([11, 12, 13, 14], "11 12 13 14 ", False)


def test_a_stop_text_ends_an_answer_and_is_cut_off() -> None:
    answers = generator(Counter()).generate([text(10), text(15)], config(stop=("3 14", "nothing")))
    assert answers[0] == ([11, 12, 13, 14], "11 12 1", True)
    assert answers[1].text == "16 17 18 19 "


@pytest.mark.parametrize("max_open", [1, 2, 3, 9])
def test_prompts_take_turns(max_open: int) -> None:
    """However many go on at once, each becomes the same; who waits is taken in when another ends."""
    prompts = [text(5, 17), text(25), text(12), text(19), text(27)]
    model = Counter()
    found = generator(model, max_open=max_open).generate(prompts, config())
    assert [answer.token_ids for answer in found] == decode(Counter(), prompts)
    assert max(len(lengths) for lengths in model.seen) == min(max_open, len(prompts))
    model = aria()
    together = generator(model, max_open=9).generate([*PROMPTS, *PROMPTS], config())
    assert generator(model, max_open=max_open).generate([*PROMPTS, *PROMPTS], config()) == together


def test_listeners_hear_every_piece_and_the_end() -> None:
    heard: list[tuple[int, str, bool]] = []
    settings = config(stop=("29 ",), max_new_tokens=3)
    answers = generator(Counter()).generate(
        [text(26), text(17), text(19)], settings, lambda *said: heard.append(said)
    )
    for index, answer in enumerate(answers):
        own = [(piece, is_last) for place, piece, is_last in heard if place == index]
        assert "".join(piece for piece, _ in own) == answer.text
        assert [is_last for _, is_last in own] == [False] * (len(own) - 1) + [True]
    assert [answer.text for answer in answers] == ["27 28 ", "18 19 ", ""]


def test_positions_end_an_answer_and_a_prompt_without_room_is_one_line() -> None:
    prompts = [text(10), text(*range(10, 15))]
    answers = generator(Counter(), max_positions=8).generate(prompts, config())
    assert [len(answer.token_ids) for answer in answers] == [7, 3]
    with pytest.raises(
        ConfigError, match="prompt 2 of 2 has 5 tokens, and the model takes 5 with the answer"
    ):
        generator(Counter(), max_positions=5).generate(prompts, config())
    with pytest.raises(ConfigError, match=r"^the prompt has 1 tokens"):
        generator(Counter(), max_positions=1).generate(prompts[:1], config())


def test_no_room_for_any_prompt_is_an_error() -> None:
    with pytest.raises(ConfigError, match="must be at least 1"):
        generator(Counter(), max_open=0)


@torch.no_grad()
def test_a_penalty_knows_prompt_and_answer() -> None:
    """Against transformers' processor, given all that was said."""
    process = pytest.importorskip("transformers").RepetitionPenaltyLogitsProcessor(1.3)
    model = aria().eval()
    found = generator(model).generate(PROMPTS, config(repetition_penalty=1.3))
    assert [answer.token_ids for answer in found] != decode(model, PROMPTS)
    for prompt, answer in zip(PROMPTS, found, strict=True):
        sequences = RepeatedSequences(model, COLLATOR)
        logits, said = sequences.add([prompt]), prompt.input_ids_T.tolist()
        for token in answer.token_ids:
            logits[:, IMAGE_TOKEN] = -torch.inf
            assert process(torch.tensor([said]), logits).argmax().item() == token
            said.append(token)
            logits = sequences.extend([token])


def calls_on_rank() -> tuple[list[list[int]], int]:
    model = Counter()
    prompts = [[text(18)], [text(25), text(15)]][torch.distributed.get_rank()]
    return decode(model, prompts), len(model.seen)


@pytest.mark.slow
def test_every_rank_runs_the_model_equally_often() -> None:
    assert run_ranks(calls_on_rank, 2) == [([[19]], 5), ([[26, 27, 28, 29], [16, 17, 18, 19]], 5)]
