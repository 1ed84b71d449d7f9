"""A tokenizer's files, whatever the family: transformers loads what the processor is, and we read it back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cantata.models.chat_files import find_template, stop_ids, token_names, write_tokenizer
from tests.models.mllama.small import small_processor

WORDS = "Is't a verdict? naïve  \n\tb"


def test_transformers_loads_the_same_tokens(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    processor = small_processor()
    write_tokenizer(processor, processor.token_names, "{{ 1 }}", tmp_path, bos_token="<|reserved_6|>")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(WORDS)["input_ids"] == processor.tokenizer.encode(WORDS, add_special_tokens=False).ids
    assert tokenizer.decode(tokenizer(WORDS)["input_ids"]) == WORDS
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.image_token_id)
    assert ids == (6, 0, processor.pad_token_id, processor.image_token_id)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert generation.eos_token_id == list(processor.stop_token_ids)
    assert generation.pad_token_id == processor.pad_token_id
    assert tokenizer.chat_template == "{{ 1 }}"


def test_a_users_template_is_written_instead_of_the_familys(tmp_path: Path) -> None:
    template = (
        "{% for message in messages %}<|im_start|>{{ message['content'][0]['text'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    (tmp_path / "chat.jinja").write_text(template)
    processor = small_processor(chat_template=str(tmp_path / "chat.jinja"))
    write_tokenizer(processor, processor.token_names, "own", tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == template
    assert "bos_token" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    processor = small_processor()
    write_tokenizer(processor, processor.token_names, "{{ 1 }}", tmp_path, bos_token="<|reserved_6|>")
    names = token_names(tmp_path)
    own = processor.token_names
    assert (names["bos_token"], names["eos_token"], names["pad_token"]) == (
        own.begin,
        own.document_end,
        own.pad,
    )
    assert names["image_token"] == own.image, "an extra one"
    assert stop_ids(tmp_path) == list(processor.stop_token_ids)
    assert find_template(tmp_path, "ours") == (str(tmp_path), "{{ 1 }}", [])


def test_a_folder_that_says_nothing(tmp_path: Path) -> None:
    assert (token_names(tmp_path), stop_ids(tmp_path)) == ({}, [])
    note = f"{tmp_path} holds no chat template; conversations are as ours"
    assert find_template(tmp_path, "as ours") == (None, "", [note])


def test_names_may_be_mappings_and_anything_else_is_none(tmp_path: Path) -> None:
    config = {
        "eos_token": {"content": "<end>", "lstrip": False},
        "pad_token": None,
        "bos_token": {"lstrip": False},
        "model_max_length": 5,
        "extra_special_tokens": {"eof_token": "<eof>"},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert token_names(tmp_path) == {"eos_token": "<end>", "eof_token": "<eof>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"extra_special_tokens": ["<a>"]}))
    assert token_names(tmp_path) == {"eos_token": "<end>"}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert stop_ids(tmp_path) == [], "one alone is the tokenizer's own end"
