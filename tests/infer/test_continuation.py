"""One prompt on its way: what it counts, draws and remembers. The loop is tested in `test_generate`."""

from __future__ import annotations

import torch

from cantata.infer.continuation import Continuation
from tests.infer.test_generate import STOP, text

CPU = torch.device("cpu")


def one(index: int = 0, room: int = 3, seed: int = 0) -> Continuation:
    return Continuation(index, text(5, 7), room, seed, (STOP,))


def test_it_ends_at_a_stop_or_when_its_room_is_used_up() -> None:
    stopped, full = one(), one(room=2)
    for token in (8, STOP, 9):
        stopped.take(token)
    for token in (8, 9, 10):
        full.take(token)
    assert (stopped.token_ids, stopped.is_done, stopped.is_complete) == ([8], True, True)
    assert (full.token_ids, full.is_done, full.is_complete) == ([8, 9], True, False)
    assert full.last_token == 10


def test_it_remembers_its_prompt_and_what_was_added() -> None:
    continuation = one()
    assert continuation.seen(10, CPU).nonzero().flatten().tolist() == [5, 7]
    for token in (3, 7):
        continuation.take(token)
        continuation.seen(10, CPU)
    assert continuation.seen(10, CPU).nonzero().flatten().tolist() == [3, 5, 7]


def test_its_draws_are_its_places_own() -> None:
    draws = [
        [continuation.draw() for _ in range(3)] for continuation in (one(0), one(0), one(1), one(0, seed=1))
    ]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    # The seed and the place count alike, so that a prompt can be decoded alone as in its batch.
    assert draws[2] == draws[3]
    assert all(0 <= value < 1 for value in draws[0])
