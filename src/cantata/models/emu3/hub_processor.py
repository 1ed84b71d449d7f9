"""Emu3's tokenizer as transformers reads it, to lie beside published weights."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from cantata.models.emu3.config import Emu3Tokens
from cantata.models.emu3.processor import Emu3Processor
from cantata.models.hub import write_json

PUBLISHED = {
    "bos": "<|extra_203|>",
    "eos": "<|extra_204|>",
    "pad": "<|endoftext|>",
    "boi": "<|image start|>",
    "img": "<|image token|>",
    "eol": "<|extra_200|>",
    "eof": "<|extra_201|>",
    "eoi": "<|image end|>",
}
"""How the authors' tokenizer spells the tokens of structure."""

ROLES = {
    "boi": "boi_token",
    "img": "image_wrapper_token",
    "eol": "eol_token",
    "eof": "eof_token",
    "eoi": "eoi_token",
}
"""What `tokenizer_config.json` calls those that not every tokenizer has."""

_NO_TEMPLATE = (
    "no chat_template.jinja: conversations are as Emu3-Chat's, 'USER: ... ASSISTANT:'; collator.processor."
    "chat_template would be written"
)


def visual_name(code: int) -> str:
    """How the authors' tokenizer spells a code."""
    return f"<|visual token {code:06d}|>"


def write_processor(processor: Emu3Processor, directory: Path) -> list[str]:
    """Write what `AutoTokenizer` loads from `directory`: ids above the text's get the authors' names.

    Returns lines on what could not be written.
    """
    tokenizer, names = _named(processor.tokenizer, processor.tokens)
    if tokenizer is None:
        return ["no tokenizer files: its ids have gaps, where no token can be put"]
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{role}_token": names[role] for role in ("bos", "eos", "pad")},
            "extra_special_tokens": {key: names[role] for role, key in ROLES.items()},
            "clean_up_tokenization_spaces": False,
        },
    )
    tokens = processor.tokens
    write_json(
        directory / "generation_config.json",
        {"bos_token_id": tokens.bos, "eos_token_id": tokens.eos, "pad_token_id": tokens.pad},
    )
    if processor.template is None:
        return [_NO_TEMPLATE]
    (directory / "chat_template.jinja").write_text(processor.template.source, encoding="utf-8")
    return []


def _named(text: Tokenizer, tokens: Emu3Tokens) -> tuple[Tokenizer | None, dict[str, str]]:
    """The tokenizer with a token for every id, None where that cannot be; the names of the structure."""
    tokenizer = Tokenizer.from_str(text.to_str())
    first = tokenizer.get_vocab_size(with_added_tokens=True)
    wanted = {tokens.visual_offset + code: visual_name(code) for code in range(tokens.codebook_size)}
    for role, token in tokens.structure().items():
        taken = tokenizer.token_to_id(PUBLISHED[role]) is not None
        wanted[token] = f"<|{role} {token}|>" if taken else PUBLISHED[role]
    # New tokens get the next ids, so that those in between must be filled.
    added = [wanted.get(token, f"<|unused {token}|>") for token in range(first, tokens.size)]
    tokenizer.add_special_tokens(added)
    is_whole = all(tokenizer.token_to_id(name) == first + i for i, name in enumerate(added))
    names = {role: tokenizer.id_to_token(token) for role, token in tokens.structure().items()}
    is_whole = is_whole and None not in names.values()
    return (tokenizer if is_whole else None), {role: str(name) for role, name in names.items()}
