"""vLLM is called with what it takes, shown by a stand-in, and its absence is one line."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from cantata.core.errors import ConfigError
from cantata.infer.sampling import SamplingConfig
from cantata.infer.vllm_engine import answer, load_vllm
from cantata.infer.vllm_request import VllmRequest

GREEDY = SamplingConfig(4096, 0.0, 0, 1.0, 1.0, ("<|im_end|>",), 7)


class StandIn(SimpleNamespace):
    """As much of vLLM as is called."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        super().__init__(SamplingParams=lambda **given: given)

    def LLM(self, **given: Any) -> Any:
        self.calls.append(given)
        output = SimpleNamespace(token_ids=(5, 6, 2), text="done", finish_reason="stop")
        done = [SimpleNamespace(outputs=[output])]
        return SimpleNamespace(generate=lambda *asked: self.calls.append(asked) or done)


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(
        ConfigError, match=r"vLLM is not installed here .*; pip install vllm, or take engine=ours"
    ):
        load_vllm()


def test_what_it_is_called_with(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    images = [Image.new("RGB", (980, 700)), Image.new("RGB", (980, 980))]
    request = VllmRequest([3, 9, 9, 4], images, 980, 256)
    found = answer(Path("Aria"), request, GREEDY, (2, 8), 38400, 0.84)
    assert found == ([5, 6], "done", True)
    made, (prompts, sampling) = stand_in.calls
    assert made["model"] == "Aria"
    assert made["max_model_len"] == 38400
    assert made["gpu_memory_utilization"] == 0.84
    assert made["limit_mm_per_prompt"] == {"image": 2}
    assert made["mm_processor_kwargs"] == {"max_image_size": 980, "split_image": False}
    assert prompts == [{"prompt_token_ids": [3, 9, 9, 4], "multi_modal_data": {"image": images}}]
    assert (sampling["max_tokens"], sampling["temperature"], sampling["top_k"]) == (4096, 0.0, -1)
    assert (sampling["stop"], sampling["stop_token_ids"]) == (["<|im_end|>"], [2, 8])
