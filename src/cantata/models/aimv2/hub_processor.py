"""AIMv2's image processor and tokenizer as transformers reads them, to lie beside published weights."""

from __future__ import annotations

from pathlib import Path

from cantata.core.samples import Processor
from cantata.models.aimv2.config import Aimv2VisionConfig
from cantata.models.aimv2.processor import Aimv2PairProcessor, Aimv2Processor
from cantata.models.aimv2.vision import PIXEL_MEAN, PIXEL_STD
from cantata.models.hub import write_json

_BICUBIC = 3
"""Pillow's number of the filter."""


def write_processor(
    processor: Processor, vision: Aimv2VisionConfig, directory: Path, *, with_text: bool
) -> list[str]:
    """Write what `CLIPImageProcessor` and, of a contrastive model, `AutoTokenizer` load from `directory`.

    Returns lines on what could not be written.
    """
    if not isinstance(processor, Aimv2Processor):
        return [f"no processor files: {type(processor).__name__} has none for AIMv2"]
    squares = {
        "size": {"shortest_edge": vision.image_size},
        "crop_size": {"height": vision.image_size, "width": vision.image_size},
    }
    images = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": not vision.is_native,
        "do_center_crop": not vision.is_native,
        "do_convert_rgb": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "resample": _BICUBIC,
        "image_mean": list(PIXEL_MEAN),
        "image_std": list(PIXEL_STD),
        **({} if vision.is_native else squares),
    }
    write_json(directory / "preprocessor_config.json", images)
    notes = []
    if vision.is_native:
        notes.append(
            f"images of any size: scale their sides to multiples of {vision.patch_size} pixels yourself; "
            "transformers crops what is left over without a word"
        )
    if with_text and isinstance(processor, Aimv2PairProcessor):
        processor.tokenizer.save(str(directory / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": processor.begin,
            "eos_token": processor.end,
            "pad_token": processor.pad,
            "model_max_length": processor.max_length,
            "clean_up_tokenization_spaces": False,
        }
        write_json(directory / "tokenizer_config.json", config)
        notes.append(
            f"a text begins with {processor.begin} and ends with {processor.end}: put them in; mask padding"
        )
    return notes
