"""A tokenizer's files, whatever the family: transformers loads what the processor is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cantata.models.chat_files import write_tokenizer
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
