"""Answers by vLLM, where it is installed; the request is `vllm_request`'s."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from cantata.core.errors import ConfigError
from cantata.infer.generate import Generated
from cantata.infer.sampling import SamplingConfig
from cantata.infer.vllm_request import VllmRequest


def load_vllm() -> Any:
    """The library. Raises `ConfigError` where it is not installed."""
    try:
        return import_module("vllm")
    except ImportError as error:
        raise ConfigError(
            f"engine=vllm: vLLM is not installed here ({error}); pip install vllm, or take engine=ours"
        ) from error


def answer(
    model: Path,
    request: VllmRequest,
    sampling: SamplingConfig,
    stop_token_ids: Sequence[int],
    max_model_len: int,
    gpu_memory_utilization: float,
) -> Generated:
    """The answer to one request.

    Args:
        model: a Hugging Face folder.
        stop_token_ids: end an answer.
        max_model_len: tokens of prompt and answer together.
        gpu_memory_utilization: share of the GPU's memory that vLLM takes.

    Raises `ConfigError` where vLLM is not installed.
    """
    vllm = load_vllm()
    engine = vllm.LLM(
        model=str(model),
        dtype="bfloat16",
        max_model_len=max_model_len,
        gpu_memory_utilization=gpu_memory_utilization,
        limit_mm_per_prompt={"image": max(1, len(request.images))},
        # Images come split and resized: transformers' splitting is another one.
        mm_processor_kwargs={"max_image_size": request.image_size, "split_image": False},
        seed=sampling.seed,
    )
    prompt: dict[str, Any] = {"prompt_token_ids": request.prompt_token_ids}
    if request.images:
        prompt["multi_modal_data"] = {"image": request.images}
    [done] = engine.generate([prompt], vllm.SamplingParams(**_sampling(sampling, stop_token_ids)))
    output = done.outputs[0]
    token_ids = [token for token in output.token_ids if token not in stop_token_ids]
    return Generated(token_ids, output.text, output.finish_reason == "stop")


def _sampling(config: SamplingConfig, stop_token_ids: Sequence[int]) -> dict[str, Any]:
    return {
        "max_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_k": config.top_k or -1,
        "top_p": config.top_p,
        "repetition_penalty": config.repetition_penalty,
        "stop": list(config.stop),
        "stop_token_ids": list(stop_token_ids),
        "seed": config.seed,
    }
