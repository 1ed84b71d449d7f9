"""Generation: prompts in, tokens and text out, many at a time.

Prompts are taken in as others end, up to `max_open` at once; each is drawn for and ends by itself, so what it
becomes does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from cantata.core.errors import ConfigError
from cantata.core.samples import Sample
from cantata.data.collate.packed import PackedCollator
from cantata.infer.continuation import Continuation, Listener, run
from cantata.infer.sampling import SamplingConfig
from cantata.infer.sequences import open_sequences
from cantata.infer.text import TextStream


class Generated(NamedTuple):
    """What a prompt was continued with."""

    token_ids: list[int]
    """Without a stop token; with those that spell a stop text."""
    text: str
    """Without special tokens, up to a stop text."""
    is_complete: bool
    """Whether it came to a stop, not to the limit of tokens."""


class Generator:
    """Continues prompts with one model.

    Args:
        model: a `cantata.models.protocol.LanguageModel`; one that is a `Decodes` keeps keys and values.
        collator: packs prompts, which its processor encodes (`encode_prompt`), for this model.
        max_positions: tokens that a prompt and its continuation may have together.
        max_open: prompts that go on at once.
    """

    def __init__(
        self, model: nn.Module, collator: PackedCollator, *, max_positions: int, max_open: int
    ) -> None:
        if max_open < 1:
            raise ConfigError(f"{max_open} prompts at once; it must be at least 1")
        self._model = model
        self._collator = collator
        self._max_positions = max_positions
        self._max_open = max_open

    def generate(
        self, prompts: Sequence[Sample], config: SamplingConfig, listen: Listener | None = None
    ) -> list[Generated]:
        """Continue each prompt, up to a stop, `config.max_new_tokens` or the model's last position.

        Raises `ConfigError` for a prompt that is empty or leaves no room for an answer.
        """
        check_lengths(prompts, self._max_positions)
        processor = self._collator.processor
        streams = [TextStream(processor.decode, processor.spell, config.stop) for _ in prompts]
        rooms = [min(config.max_new_tokens, self._max_positions - len(prompt)) for prompt in prompts]
        continuations = [
            Continuation(index, prompt, room, config.seed, processor.stop_token_ids, stream, listen)
            for index, (prompt, room, stream) in enumerate(zip(prompts, rooms, streams, strict=True))
        ]
        sequences = open_sequences(self._model, self._collator)
        with evaluating(self._model):
            run(sequences, continuations, config, processor.image_token_id, self._max_open)
        return [Generated(one.token_ids, one.text, one.is_complete) for one in continuations]


def check_lengths(prompts: Sequence[Sample], max_positions: int) -> None:
    """Raise `ConfigError` for a prompt that is empty or leaves no room for an answer."""
    for number, prompt in enumerate(prompts, 1):
        which = f"prompt {number} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
        if not len(prompt):
            raise ConfigError(f"{which} is empty, and there is nothing to go on with; give it some text")
        if len(prompt) >= max_positions:
            raise ConfigError(
                f"{which} has {len(prompt)} tokens, and the model takes {max_positions} with the answer; "
                "shorten it, or give fewer or smaller images"
            )


def generate(
    model: nn.Module,
    collator: PackedCollator,
    prompts: Sequence[Sample],
    *,
    max_new_tokens: int,
    stop_token_ids: Collection[int],
    temperature: float,
    seed: int,
) -> list[list[int]]:
    """Continue each prompt while a model trains; returns its new tokens, without the stop token.

    A prompt's continuation does not depend on the other prompts. With several ranks this is a collective:
    each decodes its own prompts (at least one), and all run the model until the last of them is done.

    Args:
        model: a `cantata.models.protocol.LanguageModel`, wrapped by an engine or not.
        prompts: from the processor's `encode_prompt`.
        max_new_tokens: most tokens to add to each.
        stop_token_ids: tokens that end a continuation, such as the processor's `stop_token_ids`.
        temperature: 0 takes the likeliest token; above 0 draws from `softmax(logits / temperature)`.
        seed: decides what is drawn, for each prompt by its place in `prompts`.
    """
    if not prompts:
        raise ValueError("generate: no prompt; every rank needs at least one")
    config = SamplingConfig(max_new_tokens, temperature, 0, 1.0, 1.0, (), seed)
    continuations = [
        Continuation(index, prompt, max_new_tokens, seed, stop_token_ids)
        for index, prompt in enumerate(prompts)
    ]
    with evaluating(model):
        sequences = open_sequences(model, collator)
        run(sequences, continuations, config, collator.processor.image_token_id, len(prompts))
    return [one.token_ids for one in continuations]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without gradients, and as it was afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
