from __future__ import annotations

import os

import pytest
import torch

from cantata.core import dist
from cantata.core.dist import Process, distributed, find_process
from cantata.core.errors import ConfigError, RunError
from tests.distributed.spawn import run_ranks

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "40001",
    "SLURM_JOB_NODELIST": "gpu[03-05,9],cpu1",
}


def test_without_a_launcher_there_is_one_process() -> None:
    assert find_process({}) == Process(0, 1, 0, None, None)


def test_torchrun_deepspeed_and_accelerate_set_the_same_names() -> None:
    assert find_process(TORCHRUN) == Process(3, 4, 1, "node0", 29500)


def test_srun_meets_at_the_first_node() -> None:
    assert find_process(SRUN) == Process(5, 8, 1, "gpu03", 15000 + 40001 % 15000)
    assert find_process({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})[3:] == ("10.0.0.1", 1234)


def test_torchrun_inside_srun_wins() -> None:
    assert find_process({**SRUN, **TORCHRUN}).rank == 3


def test_a_batch_script_without_srun_is_one_process() -> None:
    batch = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}
    assert find_process({**batch, "SLURM_PROCID": "0"}).world_size == 1


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1,n2", "n1"), ("n1", "n1"), ("a[1-2]-ib", "a1-ib"), ("g[7],x", "g7"), ("n-[010-012]", "n-010")],
)
def test_first_node_of_a_list(nodes: str, first: str) -> None:
    assert find_process({**SRUN, "SLURM_JOB_NODELIST": nodes}).master_addr == first


@pytest.mark.parametrize("change", [{"RANK": "x"}, {"RANK": "4"}, {"WORLD_SIZE": "0"}, {"MASTER_PORT": "-1"}])
def test_variables_that_make_no_sense_are_refused(change: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        find_process({**TORCHRUN, **change})


def test_several_ranks_need_a_meeting_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="MASTER_ADDR"), distributed():
        pass
    assert os.environ["WORLD_SIZE"] == "2"
    assert "LOCAL_RANK" not in os.environ


def test_one_process_has_a_group_too() -> None:
    with distributed() as process:
        assert process.world_size == 1
        assert torch.distributed.is_initialized()
        assert os.environ["RANK"] == "0"
        assert dist.gather_strings("a") == ["a"]
    assert not torch.distributed.is_initialized()
    assert "RANK" not in os.environ


def test_a_failure_in_one_process_takes_the_group_down() -> None:
    with pytest.raises(ZeroDivisionError), distributed():
        1 / 0  # noqa: B018
    assert not torch.distributed.is_initialized()


def test_a_lost_rank_is_one_line_and_other_errors_stay() -> None:
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:3")
    with pytest.raises(RunError, match=r"another rank was lost \(Connection closed by peer\)"), distributed():
        raise lost
    with pytest.raises(RuntimeError, match="shapes"), distributed():
        raise RuntimeError("shapes cannot be multiplied")


def test_collectives_without_a_group_are_the_identity() -> None:
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    total = dist.all_reduce_sum(values)
    assert total.tolist() == [1.0, 2.0]
    assert not total.requires_grad
    assert dist.all_reduce_sum([3, 4]) == [3.0, 4.0]
    assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)


def collectives() -> tuple[list[float], list[float], list[str], bool]:
    with_numbers = dist.all_reduce_sum([dist.rank() + 1.0, 2.0**53])
    values = torch.full((2,), float(dist.rank()))
    total = dist.all_reduce_sum(values)
    assert values.tolist() == [dist.rank()] * 2
    dist.barrier()
    return with_numbers, total.tolist(), dist.gather_strings(f"rank {dist.rank()}"), dist.is_main()


@pytest.mark.distributed
def test_collectives_of_two_ranks() -> None:
    first, second = run_ranks(collectives, 2)
    assert first[:3] == second[:3] == ([3.0, 2.0**54], [1.0, 1.0], ["rank 0", "rank 1"])
    assert (first[3], second[3]) == (True, False)
