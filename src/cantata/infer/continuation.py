"""One prompt on its way to an answer, and the loop that many of them share.

B  sequences that go on together    V  vocabulary
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from cantata.core import dist
from cantata.core.samples import Sample
from cantata.infer.sampling import SamplingConfig, next_tokens
from cantata.infer.sequences import Sequences
from cantata.infer.text import TextStream

Listener = Callable[[int, str, bool], None]
"""Hears the place of a prompt, a piece of its text that is final, and whether it was the last one."""


class Continuation:
    """What a prompt has become so far.

    Args:
        index: its place among all prompts.
        prompt: what is continued.
        room: most tokens to add.
        seed: with `index`, decides what is drawn.
        stop_token_ids: tokens that end it.
        stream: makes text of the tokens; None where nobody wants text.
        listen: hears of the text.
    """

    def __init__(
        self,
        index: int,
        prompt: Sample,
        room: int,
        seed: int,
        stop_token_ids: Collection[int],
        stream: TextStream | None = None,
        listen: Listener | None = None,
    ) -> None:
        self.prompt = prompt
        self.token_ids: list[int] = []
        """The tokens added, without a stop token."""
        self.last_token = -1
        self.text = ""
        self.is_done = self.is_complete = False
        """Whether it has ended, and whether that was at a stop."""
        self._index = index
        self._room = room
        self._random = random.Random(seed + index)
        self._stop_token_ids = stop_token_ids
        self._stream = stream
        self._listen = listen
        self._seen_V: Tensor | None = None

    def draw(self) -> float:
        """The next number in [0, 1) of its own."""
        return self._random.random()

    def seen(self, size: int, device: torch.device) -> Tensor:
        """Which of `size` tokens it holds, its prompt's included: bool, (V,)."""
        if self._seen_V is None:
            self._seen_V = torch.zeros(size, dtype=torch.bool, device=device)
            self._seen_V[torch.from_numpy(self.prompt.input_ids_T).to(device).long()] = True
        if self.token_ids:
            self._seen_V[self.token_ids[-1]] = True
        return self._seen_V

    def take(self, token: int) -> None:
        """Go on with a token; one that has ended stays as it is."""
        self.last_token = token
        if self.is_done:
            return
        piece = ""
        self.is_complete = token in self._stop_token_ids
        if not self.is_complete:
            self.token_ids.append(token)
            if self._stream is not None:
                piece = self._stream.add(token)
                self.is_complete = self._stream.is_stopped
        self.is_done = self.is_complete or len(self.token_ids) == self._room
        if self._stream is not None and self.is_done:
            piece += self._stream.finish()
        self.text += piece
        if self._listen is not None and (piece or self.is_done):
            self._listen(self._index, piece, self.is_done)


def run(
    sequences: Sequences,
    continuations: Sequence[Continuation],
    config: SamplingConfig,
    image_token_id: int,
    max_open: int,
) -> None:
    """Continue all to their ends, at most `max_open` at once; one that ends makes room for the next.

    With several ranks this is a collective, for which `max_open` must take in all of a rank's at once.
    """
    waiting, open_ = list(reversed(continuations)), list[Continuation]()
    while True:
        new = [waiting.pop() for _ in range(min(len(waiting), max_open - len(open_)))]
        if new:
            _choose(new, sequences.add([one.prompt for one in new]), config, image_token_id)
            open_ += new
            _leave(sequences, open_, keep_one=not waiting)
        is_going = bool(waiting) or any(not one.is_done for one in open_)
        if dist.all_reduce_sum([float(is_going)])[0] == 0:
            return
        if open_:
            logits_BV = sequences.extend([one.last_token for one in open_])
            _choose(open_, logits_BV, config, image_token_id)
            _leave(sequences, open_, keep_one=not waiting)


def _choose(
    ones: Sequence[Continuation], logits_BV: Tensor, config: SamplingConfig, image_token_id: int
) -> None:
    logits_BV = logits_BV.float()
    if 0 <= image_token_id < logits_BV.shape[1]:
        # It would stand for an image that is not there; some families' heads cannot write it.
        logits_BV[:, image_token_id] = -torch.inf
    seen_BV = None
    if config.repetition_penalty != 1:
        seen_BV = torch.stack([one.seen(logits_BV.shape[1], logits_BV.device) for one in ones])
    draws_B = torch.tensor([one.draw() for one in ones], dtype=torch.float64).to(logits_BV.device)
    for one, token in zip(ones, next_tokens(logits_BV, seen_BV, draws_B, config).tolist(), strict=True):
        one.take(token)


def _leave(sequences: Sequences, open_: list[Continuation], keep_one: bool) -> None:
    """Drop those that have ended. The last one of all goes on: sharded models run on all ranks or none."""
    for index in reversed(range(len(open_))):
        if open_[index].is_done and not (keep_one and len(open_) == 1):
            sequences.remove(index)
            last = open_.pop()
            if index < len(open_):
                open_[index] = last
