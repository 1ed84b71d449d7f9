"""The pretraining recipe: what a user types, what is left behind, and with which exit code."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import torch

from cantata.core.errors import PREEMPTED
from tests.recipes.runner import final, metrics, pretrain, start, torchrun

CONTRACT = [
    "step",
    "loss",
    "grad_norm",
    "learning_rate",
    "tokens",
    "target_tokens",
    "tokens_per_second_per_device",
    "step_seconds",
    "data_seconds",
    "memory_gib",
    "mfu",
]


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 8 steps on one process."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert pretrain(out, "train.max_steps=8", "checkpoint.every=3", "train.eval_every=4") == 0
    return out


def test_a_run_leaves_what_the_contract_names(whole_run: Path) -> None:
    assert (whole_run / "LATEST").read_text() == "step-00000008\n"
    names = {path.name for path in (whole_run / "checkpoints").iterdir()}
    assert names == {"step-00000003", "step-00000006", "step-00000008"}
    for name in (
        "config.yaml",
        "logs/rank-0.log",
        "logs/startup.txt",
        "logs/history.jsonl",
        "samples/step-00000008.jsonl",
    ):
        assert (whole_run / name).is_file()


def test_metrics_lines_follow_the_contract(whole_run: Path) -> None:
    lines = metrics(whole_run)
    assert [line["step"] for line in lines] == list(range(1, 9))
    for line in lines:
        assert list(line)[: len(CONTRACT)] == CONTRACT
        assert math.isfinite(line["loss"])
        assert 0 < line["target_tokens"] < line["tokens"] <= 512 * line["step"]
    assert "eval/initial/loss" in lines[0]
    assert [line["step"] for line in lines if "eval/loss" in line] == [4, 8]
    assert lines[-1]["eval/loss"] < lines[0]["eval/initial/loss"]
    assert {"experts/load_max", "experts/dead_share", "experts/entropy"} <= lines[0].keys()
    assert "experts/entropy/image/layer_00" in lines[0]


def test_the_same_command_after_the_end_changes_nothing(whole_run: Path) -> None:
    before = (whole_run / "metrics.jsonl").read_text()
    assert pretrain(whole_run, "train.max_steps=8", "checkpoint.every=3", "train.eval_every=4") == 0
    assert (whole_run / "metrics.jsonl").read_text() == before


def test_a_longer_run_continues_a_finished_one_bit_for_bit(tmp_path: Path) -> None:
    constant = ("schedule=constant",)
    assert pretrain(tmp_path / "once", *constant, "train.max_steps=5") == 0
    assert pretrain(tmp_path / "twice", *constant, "train.max_steps=2") == 0
    assert pretrain(tmp_path / "twice", *constant, "train.max_steps=5") == 0
    same(final(tmp_path / "once"), final(tmp_path / "twice"))
    assert [line["step"] for line in metrics(tmp_path / "twice")] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_sigterm_saves_and_asks_to_be_run_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = start([], out, "train.max_steps=100000", "data.num_workers=1")
    wait_for(run, lambda: len(metrics(out)) >= 2)
    run.terminate()
    assert run.wait(timeout=60) == PREEMPTED
    run.communicate()
    last = metrics(out)[-1]["step"]
    assert (out / "LATEST").read_text().strip() == f"step-{last:08d}"


@pytest.mark.slow
def test_two_launchers_two_engines_one_curve(tmp_path: Path) -> None:
    """torchrun with fsdp2 and the deepspeed launcher with ZeRO-2, bf16, 50 steps: losses within 1%."""
    settings = ("train.max_steps=50", "engine.precision=bf16")
    finish(start(torchrun(2), tmp_path / "fsdp2", "engine=fsdp2", *settings))
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    finish(start(launcher, tmp_path / "zero", "engine=deepspeed", "engine.zero_stage=2", *settings))
    left = [line["loss"] for line in metrics(tmp_path / "fsdp2")]
    right = [line["loss"] for line in metrics(tmp_path / "zero")]
    assert len(left) == len(right) == 50
    assert left[-1] < left[0] - 0.5
    assert max(abs(a - b) / a for a, b in zip(left, right, strict=True)) < 0.01


@pytest.mark.slow
def test_accelerate_launches_the_recipe(tmp_path: Path) -> None:
    config = Path(__file__).parents[2] / "launch" / "accelerate" / "fsdp2.yaml"
    launcher = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        "--num_processes",
        "2",
        "--cpu",
    ]
    finish(start(launcher, tmp_path / "run", "train.max_steps=2"))
    assert len(metrics(tmp_path / "run")) == 2


@pytest.mark.slow
def test_another_number_of_ranks_or_another_engine_continues_the_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = ("schedule=constant", "checkpoint.background=false")
    assert pretrain(out, *settings, "train.max_steps=2") == 0
    assert pretrain(out, *settings, "train.max_steps=4", "engine=deepspeed", "engine.zero_stage=1") == 0
    assert pretrain(tmp_path / "one", *settings, "train.max_steps=4") == 0
    changed = final(out)
    # A key's bias moves all scores alike: its true gradient is 0, and Adam makes steps of the rounding.
    noise = ("k_proj.bias", "in_proj_bias")
    for name, tensor in final(tmp_path / "one").items():
        if name.startswith("model.") and not name.endswith(noise):
            # Two engines, two orders of fp32 sums: equal to rounding, not to the bit.
            torch.testing.assert_close(changed[name], tensor, rtol=1e-4, atol=1e-6)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(run, condition, seconds: float = 120.0) -> None:  # type: ignore[no-untyped-def]
    """Until the condition holds; the run must not end before."""
    end = time.monotonic() + seconds
    while not condition():
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < end, "the run does not get there"
        time.sleep(0.002)


def finish(run, seconds: float = 300.0) -> None:  # type: ignore[no-untyped-def]
    text, _ = run.communicate(timeout=seconds)
    assert run.returncode == 0, text
