"""Text to images: codes drawn one by one, in the form that images have, guided by what the text changes.

B  sequences that go on together    V  vocabulary    K  codes    h, w  rows and columns of codes
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cantata.core.errors import ConfigError
from cantata.core.samples import DataError, Sample
from cantata.data.collate.packed import PackedCollator
from cantata.infer.generate import evaluating
from cantata.infer.image_grammar import ImageGrammar
from cantata.infer.sampling import SamplingConfig, next_tokens
from cantata.infer.sequences import Sequences, open_sequences
from cantata.models.emu3.processor import Emu3Processor

NULL_PROMPT = ""
"""What guidance compares with; training shows it in place of some texts."""


class Drawing:
    """One image on its way.

    Args:
        grammar: its form.
        prompts: what it is drawn after: its text, and the null prompt where it is guided.
        seed: decides what is drawn.
    """

    def __init__(self, grammar: ImageGrammar, prompts: Sequence[Sample], seed: int) -> None:
        self.grammar = grammar
        self.prompts = prompts
        self.token_ids: list[int] = []
        self._random = random.Random(seed)

    @property
    def allowed(self) -> range:
        """The ids of which one comes next."""
        return self.grammar.allowed(len(self.token_ids))

    @property
    def is_done(self) -> bool:
        return len(self.token_ids) == self.grammar.num_tokens

    def draw(self) -> float:
        """The next number in [0, 1) of its own."""
        return self._random.random()


class ImageGenerator:
    """Draws images with one model.

    As the numbers of tokens follow from the sizes alone, ranks that share a model stay in step where all are
    given the same prompts and sizes.

    Args:
        model: a `cantata.models.protocol.LanguageModel`; one that is a `Decodes` keeps keys and values.
        collator: packs prompts, which its `Emu3Processor` encodes, for this model.
        max_positions: tokens that a prompt and its image may have together.
        max_open: images that are drawn at once.

    Raises `ConfigError` for another processor.
    """

    def __init__(
        self, model: nn.Module, collator: PackedCollator, *, max_positions: int, max_open: int
    ) -> None:
        if max_open < 1:
            raise ConfigError(f"{max_open} images at once; it must be at least 1")
        if not isinstance(collator.processor, Emu3Processor):
            raise ConfigError(f"{type(collator.processor).__name__} makes no tokens of images; Emu3's does")
        self._model = model
        self._collator = collator
        self._processor = collator.processor
        self._max_positions = max_positions
        self._max_open = max_open

    def generate(
        self,
        prompts: Sequence[str],
        sizes: Sequence[tuple[int, int]],
        guidance: float,
        config: SamplingConfig,
    ) -> list[NDArray[np.int64]]:
        """The codes of an image for each prompt, (h, w); none depends on the others.

        Args:
            prompts: texts.
            sizes: rows and columns of codes of each image.
            guidance: scale of classifier-free guidance (Ho and Salimans, 2022, arXiv:2207.12598), which draws
                from `uncond + guidance * (cond - uncond)` of the logits after the text and after the null
                prompt; 1 is without, at half the cost.
            config: its `temperature`, `top_k`, `top_p` and `seed`; sizes say how many tokens there are.

        Raises `ConfigError` for a size that is none or leaves the model's positions, and for settings that
        images have no use for.
        """
        if config.repetition_penalty != 1 or config.stop:
            raise ConfigError("an image has no stop texts and no repetition penalty; leave both out")
        if not 0 <= guidance < float("inf"):
            raise ConfigError(f"guidance={guidance} must be at least 0; 1 is without guidance")
        if len(prompts) != len(sizes):
            raise ConfigError(f"{len(prompts)} prompts and {len(sizes)} sizes; give each prompt one size")
        drawings = [
            self._drawing(index, text, size, guidance != 1, config.seed)
            for index, (text, size) in enumerate(zip(prompts, sizes, strict=True))
        ]
        with evaluating(self._model):
            run(open_sequences(self._model, self._collator), drawings, guidance, config, self._max_open)
        return [one.grammar.codes(one.token_ids) for one in drawings]

    def _drawing(self, index: int, text: str, size: tuple[int, int], is_guided: bool, seed: int) -> Drawing:
        try:
            texts = [text, NULL_PROMPT] if is_guided else [text]
            prompts = [self._processor.encode_image_prompt(one, *size) for one in texts]
        except DataError as error:
            raise ConfigError(f"image {index + 1}: {error}") from error
        grammar = ImageGrammar(*size, self._processor.tokens)
        total = len(prompts[0]) + grammar.num_tokens
        if total > self._max_positions:
            raise ConfigError(
                f"image {index + 1}: {size[0]} x {size[1]} codes and their text are {total} tokens, and the "
                f"model takes {self._max_positions}; draw a smaller one"
            )
        return Drawing(grammar, prompts, seed + index)


class Row(NamedTuple):
    """What a sequence is part of."""

    drawing: Drawing
    side: int
    """0: after the text, 1: after the null prompt."""


def run(
    sequences: Sequences, drawings: Sequence[Drawing], guidance: float, config: SamplingConfig, max_open: int
) -> None:
    """Draw all, at most `max_open` at once; one that is done makes room for the next."""
    waiting, rows = list(reversed(drawings)), list[Row]()
    while waiting or rows:
        room = max_open - len({row.drawing for row in rows})
        new = [waiting.pop() for _ in range(min(len(waiting), room))]
        if rows:
            _choose(rows, sequences.extend([row.drawing.token_ids[-1] for row in rows]), guidance, config)
        if new:
            added = [Row(one, side) for one in new for side in range(len(one.prompts))]
            logits_BV = sequences.add([row.drawing.prompts[row.side] for row in added])
            _choose(added, logits_BV, guidance, config)
            rows += added
        _leave(sequences, rows)


def _choose(rows: Sequence[Row], logits_BV: Tensor, guidance: float, config: SamplingConfig) -> None:
    """One more token for each drawing."""
    sides: dict[Drawing, dict[int, int]] = {}
    for index, row in enumerate(rows):
        sides.setdefault(row.drawing, {})[row.side] = index
    free = []
    for one in sides:
        if len(one.allowed) > 1:
            free.append(one)
        else:
            one.token_ids.append(one.allowed.start)
    if not free:
        return
    codes = free[0].allowed
    # The softmax over all tokens would shift a row by a constant, which the one over the codes takes out.
    logits_BK = logits_BV[:, codes.start : codes.stop].float()
    guided_BK = logits_BK[[sides[one][0] for one in free]]
    if len(free[0].prompts) > 1:
        free_BK = logits_BK[[sides[one][1] for one in free]]
        guided_BK = free_BK + guidance * (guided_BK - free_BK)
    draws_B = torch.tensor([one.draw() for one in free], dtype=torch.float64).to(guided_BK.device)
    for one, code in zip(free, next_tokens(guided_BK, None, draws_B, config).tolist(), strict=True):
        one.token_ids.append(codes[code])


def _leave(sequences: Sequences, rows: list[Row]) -> None:
    """Drop those that are done."""
    for index in reversed(range(len(rows))):
        if rows[index].drawing.is_done:
            sequences.remove(index)
            last = rows.pop()
            if index < len(rows):
                rows[index] = last
