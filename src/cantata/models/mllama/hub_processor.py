"""Mllama's tokenizer and processor as transformers reads them, to lie beside published weights."""

from __future__ import annotations

import json
from pathlib import Path

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
    processor.tokenizer.save(str(directory / "tokenizer.json"))
    names = processor.token_names
    _write(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": names.begin,
            "eos_token": names.document_end,
            "pad_token": names.pad,
            "extra_special_tokens": {"image_token": names.image},
            "clean_up_tokenization_spaces": False,
        },
    )
    _write(
        directory / "generation_config.json",
        {"eos_token_id": list(processor.stop_token_ids), "pad_token_id": processor.pad_token_id},
    )
    template = _llama3(processor) if processor.template is None else processor.template.source
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
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
    _write(directory / IMAGE_FILE, {**images, "processor_class": "MllamaProcessor"})
    _write(
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


def _write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
