"""Which image tokenizer made the codes that a model learned: what goes wherever its weights go."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cantata.core.errors import ConfigError
from cantata.core.locate import asset
from cantata.core.target import TARGET
from cantata.data.tokenized import read_manifest

FILE = "image_codes.json"
"""In an exported folder: `CodeOrigin`'s fields."""


class CodeOrigin(NamedTuple):
    """A tokenizer, by its digest, and the sizes (rows, columns) in pixels at which it made codes."""

    tokenizer: str
    sizes: list[list[int]]

    def require_same(self, other: CodeOrigin, here: str, there: str) -> None:
        """Raise `ConfigError` where the codes `here` are of another tokenizer than those `there`."""
        if self.tokenizer != other.tokenizer:
            raise ConfigError(
                f"the codes of {here} are another tokenizer's ({self.tokenizer[:12]}) than those of {there} "
                f"({other.tokenizer[:12]}); give codes of that one (cantata tokenize), or start anew"
            )

    def write(self, folder: Path) -> None:
        """Leave it in an exported folder."""
        (folder / FILE).write_text(json.dumps(self._asdict(), indent=2) + "\n", encoding="utf-8")


def read_origin(folder: Path) -> CodeOrigin | None:
    """What `CodeOrigin.write` left; None where it left nothing. `ConfigError` for anything else."""
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        return CodeOrigin(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file} does not name a tokenizer and its sizes; export the run again") from error


def origin_of(datasets: Iterable[tuple[str, Mapping[str, Any]]]) -> CodeOrigin | None:
    """What made the codes of datasets, given as (key in the config, slot); None where there are none.

    Raises `ConfigError` where they are of several tokenizers: a code would mean several things.
    """
    found: CodeOrigin | None = None
    first = ""
    for key, node in datasets:
        if not str(node.get(TARGET)).endswith(".TokenizedImages"):
            continue
        manifest = read_manifest(asset(node["path"]))
        origin = CodeOrigin(manifest["tokenizer"], manifest["sizes"])
        if found is None:
            found, first = origin, key
            continue
        origin.require_same(found, key, first)
        sizes = {tuple(size): size for size in [*found.sizes, *origin.sizes]}
        found = found._replace(sizes=list(sizes.values()))
    return found
