"""Language models by what a folder's `config.json` calls them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from cantata.core.errors import ConfigError
from cantata.models import aria, emu3, mllama
from cantata.models.aria import hub_reader as aria_reader
from cantata.models.emu3 import hub_reader as emu3_reader
from cantata.models.emu3.hf import MODEL_TYPES
from cantata.models.hub import CONFIG, read_json
from cantata.models.mllama import hub_reader as mllama_reader
from cantata.models.mllama.hf import MODEL_TYPES as MLLAMA_TYPES


class Family(NamedTuple):
    """Who reads the folders of a family."""

    build: Callable[[Path], nn.Module]
    """The model that `config.json` describes, without its weights."""
    read_processor: Callable[[Path, Any], Any]
    """From the folder and the model's layout: `processor`, `no_images` and `notes`."""


ARIA = Family(aria.aria_from_hub, aria_reader.read_processor)
EMU3 = Family(emu3.emu3_from_hub, emu3_reader.read_processor)
MLLAMA = Family(mllama.mllama_from_hub, mllama_reader.read_processor)
BY_TYPE = {
    "aria": ARIA,
    **dict.fromkeys(MODEL_TYPES, EMU3),
    **dict.fromkeys(MLLAMA_TYPES, MLLAMA),
}
"""By `model_type`."""


def family_of(folder: Path) -> Family:
    """The family of a Hugging Face folder.

    Raises `ConfigError` for one that none is known of.
    """
    kind = read_json(folder / CONFIG).get("model_type")
    if kind not in BY_TYPE:
        raise ConfigError(
            f"{folder / CONFIG} has model_type={kind!r}; language models are {', '.join(BY_TYPE)} (an image "
            "tokenizer is given with --tokenizer)"
        )
    return BY_TYPE[kind]
