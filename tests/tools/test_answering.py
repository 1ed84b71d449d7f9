"""Who answers: our own decoding in the dtype asked for, and what vLLM cannot be asked."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cantata.core.errors import ConfigError
from cantata.infer.generate import Generated
from cantata.infer.sampling import SamplingConfig
from cantata.tools import answering
from cantata.tools.answering import Dtype, Ours, Vllm

GREEDY = SamplingConfig(5, 0.0, 0, 1.0, 1.0, (), 7)


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        (Dtype.auto, "cpu", torch.float32),
        (Dtype.auto, "cuda", torch.bfloat16),
        (Dtype.bf16, "cpu", torch.bfloat16),
        (Dtype.fp32, "cuda", torch.float32),
    ],
)
def test_weights_are_as_asked_and_wide_where_no_gpu_is(
    dtype: Dtype, device: str, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    done = Generated([4], "yes", True)

    class Generator:
        def __init__(self, *given: Any, **limits: Any) -> None:
            asked.append((given, limits))

        def generate(self, samples: list[Any], sampling: SamplingConfig, write: object) -> list[Generated]:
            asked.append((samples, sampling))
            return [done]

    monkeypatch.setattr(answering.dist, "device", lambda: torch.device(device))
    monkeypatch.setattr(answering, "load", lambda *given: given)
    monkeypatch.setattr(answering, "Generator", Generator)
    opened: Any = SimpleNamespace(collator="the collator")
    sample: Any = "the sample"
    assert Ours(dtype).answer(Path("hub"), opened, sample, 99, GREEDY) == done
    loaded = (opened, torch.device(device), expected)
    assert asked == [
        ((loaded, "the collator"), {"max_positions": 99, "max_open": 1}),
        (["the sample"], GREEDY),
    ]


def test_ours_takes_every_size_and_vllm_the_largest_alone() -> None:
    assert not Ours(Dtype.auto).only_largest
    assert Vllm(0.5).only_largest


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, float("nan")])
def test_a_share_of_memory_that_cannot_be(share: float) -> None:
    with pytest.raises(ConfigError, match=r"engine\.gpu_memory_utilization=.* above 0 and at most 1"):
        Vllm(share)
    assert Vllm(1.0)


def test_what_vllm_cannot_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not installed that is said first, and every way out is a command."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match="vLLM is not installed here"):
        Vllm(0.5).check(tmp_path, None)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace())
    with pytest.raises(ConfigError, match=r"is no Hugging Face folder, .* make one with cantata export"):
        Vllm(0.5).check(tmp_path, None)
    (tmp_path / "config.json").write_text("{}")
    Vllm(0.5).check(tmp_path, None)
    with pytest.raises(ConfigError, match=f"cantata export lora --merge --base {tmp_path} --to DIR"):
        Vllm(0.5).check(tmp_path, Path("lora"))
