"""Checkpoints across layouts: bits, not bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cantata.parallel.mesh import MeshConfig
from cantata.train.checkpoint import CheckpointConfig, Checkpointer, fingerprint
from cantata.train.fsdp2 import FSDP2Engine
from cantata.train.objectives import NextToken
from tests.distributed.spawn import run_ranks
from tests.distributed.standin import BALANCE
from tests.distributed.test_fsdp2 import TOTALS, build_engine, share, whole

pytestmark = pytest.mark.distributed

WORLD = MeshConfig(dp_replicate=1, dp_shard=-1, ep=1)
CONFIG = CheckpointConfig(every=1, keep=2, background=True, resume="auto", best=None)


def train(engine: FSDP2Engine, steps: int) -> None:
    batches = share()
    for _ in range(steps):
        for index, batch in enumerate(batches, start=1):
            engine.forward_backward(batch, NextToken(BALANCE), TOTALS, last=index == len(batches))
        engine.gradient_norm(1.0)
        engine.step(1.0)


def state_of(engine: FSDP2Engine) -> dict[str, Tensor]:
    return {name: whole(value) for name, value in engine.state_dict().items()}


def uninterrupted(run_dir: Path) -> dict[str, Any]:
    """Four steps; saved in the background after the second, while the third already changes the weights."""
    torch.manual_seed(100 + dist.get_rank())
    engine = build_engine(WORLD)
    checkpoints = Checkpointer(run_dir, CONFIG, fingerprint(engine.model))
    assert checkpoints.resume_from() is None
    train(engine, 2)
    saved = state_of(engine)
    rank = dist.get_rank()
    checkpoints.save(2, engine, {str(rank): {"position": 7 + rank}}, {"tokens": 320})
    draw = torch.rand(3)
    train(engine, 2)
    checkpoints.close()
    return {"saved": saved, "draw": draw, "end": state_of(engine)}


def resumed(run_dir: Path, steps: int, save_to: Path | None) -> dict[str, Any]:
    engine = build_engine(WORLD)
    checkpoints = Checkpointer(run_dir, CONFIG, fingerprint(engine.model))
    path = checkpoints.resume_from()
    assert path is not None
    document = checkpoints.load(path, engine)
    loaded, draw = state_of(engine), torch.rand(3)
    train(engine, steps)
    end = state_of(engine)
    if save_to is not None:
        other = Checkpointer(save_to, CONFIG, fingerprint(engine.model))
        other.save(document["step"] + steps, engine, {"0": None}, {})
        other.close()
    checkpoints.close()
    return {"document": document, "loaded": loaded, "draw": draw, "end": end}


def assert_equal(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert actual.keys() == wanted.keys()
    different = [name for name, value in wanted.items() if not torch.equal(actual[name], value)]
    assert not different


def test_resume_is_exact_on_the_same_layout_and_across_layouts(tmp_path: Path) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    first = run_ranks(uninterrupted, 2, two)
    assert (two / "LATEST").read_text() == "step-00000002\n"

    on_one = run_ranks(resumed, 1, two, 1, one)[0]
    assert_equal(on_one["loaded"], first[0]["saved"])
    assert on_one["document"]["loader"] == {"0": {"position": 7}, "1": {"position": 8}}
    assert on_one["document"]["extra"] == {"tokens": 320}
    assert on_one["document"]["world_size"] == 2

    on_two = run_ranks(resumed, 2, two, 2, None)
    for rank in range(2):
        assert_equal(on_two[rank]["loaded"], first[rank]["saved"])
        assert torch.equal(on_two[rank]["draw"], first[rank]["draw"])
        assert_equal(on_two[rank]["end"], first[rank]["end"])

    back_on_two = run_ranks(resumed, 2, one, 0, None)[0]
    assert_equal(back_on_two["loaded"], on_one["end"])


def full_disk(run_dir: Path) -> str:
    engine = build_engine(WORLD)
    checkpoints = Checkpointer(run_dir, CONFIG, fingerprint(engine.model))
    checkpoints.save(1, engine, {}, {})
    checkpoints.wait()
    if dist.get_rank() == 1:
        folder = run_dir / "checkpoints" / "step-00000002.incomplete"
        folder.mkdir()
        (folder / "__1_0.distcp").symlink_to("/dev/full")
    dist.barrier()
    checkpoints.save(2, engine, {}, {})
    try:
        checkpoints.close()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def test_one_ranks_full_disk_fails_the_save_on_every_rank(tmp_path: Path) -> None:
    messages = run_ranks(full_disk, 2, tmp_path)
    for message in messages:
        assert message.startswith("RunError: checkpoint of step 2 could not be written")
        assert "No space left on device" in message
        assert "(rank 1)" in message
        assert "\n" not in message
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
