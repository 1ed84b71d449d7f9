"""One process: what lies on disk after good saves, failed saves, kills and mischief."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cantata.core.errors import ConfigError, RunError
from cantata.train.checkpoint import CheckpointConfig, Checkpointer

FINGERPRINT = "abc"


class TensorEngine:
    """As much of an engine as a checkpoint sees."""

    def __init__(self, value: float, **shapes: tuple[int, ...]) -> None:
        shapes = shapes or {"model.w": (4, 3), "optimizer.w.exp_avg": (4, 3), "optimizer.w.step": ()}
        self.tensors = {name: torch.full(shape, value) for name, shape in shapes.items()}

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.tensors)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.tensors = dict(state)


def engine(value: float, **shapes: tuple[int, ...]) -> Any:
    return TensorEngine(value, **shapes)


def config(**changes: Any) -> CheckpointConfig:
    settings: dict[str, Any] = {"every": 1, "keep": 2, "background": False, "resume": "auto", "best": None}
    return CheckpointConfig(**(settings | changes))


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.fixture(autouse=True)
def _process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Checkpointer]:
    made = Checkpointer(tmp_path, config(), FINGERPRINT)
    yield made
    made.close()


def test_saves_come_back_and_only_the_newest_are_kept(tmp_path: Path, checkpoints: Checkpointer) -> None:
    assert checkpoints.latest() is None
    for step in (1, 2, 10):
        checkpoints.save(step, engine(step), {"0": {"position": step}}, {"tokens": 5 * step})
    assert names(tmp_path) == ["step-00000002", "step-00000010"]
    assert (tmp_path / "LATEST").read_text() == "step-00000010\n"
    path = checkpoints.latest()
    assert path == tmp_path / "checkpoints" / "step-00000010"
    loaded = engine(0)
    document = checkpoints.load(path, loaded)
    assert document["step"] == 10
    assert document["loader"] == {"0": {"position": 10}}
    assert document["extra"] == {"tokens": 50}
    assert all(torch.equal(value, torch.full_like(value, 10)) for value in loaded.tensors.values())


def test_random_generators_come_back(checkpoints: Checkpointer) -> None:
    random.gauss(0.0, 1.0)
    checkpoints.save(1, engine(1), {}, {})
    drawn = (torch.rand(3), random.gauss(0.0, 1.0), random.random())
    path = checkpoints.latest()
    assert path is not None
    checkpoints.load(path, engine(0))
    assert torch.equal(torch.rand(3), drawn[0])
    assert (random.gauss(0.0, 1.0), random.random()) == drawn[1:]


def test_background_saves_hold_the_values_of_their_moment(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path, config(background=True), FINGERPRINT)
    saved = engine(1)
    checkpoints.save(1, saved, {}, {})
    for value in saved.tensors.values():
        value.fill_(9)
    checkpoints.close()
    loaded = engine(0)
    checkpoints.load(tmp_path / "checkpoints" / "step-00000001", loaded)
    assert all(torch.equal(value, torch.full_like(value, 1)) for value in loaded.tensors.values())


def test_a_step_saved_twice_is_written_once(tmp_path: Path, checkpoints: Checkpointer) -> None:
    assert checkpoints.save(1, engine(1), {}, {})
    before = (tmp_path / "checkpoints" / "step-00000001" / "state.json").stat()
    assert not checkpoints.save(1, engine(2), {}, {})
    assert (tmp_path / "checkpoints" / "step-00000001" / "state.json").stat() == before


def test_a_published_checkpoint_is_never_overwritten(tmp_path: Path, checkpoints: Checkpointer) -> None:
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    with pytest.raises(RunError, match="never overwritten"):
        checkpoints.save(3, engine(1), {}, {})
    assert names(tmp_path) == ["step-00000003"]


def test_leftovers_of_a_kill_are_removed_and_damaged_ones_not_chosen(tmp_path: Path) -> None:
    first = Checkpointer(tmp_path, config(), FINGERPRINT)
    first.save(1, engine(1), {}, {})
    first.save(2, engine(2), {}, {})
    first.close()
    (tmp_path / "checkpoints" / "step-00000002" / "state.json").unlink()
    (tmp_path / "checkpoints" / "step-00000003.incomplete").mkdir()
    second = Checkpointer(tmp_path, config(), FINGERPRINT)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert second.latest() == tmp_path / "checkpoints" / "step-00000001"
    second.close()


@pytest.mark.parametrize("victim", ["__0_0.distcp", "state.json"])
@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_survives(
    tmp_path: Path, victim: str, background: bool
) -> None:
    checkpoints = Checkpointer(tmp_path, config(background=background), FINGERPRINT)
    checkpoints.save(1, engine(1), {}, {})
    checkpoints.wait()
    folder = tmp_path / "checkpoints" / "step-00000002.incomplete"
    folder.mkdir()
    (folder / victim).symlink_to("/dev/full")
    told = rf"step 2 .*: {victim}: No space left on device.*step-00000001"
    with pytest.raises(RunError, match=told) as caught:  # noqa: PT012
        checkpoints.save(2, engine(2), {}, {})
        assert background, "a blocking save must fail at once"
        wait([checkpoints._pending])
        assert not checkpoints.is_saved
        checkpoints.save(3, engine(3), {}, {})
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["step-00000001"]
    checkpoints.save(2, engine(2), {}, {})
    checkpoints.close()
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"model.w": (4, 3), "model.v": (2,)}, r"lacks model\.v; it also holds optimizer\.w\.exp_avg"),
        (
            {"model.w": (4, 5), "optimizer.w.exp_avg": (4, 3), "optimizer.w.step": ()},
            r"model\.w is \(4, 3\) there and \(4, 5\) here",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_untouched(
    checkpoints: Checkpointer, shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    checkpoints.save(1, engine(1), {}, {})
    path = checkpoints.latest()
    assert path is not None
    other = engine(7, **shapes)
    with pytest.raises(ConfigError, match=message):
        checkpoints.load(path, other)
    assert all(torch.equal(value, torch.full_like(value, 7)) for value in other.tensors.values())


def test_a_damaged_shard_is_one_line(tmp_path: Path, checkpoints: Checkpointer) -> None:
    checkpoints.save(1, engine(1), {}, {})
    path = tmp_path / "checkpoints" / "step-00000001"
    shard = path / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(RunError, match="cannot be read") as caught:
        checkpoints.load(path, engine(0))
    assert "\n" not in str(caught.value)


def flip(path: Path) -> None:
    """Turn one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path, config(keep=3), FINGERPRINT)
    for step in (1, 2, 3):
        checkpoints.save(step, engine(step), {}, {}, best=step == 3)
    checkpoints.close()
    folder = tmp_path / "checkpoints"
    flip(folder / "step-00000003" / "__0_0.distcp")
    (folder / "step-00000002" / "state.json").unlink()

    again, told = Checkpointer(tmp_path, config(keep=3), FINGERPRINT), []
    assert again.resume_from(told.append) == folder / "step-00000001"
    assert names(tmp_path) == ["step-00000001", "step-00000002.damaged", "step-00000003.damaged"]
    assert told == [
        f"{folder / 'step-00000003'} is damaged (__0_0.distcp does not match its checksum): it is kept as "
        "step-00000003.damaged, and the run goes on from step-00000001",
        f"{folder / 'step-00000002'} is damaged (state.json is not there): it is kept as "
        "step-00000002.damaged, and the run goes on from step-00000001",
    ]
    assert (tmp_path / "LATEST").read_text() == "step-00000001\n"
    assert not (tmp_path / "BEST").exists()
    again.save(2, engine(2), {}, {})
    again.save(3, engine(3), {}, {})
    again.close()
    flip(folder / "step-00000003" / "state.json")
    third = Checkpointer(tmp_path, config(keep=3), FINGERPRINT)
    assert third.resume_from(told.append) == folder / "step-00000002"
    assert "step-00000003.damaged1" in names(tmp_path)
    third.close()


def test_without_a_sound_checkpoint_nothing_is_touched(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path, config(), FINGERPRINT)
    checkpoints.save(1, engine(1), {}, {})
    checkpoints.close()
    path = tmp_path / "checkpoints" / "step-00000001"
    flip(path / "__0_0.distcp")
    again = Checkpointer(tmp_path, config(), FINGERPRINT)
    with pytest.raises(RunError, match=r"no sound checkpoint .*step-00000001: __0_0\.distcp does not match"):
        again.resume_from()
    again.close()
    assert names(tmp_path) == ["step-00000001"]
    elsewhere = Checkpointer(tmp_path / "new", config(resume=str(path)), FINGERPRINT)
    with pytest.raises(RunError, match=r"checkpoint\.resume=.* is damaged \(__0_0\.distcp .*name another"):
        elsewhere.resume_from()
    elsewhere.close()


def test_an_old_checkpoint_without_sums_is_used_and_said_to_be(tmp_path: Path) -> None:
    checkpoints, told = Checkpointer(tmp_path, config(), FINGERPRINT), []
    checkpoints.save(1, engine(1), {}, {})
    path = tmp_path / "checkpoints" / "step-00000001"
    (path / "checksums.json").unlink()
    assert checkpoints.resume_from(told.append) == path
    assert told == [f"{path} was saved without checksums by an older version: damage would not be seen"]
    checkpoints.close()


def test_resume_settings_that_do_not_fit(tmp_path: Path) -> None:
    first = Checkpointer(tmp_path, config(), FINGERPRINT)
    first.save(1, engine(1), {}, {})
    first.save(2, engine(2), {}, {})
    first.close()
    with pytest.raises(ConfigError, match="resume=never"):
        Checkpointer(tmp_path, config(resume="never"), FINGERPRINT)
    with pytest.raises(ConfigError, match="not a complete checkpoint"):
        Checkpointer(tmp_path / "empty", config(resume=str(tmp_path)), FINGERPRINT)
    again = Checkpointer(
        tmp_path, config(resume=str(tmp_path / "checkpoints" / "step-00000001")), FINGERPRINT
    )
    # A preempted run is started by the same command again: what it has done since comes first.
    assert again.resume_from() == again.latest() != tmp_path / "checkpoints" / "step-00000001"
    again.close()
    elsewhere = Checkpointer(
        tmp_path / "new", config(resume=str(tmp_path / "checkpoints" / "step-00000001")), FINGERPRINT
    )
    assert elsewhere.resume_from() == tmp_path / "checkpoints" / "step-00000001"
    elsewhere.close()


@pytest.mark.parametrize("changes", [{"every": -1}, {"keep": 0}])
def test_config_is_checked(changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"checkpoint.{next(iter(changes))}"):
        config(**changes)


def hang_in_second_save(run_dir: str) -> None:
    """Run by the next test in a process of its own: stands still with a shard half-written."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    checkpoints = Checkpointer(Path(run_dir), config(), FINGERPRINT)
    checkpoints.save(1, engine(1), {}, {})
    folder = Path(run_dir) / "checkpoints" / "step-00000002.incomplete"
    folder.mkdir()
    # Opening a pipe that nobody reads blocks for ever.
    os.mkfifo(folder / "__0_0.distcp")
    (Path(run_dir) / "ready").touch()
    checkpoints.save(2, engine(2), {}, {})


def test_kill_during_a_save_and_the_lock(tmp_path: Path) -> None:
    code = f"from {__name__} import hang_in_second_save as run; run({str(tmp_path)!r})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert process.poll() is None, "the other process ended early"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(ConfigError, match=f"in use by pid {process.pid}"):
        Checkpointer(tmp_path, config(), FINGERPRINT)
    assert names(tmp_path) == ["step-00000001", "step-00000002.incomplete"], "a live run's save was touched"
    process.send_signal(signal.SIGKILL)
    process.wait()

    again = Checkpointer(tmp_path, config(), FINGERPRINT)
    assert names(tmp_path) == ["step-00000001"]
    path = again.resume_from()
    loaded = engine(0)
    assert path is not None
    assert again.load(path, loaded)["step"] == 1
    assert torch.equal(loaded.tensors["model.w"], torch.ones(4, 3))
    again.close()
