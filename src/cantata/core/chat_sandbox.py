"""Jinja chat templates as Hugging Face ships them: where they lie, and a sandbox that renders them.

A template is another's program. It runs in jinja2's immutable sandbox and sees plain strings, lists and
mappings. The surroundings are those that such templates are written for: blocks trimmed, loop controls,
`raise_exception`, `strftime_now`, `tojson`, and `{% generation %}` around what an assistant says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cantata.core.errors import ConfigError
from cantata.core.locate import asset

JINJA_FILE, JSON_FILE, TOKENIZER_FILE = "chat_template.jinja", "chat_template.json", "tokenizer_config.json"

GENERATION_START, GENERATION_END = "\ue002", "\ue003"
"""Private-use characters that stand in a rendering where `{% generation %}` begins and ends."""


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: marks its body in the rendering."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{GENERATION_START}{caller()}{GENERATION_END}"


def compile_template(source: str, now: datetime) -> Template:
    """The template, ready to render. `now` is what it takes for the present. Raises `TemplateError`."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = now.strftime
    return environment.from_string(source)


def read_template(path: str) -> tuple[str, dict[str, str]]:
    """The source of a chat template, and the names of special tokens (`eos_token`, ...) that lie beside it.

    Args:
        path: a Jinja file, a JSON file with the key `chat_template`, or a checkpoint's folder that holds one;
            `embedded:` names one of the package.

    Raises `ConfigError` where there is none.
    """
    found = asset(path)
    folder = found if found.is_dir() else found.parent
    beside = _json(folder / TOKENIZER_FILE)
    tokens = {name: _token(value) for name, value in beside.items() if name.endswith("_token")}
    files = [found / name for name in (JINJA_FILE, JSON_FILE, TOKENIZER_FILE)] if found.is_dir() else [found]
    for file in files:
        source = _source(file)
        if source is not None:
            return source, {name: token for name, token in tokens.items() if token is not None}
    where = f"the folder holds no {JINJA_FILE}, and no" if found.is_dir() else "the file has no"
    raise ConfigError(f"{path}: {where} JSON file with a chat_template")


def _source(file: Path) -> str | None:
    if file.suffix != ".json":
        try:
            return file.read_text(encoding="utf-8") if file.is_file() else None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: no readable template: {error}") from error
    found = _json(file).get("chat_template")
    if isinstance(found, list):
        # Several, named: the one for conversations without tools and documents is called default.
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: no readable JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _token(value: Any) -> str | None:
    found = value.get("content") if isinstance(value, Mapping) else value
    return found if isinstance(found, str) else None


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes HTML, which no model reads."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
