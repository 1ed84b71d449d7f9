"""Mllama's tokenizer and processor as transformers reads them, to lie beside published weights."""

from __future__ import annotations

from pathlib import Path

from cantata.models.chat_files import write_tokenizer
from cantata.models.hub import write_json
from cantata.models.mllama.config import MllamaVisionConfig
from cantata.models.mllama.processor import MllamaProcessor

IMAGE_FILE = "preprocessor_config.json"
PYTHON_TOKEN = "<|python_tag|>"
"""A token that transformers' processor asks the tokenizer for."""


def write_processor(
    processor: MllamaProcessor, vision: MllamaVisionConfig | None, directory: Path
) -> list[str]:
    """Write what `AutoTokenizer` and `MllamaProcessor` load from `directory`.

    A generation there ends with a document or a turn. Of a model for text alone only the tokenizer's files
    are written.

    Returns lines on what could not be written.
    """
    write_tokenizer(
        processor, processor.token_names, _llama3(processor), directory, bos_token=processor.token_names.begin
    )
    if vision is None:
        return []
    images = {
        "image_processor_type": "MllamaImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 2,
        "size": {"height": processor.image_size, "width": processor.image_size},
        "max_image_tiles": processor.max_num_tiles,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
    }
    write_json(directory / IMAGE_FILE, {**images, "processor_class": "MllamaProcessor"})
    write_json(
        directory / "processor_config.json", {"processor_class": "MllamaProcessor", "image_processor": images}
    )
    return []


def _llama3(processor: MllamaProcessor) -> str:
    """The format of conversations that `MllamaProcessor` writes by itself, as a template."""
    names = processor.token_names
    start, end = f"'{names.header_start}' + ", f" + '{names.header_end}\\n\\n'"
    return (
        f"{{{{- '{names.begin}' -}}}}\n"
        "{%- for message in messages -%}\n"
        f"{{{{- {start}message['role']{end} -}}}}\n"
        "{%- if message['content'] is string -%}\n"
        "{{- message['content'] -}}\n"
        "{%- else -%}\n"
        "{%- for part in message['content'] -%}\n"
        f"{{{{- '{names.image}' if part['type'] == 'image' else part['text'] -}}}}\n"
        "{%- endfor -%}\n"
        "{%- endif -%}\n"
        f"{{{{- '{names.message_end}' -}}}}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}\n"
        f"{{{{- {start}'assistant'{end} -}}}}\n"
        "{%- endif -%}\n"
    )
