"""Tokenizer, chat template and ends of a generation as transformers reads them, beside published weights."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from cantata.models.chat_processor import ChatProcessor
from cantata.models.hub import write_json


class Names(Protocol):
    """How a family's tokenizer spells what every tokenizer of conversations has."""

    @property
    def image(self) -> str: ...

    @property
    def document_end(self) -> str: ...

    @property
    def pad(self) -> str: ...


def write_tokenizer(
    processor: ChatProcessor, names: Names, own_template: str, directory: Path, **more: str
) -> None:
    """Write what `AutoTokenizer` and `GenerationConfig` load; a generation ends with a document or a turn.

    Args:
        own_template: stands in where the processor takes no template of a user's.
        more: further tokens, by their keys in `tokenizer_config.json`.
    """
    processor.tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **more,
        "eos_token": names.document_end,
        "pad_token": names.pad,
        "extra_special_tokens": {"image_token": names.image},
        "clean_up_tokenization_spaces": False,
    }
    write_json(directory / "tokenizer_config.json", config)
    write_json(
        directory / "generation_config.json",
        {"eos_token_id": list(processor.stop_token_ids), "pad_token_id": processor.pad_token_id},
    )
    template = own_template if processor.template is None else processor.template.source
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
