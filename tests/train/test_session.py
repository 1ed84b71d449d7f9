"""A run that fails must end: nothing it started may keep its process alive."""

from __future__ import annotations

import gc
import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from cantata.train.fsdp2 import FSDP2Engine
from cantata.train.history import FILE
from tests.recipes.runner import pretrain


class Planted(Exception):
    """An error that something holds beyond the run, and with it every frame that it came through."""

    def __init__(self) -> None:
        self.held = self


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Interpreters exit without collecting first."""
    gc.disable()
    yield
    gc.enable()


def test_a_failed_step_ends_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_collection: None, capfd: Any
) -> None:
    started: list[Any] = []
    others = set(multiprocessing.active_children())

    def fail(*arguments: Any, **options: Any) -> NoReturn:
        started.extend(set(multiprocessing.active_children()) - others)
        raise Planted

    monkeypatch.setattr(FSDP2Engine, "forward_backward", fail)
    assert pretrain(tmp_path / "run", "data.num_workers=1") == 1
    assert "Planted" in capfd.readouterr().err
    start, end = map(json.loads, (tmp_path / "run" / FILE).read_text().splitlines())
    assert (start["event"], start["step"], start["origin"]) == ("start", 0, "from scratch")
    assert (end["outcome"], end["error"], end["exit_code"]) == ("failed", "Planted: Planted", 1)
    assert started, "no worker was there to end"
    for worker in started:
        worker.join(timeout=20)
        assert not worker.is_alive()
