"""What was written beside weights, read again and by transformers: the same tokens."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from cantata.core.errors import ConfigError
from cantata.core.samples import Chat, Document, Message
from cantata.models.emu3 import Emu3Processor
from cantata.models.emu3.hf import Emu3Layout
from cantata.models.emu3.hub_processor import write_processor
from cantata.models.emu3.hub_reader import read_processor
from tests.models.emu3.small import TOKENS, grid, reading_config, small_processor
from tests.models.emu3.test_processor import PUBLISHED_STYLE

LAYOUT = Emu3Layout(reading_config())
CHAT = Chat((Message("user", (grid(1, 2, 2), "What?")), Message("assistant", ("A cat",))))
EXAMPLES = (Document(("Is't naïve? <|im_end|>", grid(1, 3, 2), " 😀", grid(2, 1, 1))), CHAT)


def assert_same(found: Emu3Processor, expected: Emu3Processor) -> None:
    assert found.tokens == expected.tokens
    assert found.stop_token_ids == expected.stop_token_ids
    for example in EXAMPLES:
        one, other = found.encode(example, "s"), expected.encode(example, "s")
        assert one.input_ids_T.tolist() == other.input_ids_T.tolist()
        assert found.spell(one.input_ids_T.tolist()) == expected.spell(one.input_ids_T.tolist())
        assert found.decode(one.input_ids_T.tolist()) == expected.decode(one.input_ids_T.tolist())


def test_what_we_write(tmp_path: Path) -> None:
    expected = small_processor()
    (note,) = write_processor(expected, tmp_path)
    assert note.startswith("no chat_template.jinja")
    found = read_processor(tmp_path, LAYOUT)
    assert found.notes == [f"{tmp_path} holds no chat template; conversations are as Emu3-Chat's"]
    assert "add --tokenizer DIR" in found.no_images
    assert_same(found.processor, expected)
    # Its tokenizer has every token now, and writing it again changes nothing.
    again = tmp_path / "again"
    again.mkdir()
    write_processor(found.processor, again)
    assert (again / "tokenizer.json").read_text() == (tmp_path / "tokenizer.json").read_text()
    assert_same(read_processor(again, LAYOUT).processor, expected)


def test_a_chat_template_and_names_of_its_own(tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(PUBLISHED_STYLE)
    tokens = replace(TOKENS, bos=0, eos=3, boi=4, eoi=5)
    expected = small_processor(chat_template=str(template), tokens=tokens)
    folder = tmp_path / "hub"
    folder.mkdir()
    assert write_processor(expected, folder) == []
    found = read_processor(folder, LAYOUT)
    assert found.notes == []
    assert_same(found.processor, expected)


def test_transformers_reads_the_same_tokens(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    processor = small_processor()
    write_processor(processor, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (6144, 6145, 1)
    names = {"<boi>": theirs.boi_token, "<img>": theirs.image_wrapper_token, "<eol>": theirs.eol_token}
    names |= {"<eof>": theirs.eof_token, "<eoi>": theirs.eoi_token}
    names |= {"<bos>": theirs.bos_token, "<eos>": theirs.eos_token}
    ids = processor.encode(Document(("a cat", grid(1, 2, 3))), "s").input_ids_T.tolist()
    spelt = processor.spell(ids)
    for ours, name in names.items():
        spelt = spelt.replace(ours, name)
    for code in range(TOKENS.codebook_size):
        spelt = spelt.replace(f"<visual {code}>", f"<|visual token {code:06d}|>")
    assert theirs(spelt, add_special_tokens=False)["input_ids"] == ids


def test_what_is_missing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no tokenizer\.json"):
        read_processor(tmp_path, LAYOUT)
    small_processor().tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=re.escape("has no token '<|visual token 000000|>'")) as caught:
        read_processor(tmp_path, LAYOUT)
    assert "\n" not in str(caught.value)


def test_names_that_configs_give_win(tmp_path: Path) -> None:
    write_processor(small_processor(), tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    extra = config.pop("extra_special_tokens")
    extra["eof_token"] = {"content": "<|unused 6153|>"}
    path.write_text(json.dumps(config | extra))
    assert read_processor(tmp_path, LAYOUT).processor.tokens == replace(TOKENS, eof=6153)
