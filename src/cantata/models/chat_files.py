"""Tokenizer, chat template and ends of a generation beside published weights, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from cantata.core.chat_sandbox import read_template
from cantata.core.errors import ConfigError
from cantata.models.chat_processor import ChatProcessor
from cantata.models.hub import read_json, write_json

_TOKENIZER, _GENERATION = "tokenizer_config.json", "generation_config.json"


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
    write_json(directory / _TOKENIZER, config)
    write_json(
        directory / _GENERATION,
        {"eos_token_id": list(processor.stop_token_ids), "pad_token_id": processor.pad_token_id},
    )
    template = own_template if processor.template is None else processor.template.source
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


Kind = TypeVar("Kind")


class HubProcessor(NamedTuple, Generic[Kind]):
    """What a published folder's files give."""

    processor: Kind
    no_images: str
    """Why images cannot be read as the model learned them; empty where they can."""
    notes: list[str]
    """What the files leave open, and what stands for it."""


def find_template(directory: Path, own: str) -> tuple[str | None, str, list[str]]:
    """Where a folder's chat template is, its source, and a note where there is none.

    own: what conversations are then.
    """
    try:
        source, _ = read_template(str(directory))
    except ConfigError:
        return None, "", [f"{directory} holds no chat template; conversations are {own}"]
    return str(directory), source, []


def token_names(directory: Path) -> dict[str, str]:
    """How a folder spells special tokens, by their keys in `tokenizer_config.json`; none without the file."""
    config = _optional(directory / _TOKENIZER)
    extra = config.get("extra_special_tokens")
    given = config | (extra if isinstance(extra, dict) else {})
    spelt = {key: value.get("content") if isinstance(value, dict) else value for key, value in given.items()}
    return {key: value for key, value in spelt.items() if isinstance(value, str)}


def stop_ids(directory: Path) -> list[Any]:
    """What a folder says ends a generation, where it names several tokens."""
    found = _optional(directory / _GENERATION).get("eos_token_id")
    return found if isinstance(found, list) else []


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
