"""Shapes and token ids of Emu3; each class is the schema of one YAML section."""

from __future__ import annotations

from dataclasses import dataclass, fields

from cantata.core.errors import ConfigError


@dataclass(frozen=True)
class Emu3TextConfig:
    """The decoder: Llama's, with dropout."""

    vocab_size: int
    """Text, structure and visual tokens together."""
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    dropout: float
    """Share of attention probabilities, and of what a block's parts add, that training zeroes."""
    max_position_embeddings: int
    """Longest context that an exported checkpoint claims; training does not read it."""
    tie_word_embeddings: bool
    initializer_range: float
    bos_token_id: int
    """This and the next two go into an exported `config.json`; training does not read them."""
    eos_token_id: int
    pad_token_id: int

    def __post_init__(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if kv_heads < 1 or heads % kv_heads:
            raise ConfigError(
                f"model.text.num_key_value_heads is {kv_heads}; it must divide num_attention_heads ({heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"model.text.head_dim is {self.head_dim}; rotary positions need an even number")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.text.dropout is {self.dropout}; it must be at least 0 and below 1")


@dataclass(frozen=True)
class Emu3Tokens:
    """Ids of the tokens that are not text. They may lie above the text tokenizer's vocabulary."""

    bos: int
    """Begins every sample."""
    eos: int
    """Ends every sample, and what an assistant says."""
    pad: int
    """Fills up a batch; no sample holds it."""
    boi: int
    """Begins an image; its size in text follows."""
    img: int
    """Between an image's size and its codes."""
    eol: int
    """Ends a row of codes."""
    eof: int
    """Ends a frame."""
    eoi: int
    """Ends an image or a clip."""
    visual_offset: int
    """Id of code 0; the other codes follow."""
    codebook_size: int
    """Number of codes."""

    def __post_init__(self) -> None:
        if self.codebook_size < 1:
            raise ConfigError(f"tokens.codebook_size={self.codebook_size} must be at least 1")
        if self.visual_offset < 0:
            raise ConfigError(f"tokens.visual_offset={self.visual_offset} must be at least 0")
        known: dict[int, str] = {}
        for name, token in self.structure().items():
            if token < 0:
                raise ConfigError(f"tokens.{name}={token} must be at least 0")
            if token in known:
                raise ConfigError(f"tokens.{name} and tokens.{known[token]} are both {token}")
            if self.is_visual(token):
                first, last = self.visual_offset, self.end_of_visual - 1
                raise ConfigError(f"tokens.{name}={token} lies among the codes' ids, {first} to {last}")
            known[token] = name

    @property
    def end_of_visual(self) -> int:
        """One more than the id of the last code."""
        return self.visual_offset + self.codebook_size

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.end_of_visual, *(token + 1 for token in self.structure().values()))

    def structure(self) -> dict[str, int]:
        """Ids by name, those of codes left out."""
        names = [item.name for item in fields(self) if item.name not in ("visual_offset", "codebook_size")]
        return {name: getattr(self, name) for name in names}

    def is_visual(self, token: int) -> bool:
        """Whether an id is that of a code."""
        return self.visual_offset <= token < self.end_of_visual
