from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError

from cantata.core.chat_sandbox import GENERATION_END, GENERATION_START, compile_template, read_template
from cantata.core.errors import ConfigError

NOW = datetime(2026, 3, 5)


def rendered(source: str, **values: Any) -> str:
    return compile_template(source, NOW).render(**values)


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "05 Mar 2026"),
        ("{{ {'b': '<é>', 'a': 1}|tojson }}", '{"b": "<é>", "a": 1}'),
        ("{{ {'b': 1, 'a': 2}|tojson(sort_keys=true, separators=(',', ':')) }}", '{"a":2,"b":1}'),
        ("a\n  {% if true %}\nb\n  {% endif %}\nc", "a\nb\nc"),
        ("{% for n in [1, 2, 3] %}{% if n == 2 %}{% break %}{% endif %}{{ n }}{% endfor %}", "1"),
        ("a{% generation %}{{ '<' }}{% endgeneration %}b", f"a{GENERATION_START}<{GENERATION_END}b"),
    ],
)
def test_surroundings(source: str, wanted: str) -> None:
    assert rendered(source) == wanted


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ turns.pop() }}",
        "{{ raise_exception('no') }}",
        "{% generation %}",
    ],
)
def test_what_a_template_may_not(source: str) -> None:
    turns = [1, 2]
    with pytest.raises(TemplateError):
        rendered(source, turns=turns)
    assert turns == [1, 2]


def test_where_templates_lie(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one", "bos_token": None, "eos_token": "</s>"}))
    assert read_template(str(tmp_path)) == ("one", {"eos_token": "</s>"})
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert read_template(str(tmp_path)) == read_template(str(config)) == ("two", {})
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "three"}))
    assert read_template(str(tmp_path))[0] == "three"
    (tmp_path / "chat_template.jinja").write_text("four")
    assert read_template(str(tmp_path))[0] == "four"
    for path, content in [("x.json", "{"), ("y.json", "{}"), ("z.json", "[1]")]:
        (tmp_path / path).write_text(content)
        with pytest.raises(ConfigError, match=path):
            read_template(str(tmp_path / path))
    (tmp_path / "empty").mkdir()
    for path, why in [("empty", "holds no chat_template"), ("none", "no such file")]:
        with pytest.raises(ConfigError, match=why):
            read_template(str(tmp_path / path))
