"""Files of weights: both kinds, several together, and what is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cantata.core.errors import ConfigError
from cantata.nn.perceptual.weights import Weights


def test_files_of_both_kinds_are_read_together(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, dtype=torch.float16)}, tmp_path / "a.safetensors")
    torch.save({"b": torch.zeros(3)}, tmp_path / "b.pth")
    weights = Weights([tmp_path / "a.safetensors", tmp_path / "b.pth"])
    assert weights.take("a", 2).dtype == torch.float32
    assert weights.left.keys() == {"b"}
    weights.check()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.pth", None, "gone.pth is no file"),
        ("text.pth", b"no weights", "text.pth cannot be read"),
        ("text.safetensors", b"no weights", "text.safetensors cannot be read"),
        ("empty.pth", b"", "empty.pth cannot be read"),
    ],
)
def test_what_is_no_file_of_weights_is_one_line(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")) as caught:
        Weights([tmp_path / name])
    assert "\n" not in str(caught.value)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"a": Path("x")}, tmp_path / "code.pth")
    with pytest.raises(ConfigError, match="cannot be read"):
        Weights([tmp_path / "code.pth"])


def test_a_list_is_no_state_dict(tmp_path: Path) -> None:
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(ConfigError, match="no state dict"):
        Weights([tmp_path / "list.pth"])
