"""Rebuild the embedded tokenizer from the embedded data: `python -m cantata.tools.build_assets`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ASSETS = Path(__file__).resolve().parent.parent / "assets"

VOCAB_SIZE = 6144
"""A multiple of 128, so that the head's matrix products stay aligned."""

SPECIAL_TOKENS = {
    0: "<|endoftext|>",
    1: "<|pad|>",
    2: "<|im_start|>",
    3: "<|im_end|>",
    4: "<fim_prefix>",
    5: "<fim_suffix>",
    9: "<|img|>",  # the id that Aria's published tokenizer gives it
}
NUM_SPECIAL = 16

NAME_REPEATS = 4
"""Names are short beside the plays; repeated, they earn merges of their own and captions stay short."""


def texts(assets: Path) -> Iterator[str]:
    """The plays by paragraph, then names, groups and keywords of the emoji."""
    plays = (assets / "tinyshakespeare.txt").read_text(encoding="utf-8")
    yield from (f"{paragraph}\n\n" for paragraph in plays.split("\n\n"))
    columns = ["name", "group", "subgroup", "keywords"]
    for row in parquet.read_table(assets / "twemoji.parquet", columns=columns).to_pylist():
        yield from [row["name"]] * NAME_REPEATS
        yield from (row["group"], row["subgroup"], ", ".join(row["keywords"] or ()))


def train(assets: Path) -> Tokenizer:
    """Byte-level BPE: every byte has a token, so that any text survives the round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    reserved = [SPECIAL_TOKENS.get(index, f"<|reserved_{index}|>") for index in range(NUM_SPECIAL)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=reserved,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(assets), trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=ASSETS / "tokenizer.json", help="file to write")
    target: Path = parser.parse_args().to
    tokenizer = train(ASSETS)
    tokenizer.save(str(target), pretty=False)
    print(f"{target}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
