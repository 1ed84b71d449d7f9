"""Loggers receive what `metrics.jsonl` receives, and stay one run over restarts."""

import json
import struct
from pathlib import Path

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cantata.core.errors import ConfigError
from cantata.train.loggers import LoggerConfig, open_sinks

NOTHING = LoggerConfig(wandb=False, tensorboard=False)


def test_only_rank_0_writes(tmp_path: Path) -> None:
    sinks = open_sinks(LoggerConfig(wandb=True, tensorboard=True), tmp_path, "run", {}, None, rank=1)
    sinks.write({"step": 1, "loss": 1.0})
    sinks.close()
    assert list(tmp_path.iterdir()) == []


def test_metrics_are_always_written(tmp_path: Path) -> None:
    sinks = open_sinks(NOTHING, tmp_path, "run", {}, None, rank=0)
    sinks.write({"step": 1, "loss": 1.0})
    sinks.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 1.0}
    assert sinks.notices == []


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_missing_package_names_its_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"logger\.{package}=true .* pip install 'cantata\[{package}\]'"):
        LoggerConfig(wandb=package == "wandb", tensorboard=package == "tensorboard")
    assert LoggerConfig(wandb=False, tensorboard=False) == NOTHING


def test_tensorboard_continues_where_the_run_resumes(tmp_path: Path) -> None:
    config = LoggerConfig(wandb=False, tensorboard=True)
    first = open_sinks(config, tmp_path, "run", {}, None, rank=0)
    for step in range(1, 6):
        first.write({"step": step, "loss": 1.0, "mfu": None})
    first.close()
    second = open_sinks(config, tmp_path, "run", {}, 3, rank=0)
    for step in range(4, 8):
        second.write({"step": step, "loss": 2.0, "mfu": None})
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        *((step, 1.0) for step in range(1, 4)),
        *((step, 2.0) for step in range(4, 8)),
    ]
    assert str(tmp_path / "tensorboard") in second.notices[0]


def test_wandb_offline_is_one_run_over_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr("wandb.login", lambda **options: False)
    config = LoggerConfig(wandb=True, tensorboard=False)
    for resume_step in (None, 2):
        sinks = open_sinks(config, tmp_path, "run", {"train": {"max_steps": 7}}, resume_step, rank=0)
        sinks.write({"step": 3, "loss": 0.5, "mfu": None})
        sinks.close()
        assert "wandb sync --append" in sinks.notices[0]
    # The service that writes the files ends here, and with it everything is on disk.
    wandb.teardown()
    run_id = (tmp_path / "wandb" / "run_id").read_text()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert files
    assert {file.name for file in files} == {f"run-{run_id}.wandb"}
    history = read_wandb(files[-1])
    assert history["step"] == 3
    assert history["loss"] == 0.5
    assert "mfu" not in history
    assert b"max_steps" in files[-1].read_bytes()


def read_wandb(path: Path) -> dict[str, float]:
    """Values of the last history line of an offline run: a LevelDB log of small records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position = path.read_bytes(), 7
    values: dict[str, float] = {}
    while position < len(data):
        length = struct.unpack_from("<H", data, position + 4)[0]
        record = Record()
        record.ParseFromString(data[position + 7 : position + 7 + length])
        position += 7 + length
        for item in record.history.item:
            values["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return values
