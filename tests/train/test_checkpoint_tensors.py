"""Whole tensors from a checkpoint, one at a time; and what two models differ in, in a line."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from cantata.core.errors import RunError
from cantata.train import checkpoint_tensors
from cantata.train.checkpoint_tensors import StoredTensors, differences

TENSORS = {
    "model.a": torch.arange(12.0).view(3, 4),
    "model.b": torch.arange(6).bfloat16(),
    "optimizer.a.step": torch.tensor(3.0),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    dcp.save(dict(TENSORS), storage_writer=dcp.FileSystemWriter(tmp_path / "saved"), no_dist=True)
    return tmp_path / "saved"


def test_every_tensor_in_its_own_dtype(checkpoint: Path) -> None:
    stored = StoredTensors(checkpoint)
    # The index is read once.
    (checkpoint / ".metadata").unlink()
    assert stored.shapes == {name: tensor.shape for name, tensor in TENSORS.items()}
    for name, tensor in TENSORS.items():
        with warnings.catch_warnings(action="error"):
            found = stored.read(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


def test_a_file_that_is_gone_is_one_line(checkpoint: Path) -> None:
    stored = StoredTensors(checkpoint)
    (checkpoint / "__0_0.distcp").unlink()
    with pytest.raises(RunError, match=r"saved cannot be read: .*No such file") as caught:
        stored.read("model.a")
    assert "\n" not in str(caught.value)


def test_differences() -> None:
    one, two = torch.Size([1]), torch.Size([2])
    assert differences({"a": one}, {"a": one}) == ""
    assert differences({"a": one, "c": one}, {"a": two, "b": one}) == (
        "it lacks b; it also holds c; a is (1,) there and (2,) here"
    )
    many = {f"n{index}": one for index in range(checkpoint_tensors._SHOWN + 3)}
    assert differences({}, many).endswith("it lacks n3 and 3 more")
