"""That a run goes on with the codes of the image tokenizer with which it began."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cantata.data.code_origin import CodeOrigin, origin_of, read_origin
from cantata.train.stage import LanguageStage, Stage

KEPT = "codes"
"""Under which a checkpoint's state says it."""


class LearnedCodes:
    """Travels in the checkpoints of a run that learns images as codes."""

    def __init__(self, origin: CodeOrigin) -> None:
        self._origin = origin

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return self._origin._asdict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises `ConfigError` where a checkpoint learned another tokenizer's codes."""
        self._origin.require_same(CodeOrigin(**state), "data.sources", "the checkpoint")


def learned_codes(stage: Stage) -> dict[str, LearnedCodes]:
    """What checkpoints keep of the codes that the run learns; nothing where it learns none.

    Raises `ConfigError` where they are of several tokenizers, or of another one than `model.weights` learned.
    """
    if not isinstance(stage, LanguageStage):
        return {}
    named = {"data.sources": stage.data.sources, "data.held_out": stage.data.held_out}
    origin = origin_of(
        (f"{key}.{name}", source.dataset) for key, group in named.items() for name, source in group.items()
    )
    if origin is None:
        return {}
    weights = stage.model.get("weights")
    before = None if weights is None else read_origin(Path(weights))
    if before is not None:
        origin.require_same(before, "data.sources", f"model.weights={weights}")
    return {KEPT: LearnedCodes(origin)}
