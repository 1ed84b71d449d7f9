"""`convert` and `bind`: each value either comes out as its annotation asks, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Protocol

import pytest

from cantata.core import target
from cantata.core.errors import ConfigError
from cantata.core.schema import InvalidKey, bind, convert, dotted, slot

HERE = __name__


class Colour(Enum):
    red = "red"
    blue = "blue"


@dataclass(frozen=True)
class Leaf:
    size: int
    colour: Colour

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ConfigError(f"size={self.size} must not be negative")


@dataclass(frozen=True)
class Tree:
    leaves: dict[str, Leaf]
    rate: float | None
    part: dict[str, Any] = slot(runtime=("model",))


class Runner(Protocol):
    def run(self) -> None: ...


class Part:
    def __init__(self, model: object, width: int, leaf: Leaf, runner: Runner | None = None) -> None:
        self.model, self.width, self.leaf, self.runner = model, width, leaf, runner


class Unhinted:
    def __init__(self, value: NotImported, **rest: Any) -> None:  # type: ignore[name-defined] # noqa: F821
        self.value, self.rest = value, rest


@pytest.fixture(autouse=True)
def _allow_this_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "ALLOWED", ("cantata.", "torch.", "tests."))


def check(node: dict[str, Any], key: Any, runtime: tuple[str, ...]) -> Any:
    bind(node, key, runtime, check)
    return node


def part(**values: Any) -> dict[str, Any]:
    leaf = {"size": 1, "colour": "red"}
    return {"_target_": f"{HERE}.Part", "width": 2, "leaf": leaf, **values}


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (1, int, 1),
        (1, float, 1.0),
        (None, int | None, None),
        (3, int | None, 3),
        ("red", Colour, Colour.red),
        ("red", Colour | str, Colour.red),
        ("x", str | int, "x"),
        ("a/b", Path, Path("a/b")),
        ([1, 2], tuple[float, float], (1.0, 2.0)),
        ([1, 2, 3], tuple[int, ...], (1, 2, 3)),
        ([1, 2], Sequence[int], [1, 2]),
        ({64: 16}, Mapping[int, int], {64: 16}),
        ({"a": "red"}, dict[str, Colour], {"a": Colour.red}),
        ("train", Literal["train", "eval"], "train"),
        ({"free": [1, {"x": None}]}, Any, {"free": [1, {"x": None}]}),
        (7, Callable[[int], int], 7),
    ],
)
def test_converts(value: Any, annotation: Any, expected: Any) -> None:
    result = convert(value, annotation, ("k",), check)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation", "message"),
    [
        ("ten", int, "k must be an integer, not 'ten'"),
        (1.5, int, "k must be an integer, not 1.5"),
        (True, int, "k must be an integer, not True"),
        (1, bool, "k must be true or false, not 1"),
        (None, int, "k must be an integer, not null"),
        ("1e-3", float | None, "k must be a number, not '1e-3'"),
        (5, str, "k must be a string, not 5"),
        ("rde", Colour, r"one of red, blue \(nearest: red\), not 'rde'"),
        ("rde", Colour | str, "one of red, blue"),
        ([1], tuple[int, int], r"k must be a list of 2, not \[1\]"),
        ([1, "x"], list[int], "k.1 must be an integer"),
        ({"a": "x"}, dict[str, int], "k.a must be an integer"),
        ("x", int | float, "an integer or a number"),
        ("x", Literal["train"], "must be one of train"),
        (3, Runner, "a mapping with a _target_"),
        ("x", Leaf | None, "must be a mapping"),
        ({"size": 1}, Leaf, "k.colour is missing"),
        ({"size": "x", "colour": "red"}, Leaf | None, "k.size must be an integer"),
        ({"size": 1, "color": "red"}, Leaf, "k.color is not a known key; nearest: k.colour"),
        ({"size": -1, "colour": "red"}, Leaf, "k: size=-1 must not be negative"),
    ],
)
def test_refuses(value: Any, annotation: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(value, annotation, ("k",), check)


def test_dataclasses_nest_and_slots_stay_plain() -> None:
    leaves = {"a": {"size": 1, "colour": "blue"}}
    tree = convert({"leaves": leaves, "rate": 1, "part": part()}, Tree, (), check)
    assert tree == Tree({"a": Leaf(1, Colour.blue)}, 1.0, part())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widht": 1}, "part.widht is not an argument of .*Part; nearest: part.width"),
        ({"width": "x"}, "part.width must be an integer"),
        ({"leaf": {"size": 1, "colour": "green"}}, "part.leaf.colour must be one of"),
        ({"model": 1}, "part.model is passed to .* by the program"),
        ({"runner": {"_target_": "os.system"}}, "part.runner._target_ is os.system"),
        (
            {"runner": {"_target_": "torch.nn.Linear", "in_features": 1}},
            "part.runner.out_features is missing",
        ),
        ({"_partial_": "yes"}, "part._partial_ must be true or false"),
        ({"_recursive_": False}, "part._recursive_ is not an argument"),
        ({"_target_": 3}, "part._target_ must be a string"),
        ({"_target_": "torch.nn.Identity", "width": 3}, None),
        ({"_target_": "cantata.core.suggest.nearest"}, "part.width is not an argument"),
    ],
)
def test_slots_are_held_against_their_signature(change: dict[str, Any], message: str | None) -> None:
    node = {"leaves": {}, "rate": None, "part": part(**change)}
    if message is None:
        convert(node, Tree, (), check)
        return
    with pytest.raises(InvalidKey, match=message):
        convert(node, Tree, (), check)


def test_a_target_must_take_what_the_program_passes() -> None:
    node = {"_target_": "cantata.core.suggest.nearest", "name": "a", "options": ["b"]}
    with pytest.raises(InvalidKey, match="does not take 'model'"):
        bind(node, ("slot",), ("model",), check)


def test_a_missing_argument_is_looked_for_where_its_target_stands() -> None:
    node = part()
    del node["width"]
    with pytest.raises(InvalidKey, match=r"part\.width is missing") as caught:
        bind(node, ("part",), ("model",), check)
    assert caught.value.holder is not None
    assert dotted(caught.value.holder) == "part._target_"


def test_partial_may_lack_arguments_but_not_invent_them() -> None:
    node: dict[str, Any] = {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 1e-3}
    assert bind(node, ("optimizer",), (), check).partial
    with pytest.raises(InvalidKey, match=r"optimizer\.lrr .* nearest: optimizer\.lr"):
        bind({**node, "lrr": 1}, ("optimizer",), (), check)


def test_annotations_that_cannot_be_read_are_bound_by_name_alone() -> None:
    node = {"_target_": f"{HERE}.Unhinted", "value": "anything", "more": 1}
    assert bind(node, (), (), check).arguments == {"value": "anything", "more": 1}
