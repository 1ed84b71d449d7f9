"""A line of metrics speaks for every step since the last one."""

import json

import pytest
import torch

from cantata.core.types import StepTotals
from cantata.train.loop import Progress, StepResult
from cantata.train.window import Device, Window

CPU = Device(torch.device("cpu"), world_size=2, flops_per_token=lambda length: 100 + length)
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


def result(step: int, seed: int | None = None) -> StepResult:
    generator = torch.Generator().manual_seed(step if seed is None else seed)
    targets_M = torch.tensor([10.0 * step, 5.0, 0.0], dtype=torch.float64)
    loss_sum_M = torch.rand(3, generator=generator, dtype=torch.float64) * targets_M
    return StepResult(
        progress=Progress(step, 1000 * step, 500 * step),
        totals=StepTotals(1000, int(targets_M.sum()), float(targets_M.sum())),
        sums={
            "loss_sum": loss_sum_M.sum(),
            "loss_sum_M": loss_sum_M,
            "targets_M": targets_M,
            "target_weight_M": targets_M,
            "squared_lengths": torch.tensor(50_000.0, dtype=torch.float64),
            "router/aux_loss_L": torch.tensor([600.0 * step, 800.0], dtype=torch.float64),
            "router/aux_loss_LM": torch.tensor([[900.0, 0, 0], [300.0, 0, 0]], dtype=torch.float64),
            "router/z_loss_L": torch.tensor([500.0, 500.0], dtype=torch.float64),
            "router/tokens_M": torch.tensor([1000.0, 0, 0], dtype=torch.float64),
            "tokens_per_expert_LME": torch.randint(0, 9, (2, 3, 4), generator=generator).double(),
            "stop": torch.tensor(0.0, dtype=torch.float64),
        },
        grad_norm=float(step),
        learning_rate_factor=1 / step,
        step_seconds=2.0 * step,
        data_seconds=0.5,
    )


def line(window: Window, *steps: int) -> dict[str, float | int | None]:
    for step in steps:
        window.add(result(step))
    return window.record(result(steps[-1]), base_learning_rate=0.3)


def test_the_contract_comes_first_and_in_order() -> None:
    record = line(Window(CPU), 1)
    assert list(record)[: len(CONTRACT)] == CONTRACT
    assert "experts/load_max/layer_01" in record
    assert record["mfu"] is None


def test_losses_weigh_every_target_of_the_window_alike() -> None:
    record = line(Window(CPU), 1, 2, 3)
    sums = [result(step).sums for step in (1, 2, 3)]
    losses, targets = sum(s["loss_sum_M"] for s in sums), sum(s["targets_M"] for s in sums)
    assert record["loss"] == pytest.approx(losses.sum().item() / targets.sum().item(), rel=1e-14)
    assert record["loss/text"] == pytest.approx(losses[0].item() / targets[0].item(), rel=1e-14)
    assert "loss/video" not in record
    assert record["router/aux_loss"] == pytest.approx((600 * (1 + 2 + 3) + 3 * 800) / 2 / 3000)
    assert record["router/aux_loss/text"] == pytest.approx(0.6)
    assert "router/aux_loss/image" not in record
    assert record["router/z_loss"] == 0.5


def test_seconds_are_means_and_the_rest_is_of_the_logged_step() -> None:
    record = line(Window(CPU), 1, 2, 3)
    assert record["step_seconds"] == 4.0
    assert record["data_seconds"] == 0.5
    assert record["tokens_per_second_per_device"] == 3 * 1000 / 12 / 2
    assert (record["step"], record["tokens"], record["target_tokens"]) == (3, 3000, 1500)
    assert record["grad_norm"] == 3.0
    assert record["learning_rate"] == pytest.approx(0.1)
    assert 0.01 < (record["memory_gib"] or 0) < 1000


def test_a_known_device_has_utilisation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cantata.train.window.device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    # 1000 tokens of 100 + 50 operations (mean sample length 50_000 / 1000) in 2 s on 2 devices.
    assert line(Window(CPU), 1)["mfu"] == pytest.approx(1000 * 150 / (2 * 2 * 312e12))


def test_a_window_starts_anew_after_its_line() -> None:
    window = Window(CPU)
    line(window, 1, 2)
    again, fresh = line(window, 3), line(Window(CPU), 3)
    assert {**again, "memory_gib": 0} == {**fresh, "memory_gib": 0}


def test_a_checkpoint_inside_a_window_changes_no_loss() -> None:
    whole = line(Window(CPU), 1, 2, 3)
    before, after = Window(CPU), Window(CPU)
    before.add(result(1))
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    resumed = line(after, 2, 3)
    timed = {"step_seconds", "tokens_per_second_per_device", "memory_gib"}
    assert {name: value for name, value in resumed.items() if name not in timed} == {
        name: value for name, value in whole.items() if name not in timed
    }
    # Only what this process ran is timed.
    assert resumed["step_seconds"] == 5.0
    assert resumed["tokens_per_second_per_device"] == 2 * 1000 / 10 / 2
