"""The tokenizer beside published weights: a token for every id, spelt as the authors do where they can be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer

from cantata.models.emu3.hub_processor import PUBLISHED, visual_name, write_processor
from tests.models.emu3.small import TOKENS, small_processor

TEXT_SIZE = 6144


def written(folder: Path, **tokens: int) -> Tokenizer:
    write_processor(small_processor(tokens=replace(TOKENS, **tokens)), folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_codes_are_spelt_as_published() -> None:
    assert visual_name(7) == "<|visual token 000007|>"
    assert visual_name(32767) == "<|visual token 032767|>"


def test_every_id_has_a_token(tmp_path: Path) -> None:
    """Between structure and codes too, where nothing is."""
    tokenizer = written(tmp_path)
    assert tokenizer.get_vocab_size(with_added_tokens=True) == TOKENS.size
    spelt = {token: tokenizer.id_to_token(token) for token in range(TEXT_SIZE, TOKENS.size)}
    assert spelt[TOKENS.bos] == PUBLISHED["bos"]
    assert spelt[TOKENS.eoi] == PUBLISHED["eoi"]
    for code in range(TOKENS.codebook_size):
        assert spelt[TOKENS.visual_offset + code] == visual_name(code)
    assert spelt[6155] == "<|unused 6155|>"
    assert len(set(spelt.values())) == len(spelt)


def test_names_of_the_text_are_told_apart_from_the_structures(tmp_path: Path) -> None:
    """`<|endoftext|>` is the text's own token 0; padding elsewhere gets a name of its own."""
    tokenizer = written(tmp_path, pad=6152)
    assert tokenizer.id_to_token(6152) == "<|pad 6152|>"
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["pad_token"] == "<|pad 6152|>"
    assert config["extra_special_tokens"]["image_wrapper_token"] == PUBLISHED["img"]
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 6144, "eos_token_id": 6145, "pad_token_id": 6152}


def test_structure_may_be_tokens_of_the_text(tmp_path: Path) -> None:
    tokenizer = written(tmp_path, bos=2, eos=3)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == (tokenizer.id_to_token(2), tokenizer.id_to_token(3))
    assert tokenizer.id_to_token(2) == "<|im_start|>"


def test_the_text_is_cut_as_before(tmp_path: Path) -> None:
    tokenizer, own = written(tmp_path), small_processor().tokenizer
    for text in ("Is't naïve?", " a  b\n\t😀"):
        assert tokenizer.encode(text).ids == own.encode(text, add_special_tokens=False).ids


def test_a_vocabulary_that_spells_a_code_already_is_not_written(tmp_path: Path) -> None:
    """The token would keep its own id, and the code's would stay empty."""
    processor = small_processor()
    processor.tokenizer = Tokenizer.from_str(processor.tokenizer.to_str())
    processor.tokenizer.add_tokens([visual_name(3)])
    [note] = write_processor(processor, tmp_path)
    assert note.startswith("no tokenizer files: ")
    assert not list(tmp_path.iterdir())
