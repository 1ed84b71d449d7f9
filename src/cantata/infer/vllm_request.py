"""A prompt as vLLM takes it for Aria, without vLLM: token ids, and images that are split already.

vLLM makes of one placeholder as many as the projector has queries, always, and of one image one crop. So
every crop, the thumbnail included, is an image of its own with one placeholder, and all placeholders of a
page stand between the same two marks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from cantata.core.errors import ConfigError
from cantata.core.samples import Sample
from cantata.models.aria.processor import AriaProcessor


class VllmRequest(NamedTuple):
    """What `LLM.generate` takes, and how images must be processed there."""

    prompt_token_ids: list[int]
    """With one placeholder for each image."""
    images: list[Image.Image]
    """Resized as the vision tower takes them: their longest side is `image_size`."""
    image_size: int
    image_tokens: int
    """Placeholders that vLLM makes of one."""


def build_request(sample: Sample, processor: AriaProcessor, num_queries: int) -> VllmRequest:
    """The request that gives vLLM's model the tokens and pixels of an encoded prompt.

    Args:
        sample: from `processor.encode_prompt`.
        num_queries: queries of the model's projector, which is what vLLM expands a placeholder to.

    Raises `ConfigError` for images of another size than the one that has as many features.
    """
    if sample.images and processor.features_per_image != num_queries:
        raise ConfigError(
            f"engine=vllm: vLLM makes {num_queries} tokens of every image, and images of "
            f"image_size={processor.image_size} have {processor.features_per_image}; take the larger size, "
            "or engine=ours"
        )
    ids_T = sample.input_ids_T
    is_image_T = ids_T == processor.image_token_id
    place_T = np.cumsum(is_image_T) - 1
    kept_T = ~is_image_T | (place_T % num_queries == 0)
    images = [processor.picture(image) for image in sample.images]
    return VllmRequest(ids_T[kept_T].tolist(), images, processor.image_size, num_queries)


def expanded(request: VllmRequest, image_token_id: int) -> list[int]:
    """The tokens that vLLM's model reads."""
    return [
        token
        for one in request.prompt_token_ids
        for token in [one] * (request.image_tokens if one == image_token_id else 1)
    ]
