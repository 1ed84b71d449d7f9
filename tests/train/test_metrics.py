"""`metrics.jsonl` goes on without gap or repeat, and sums over ranks are exact."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cantata.core.errors import RunError
from cantata.train.metrics import MetricsFile, StepSums, evaluation_metrics, loss_metrics
from tests.distributed.spawn import run_ranks


def lines(path: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_steps(path: Path, first: int, last: int, resume_step: int | None, tag: float) -> None:
    file = MetricsFile(path, resume_step)
    for step in range(first, last + 1):
        file.write({"step": step, "loss": tag})
    file.close()


def test_a_resumed_file_has_every_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 7, None, tag=1.0)
    write_steps(path, 5, 9, 4, tag=2.0)
    assert [line["step"] for line in lines(path)] == list(range(1, 10))
    assert [line["loss"] for line in lines(path)] == [1.0] * 4 + [2.0] * 5


@given(cut=st.integers(0, 300), resume_step=st.integers(0, 8))
def test_a_cut_file_continues(tmp_path_factory: pytest.TempPathFactory, cut: int, resume_step: int) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    write_steps(path, 1, 8, None, tag=1.0)
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    survived = whole[:cut].count(b"\n")
    write_steps(path, resume_step + 1, 9, resume_step, tag=2.0)
    kept = min(survived, resume_step)
    assert [line["step"] for line in lines(path)] == [*range(1, kept + 1), *range(resume_step + 1, 10)]


def test_from_scratch_empties_the_file_and_an_exact_prefix_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 3, None, tag=1.0)
    inode = path.stat().st_ino
    MetricsFile(path, 3).close()
    assert path.stat().st_ino == inode
    MetricsFile(path, None).close()
    assert path.read_text() == ""
    assert list(tmp_path.iterdir()) == [path]


def test_a_line_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", None)
    file.write({"step": 1, "loss": 0.5})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]


def test_values_that_are_not_finite_become_null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", None)
    file.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "mfu": None, "tokens": 12})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "mfu": None,
        "tokens": 12,
    }


def test_floats_survive_to_the_last_bit(tmp_path: Path) -> None:
    value = torch.rand(1, dtype=torch.float64).item() / 3
    file = MetricsFile(tmp_path / "metrics.jsonl", None)
    file.write({"step": 1, "loss": value})
    assert lines(tmp_path / "metrics.jsonl")[0]["loss"] == value


def test_a_strange_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nhello\n{"step": 2}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl:2 is not a metrics line"):
        MetricsFile(path, 2)
    assert path.read_text() == '{"step": 1}\nhello\n{"step": 2}\n'


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no device that is always full")
    file = MetricsFile(tmp_path / "metrics.jsonl", None)
    with (
        open("/dev/full", "wb", buffering=0) as file._file,
        pytest.raises(RunError, match=r"metrics\.jsonl: cannot write metrics: No space left"),
    ):
        file.write({"step": 1})


def rank_sums(rank: int, micro_batch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * rank + micro_batch)
    return {
        "loss_sum": torch.rand((), generator=generator),
        "targets_M": torch.randint(0, 2**40, (3,), generator=generator),
        "tokens_per_expert_LME": torch.randint(0, 2**40, (2, 3, 4), generator=generator),
    }


def reduced_on_rank() -> dict[str, torch.Tensor]:
    sums = StepSums()
    for micro_batch in range(3):
        added = rank_sums(torch.distributed.get_rank(), micro_batch)
        # Ranks may meet the names in any order.
        names = sorted(added, reverse=torch.distributed.get_rank() == 1)
        sums.add({name: added[name] for name in names})
    return sums.reduced()


def test_sums_over_ranks_are_exact() -> None:
    every = [rank_sums(rank, micro_batch) for rank in range(2) for micro_batch in range(3)]
    for reduced in run_ranks(reduced_on_rank, 2):
        assert list(reduced) == sorted(every[0])
        for name, value in reduced.items():
            assert torch.equal(value, torch.stack([sums[name].double() for sums in every]).sum(0)), name


def test_a_name_keeps_its_shape_and_its_inputs_stay_as_they_are() -> None:
    sums, value = StepSums(), torch.ones(2, dtype=torch.float64)
    sums.add({"a": value})
    sums.add({"a": value})
    assert sums.reduced()["a"].tolist() == [2.0, 2.0]
    assert value.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="a: shape"):
        sums.add({"a": torch.ones(3)})


def test_losses_are_weighted_by_targets() -> None:
    sums = {
        "loss_sum": torch.tensor(30.0),
        "loss_sum_M": torch.tensor([10.0, 20.0, 0.0]),
        "targets_M": torch.tensor([10.0, 5.0, 0.0]),
        "target_weight_M": torch.tensor([10.0, 5.0, 0.0]),
    }
    assert loss_metrics(sums) == {"loss": 2.0, "loss/text": 1.0, "loss/image": 4.0}
    assert evaluation_metrics(sums) == {
        "eval/loss": 2.0,
        "eval/loss/text": 1.0,
        "eval/loss/image": 4.0,
        "eval/target_tokens": 15,
    }
    nothing = {name: torch.zeros_like(value) for name, value in sums.items()}
    assert loss_metrics(nothing) == {"loss": None}
