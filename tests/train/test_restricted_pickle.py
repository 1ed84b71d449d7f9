"""The index of a checkpoint is read, never run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from cantata.core.errors import RunError
from cantata.train.restricted_pickle import RestrictedReader, tensor_shapes

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool]


class Mischief:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch mischief",)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tensors = {str(dtype): torch.ones(2, 3).to(dtype) for dtype in DTYPES} | {"scalar": torch.tensor(3.0)}
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(tmp_path / "saved"), no_dist=True)
    return tmp_path / "saved"


def test_every_dtype_is_read_back(checkpoint: Path) -> None:
    assert tensor_shapes(checkpoint) == {str(dtype): (2, 3) for dtype in DTYPES} | {"scalar": ()}
    tensors = {str(dtype): torch.zeros(2, 3).to(dtype) for dtype in DTYPES}
    dcp.load(tensors, storage_reader=RestrictedReader(checkpoint), no_dist=True)
    assert all(torch.equal(value, torch.ones_like(value)) for value in tensors.values())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("code", "asks for posix.system"),
        ("bytes", "torch.float32 is not a tensor"),
        ("path", "outside the checkpoint"),
        ("other", "holds no checkpoint index"),
        ("garbage", ""),
        ("missing", "No such file"),
    ],
)
def test_anything_else_is_refused_in_one_line(
    kind: str, reason: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = checkpoint / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    if kind == "code":
        metadata.planner_data = Mischief()
    elif kind == "bytes":
        metadata.state_dict_metadata["torch.float32"] = BytesStorageMetadata()
    elif kind == "path":
        next(iter(metadata.storage_data.values())).relative_path = "../outside.distcp"
    index.write_bytes(pickle.dumps(metadata))
    if kind == "other":
        index.write_bytes(pickle.dumps({"a": 1}))
    elif kind == "garbage":
        index.write_bytes(b"\x80\x04nonsense")
    elif kind == "missing":
        index.unlink()
    monkeypatch.chdir(checkpoint)
    with pytest.raises(RunError, match=rf"\.metadata is refused: .*{reason}") as caught:
        tensor_shapes(checkpoint)
    assert "\n" not in str(caught.value)
    assert not (checkpoint / "mischief").exists()
