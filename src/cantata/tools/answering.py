"""Who answers one prompt: our own decoding, or vLLM where it is installed."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Protocol

from cantata.core import dist
from cantata.core.errors import ConfigError
from cantata.core.samples import Sample
from cantata.infer import vllm_engine
from cantata.infer.generate import Generated, Generator
from cantata.infer.sampling import SamplingConfig
from cantata.infer.vllm_request import build_request
from cantata.models.aria.model import Aria
from cantata.models.aria.processor import AriaProcessor
from cantata.models.aria.reading import image_sizes
from cantata.models.hub import CONFIG
from cantata.tools.export import DTYPES
from cantata.tools.generate import in_order
from cantata.tools.open_model import OpenedModel, load


class Answering(Protocol):
    """An engine that generates."""

    @property
    def only_largest(self) -> bool:
        """Whether images must have the largest size that the model takes."""
        ...

    def check(self, path: Path, adapter: Path | None) -> None:
        """Raise `ConfigError` where it cannot answer with the model at `path`, before that is opened."""
        ...

    def answer(
        self, path: Path, opened: OpenedModel, sample: Sample, max_model_len: int, sampling: SamplingConfig
    ) -> Generated:
        """Answer an encoded prompt, and write the answer to stdout."""
        ...


class Dtype(Enum):
    """Of the weights."""

    auto = "auto"
    """bf16 on a GPU, else fp32."""
    bf16 = "bf16"
    fp32 = "fp32"


class Ours:
    """Our own decoding, with a cache; the answer is written as it comes.

    Args:
        dtype: of the weights.
    """

    only_largest = False

    def __init__(self, dtype: Dtype) -> None:
        self._dtype = dtype

    def check(self, path: Path, adapter: Path | None) -> None:
        """See `Answering`: `open_model` says what is wrong."""

    def answer(
        self, path: Path, opened: OpenedModel, sample: Sample, max_model_len: int, sampling: SamplingConfig
    ) -> Generated:
        """See `Answering`."""
        device = dist.device()
        on_device = "bf16" if device.type == "cuda" else "fp32"
        name = on_device if self._dtype is Dtype.auto else self._dtype.value
        model = load(opened, device, DTYPES[name])
        generator = Generator(model, opened.collator, max_positions=max_model_len, max_open=1)
        [answer] = generator.generate([sample], sampling, in_order(1))
        return answer


class Vllm:
    """vLLM, which reads Hugging Face folders and 980-px crops of Aria.

    Args:
        gpu_memory_utilization: share of the GPU's memory that it takes.
    """

    only_largest = True

    def __init__(self, gpu_memory_utilization: float) -> None:
        if not 0 < gpu_memory_utilization <= 1:
            raise ConfigError(
                f"engine.gpu_memory_utilization={gpu_memory_utilization} must be above 0 and at most 1"
            )
        self._share = gpu_memory_utilization

    def check(self, path: Path, adapter: Path | None) -> None:
        """See `Answering`."""
        vllm_engine.load_vllm()
        if not (path / CONFIG).is_file():
            raise ConfigError(
                f"engine=vllm: {path} is no Hugging Face folder, and vLLM reads no other; make one with "
                "cantata export"
            )
        if adapter is not None:
            raise ConfigError(
                "engine=vllm: adapters are not handed to vLLM; make a whole model of it: "
                f"cantata export {adapter} --merge --base {path} --to DIR"
            )

    def answer(
        self, path: Path, opened: OpenedModel, sample: Sample, max_model_len: int, sampling: SamplingConfig
    ) -> Generated:
        """See `Answering`."""
        model, processor = opened.model, opened.collator.processor
        assert isinstance(model, Aria)
        assert isinstance(processor, AriaProcessor)
        request = build_request(sample, processor, max(image_sizes(model).values()))
        stops = processor.stop_token_ids
        answer = vllm_engine.answer(path, request, sampling, stops, max_model_len, self._share)
        sys.stdout.write(answer.text + "\n")
        return answer
