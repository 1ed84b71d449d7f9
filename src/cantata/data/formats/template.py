"""Turns written from the columns of a table."""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter
from typing import Any

from cantata.core.errors import ConfigError
from cantata.core.samples import Chat
from cantata.data.formats.base import Media, Record, required
from cantata.data.formats.chat import ROLES, conversation


class Template:
    """A chat with a turn for each role: `{user: "<image>Is it true? {sentence}", assistant: "{label}"}`.

    Args:
        turns: what each role says, in this order, with columns in braces and a placeholder for each file.

    Raises `ConfigError` for an unknown role or a text that is no format string.
    """

    def __init__(self, turns: Mapping[str, str]) -> None:
        self.turns = dict(turns)
        self.columns: set[str] = set()
        for role, text in self.turns.items():
            if role not in ROLES:
                raise ConfigError(f"template.{role}: no role; known: {', '.join(ROLES)}")
            try:
                fields = [name for _, name, _, _ in Formatter().parse(text) if name is not None]
            except ValueError as error:
                raise ConfigError(f"template.{role}: {error} in {text!r}") from error
            if not all(name.isidentifier() for name in fields):
                raise ConfigError(f"template.{role}: braces hold a column's name; double those meant as text")
            self.columns |= set(fields)

    def __call__(self, record: Record, media: Media) -> Chat:
        values: dict[str, Any] = {name: required(record, name) for name in self.columns}
        turns = [{"role": role, "content": text.format_map(values)} for role, text in self.turns.items()]
        return conversation(turns, {**record, "system": None, "tools": None}, media)
