"""What every test starts from: one thread in each process, no launcher's variables, no wandb online."""

import os

import hypothesis
import pytest
import torch

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def pytest_configure() -> None:
    # Several processes share few cores: more threads than one each only get in each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["WANDB_MODE"] = "disabled"
    torch.set_num_threads(1)
    # Two workers on a busy machine are slow now and then; no test is about time.
    hypothesis.settings.register_profile("cantata", deadline=None)
    hypothesis.settings.load_profile("cantata")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test believes that it is one of several ranks, unless it says so."""
    for name in [*LAUNCHER, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.delenv(name, raising=False)
