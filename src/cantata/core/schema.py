"""Plain values against type annotations: dataclasses, constructors and everything inside them.

One walk serves twice. `load` runs it to check a config before anything is built, `build` runs it to
turn the same values into what the constructors take (enums, paths, dataclasses, nested targets).
"""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from cantata.core.errors import ConfigError
from cantata.core.suggest import hint, nearest
from cantata.core.target import TARGET, find_target

PARTIAL = "_partial_"

Key = tuple[str | int, ...]
"""Path of a value from the root of the config."""

OnTarget = Callable[[dict[str, Any], Key, tuple[str, ...]], Any]
"""What becomes of a `_target_` node, given its key and the names of its runtime arguments."""

_RUNTIME = "runtime"


def dotted(key: Key) -> str:
    """The key as a user writes it on the command line."""
    return ".".join(str(part) for part in key)


class InvalidKey(ConfigError):
    """A value that its schema does not take; `holder` is the key whose file must change."""

    def __init__(self, key: Key, text: str, holder: Key | None = None) -> None:
        super().__init__(f"{dotted(key)} {text}")
        self.key = key
        self.holder = holder


class Bound(NamedTuple):
    """A target with converted arguments."""

    target: Callable[..., Any]
    arguments: dict[str, Any]
    partial: bool


def slot(*, runtime: tuple[str, ...] = ()) -> Any:
    """A dataclass field that holds a `_target_` node.

    `runtime` names the arguments that the program passes when it builds the slot.
    """
    return dataclasses.field(metadata={_RUNTIME: runtime})


def convert(value: Any, annotation: Any, key: Key, on_target: OnTarget) -> Any:
    """`value` as `annotation` asks for it; raises `InvalidKey`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return convert(value, arguments[0], key, on_target)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, arguments, key, on_target)
    if isinstance(value, dict) and TARGET in value and not _is_scalar(annotation):
        return on_target(value, key, ())
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise InvalidKey(key, f"must be one of {', '.join(map(str, arguments))}, not {value!r}")
    if getattr(annotation, "_is_protocol", False):
        raise _mismatch(value, f"a mapping with a {TARGET}", key)
    if _is_open(annotation):
        return _convert_open(value, key, on_target)
    kind = origin or annotation
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _convert_dataclass(value, kind, key, on_target)
    if issubclass(kind, Mapping):
        of_keys, of_values = arguments or (Any, Any)
        _require(isinstance(value, dict), value, "a mapping", key)
        return {
            convert(k, of_keys, (*key, k), on_target): convert(v, of_values, (*key, k), on_target)
            for k, v in value.items()
        }
    if issubclass(kind, collections.abc.Iterable) and not issubclass(kind, (str, bytes, Enum)):
        return _convert_sequence(value, kind, arguments, key, on_target)
    return _convert_scalar(value, kind, key)


def bind(node: dict[str, Any], key: Key, runtime: Collection[str], on_target: OnTarget) -> Bound:
    """Check a `_target_` node against its constructor's signature and convert the arguments.

    Raises `InvalidKey` for a target that is not allowed or not there, an argument that it does not
    take, one that it needs and nobody gives, and one of a wrong type.
    """
    name = convert(node[TARGET], str, (*key, TARGET), on_target)
    try:
        target = find_target(name)
    except ConfigError as error:
        raise InvalidKey((*key, TARGET), f"is {name}: {error}") from error
    partial = convert(node.get(PARTIAL, False), bool, (*key, PARTIAL), on_target)
    given = {k: v for k, v in node.items() if k not in (TARGET, PARTIAL)}
    parameters = inspect.signature(target).parameters
    named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    is_open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for argument in given:
        if argument in runtime:
            raise InvalidKey((*key, argument), f"is passed to {name} by the program and cannot be configured")
        if argument not in named and not is_open:
            near = _near((*key, argument), set(named) - set(runtime))
            raise InvalidKey((*key, argument), f"is not an argument of {name}{near}")
    for argument in runtime:
        if argument not in named and not is_open:
            raise InvalidKey((*key, TARGET), f"is {name}, which does not take {argument!r} from the program")
    for argument, parameter in named.items():
        if parameter.default is parameter.empty and argument not in {*given, *runtime} and not partial:
            raise InvalidKey((*key, argument), f"is missing; {name} needs it", holder=(*key, TARGET))
    hints = _hints(target)
    arguments = {n: convert(v, hints.get(n, Any), (*key, n), on_target) for n, v in given.items()}
    return Bound(target, arguments, partial)


def _convert_dataclass(value: Any, schema: type, key: Key, on_target: OnTarget) -> Any:
    if isinstance(value, schema):
        return value
    _require(isinstance(value, dict), value, "a mapping", key)
    fields = {f.name: f for f in dataclasses.fields(schema) if f.init}
    for name in value:
        if name not in fields:
            raise InvalidKey((*key, name), f"is not a known key{_near((*key, name), fields)}")
    for name, field in fields.items():
        if name not in value and field.default is field.default_factory is dataclasses.MISSING:
            raise InvalidKey((*key, name), "is missing", holder=key)
    hints = typing.get_type_hints(schema)
    arguments = {}
    for name, item in value.items():
        runtime = fields[name].metadata.get(_RUNTIME)
        if runtime is not None and item is not None:
            is_node = isinstance(item, dict) and TARGET in item
            _require(is_node, item, f"a mapping with a {TARGET}", (*key, name))
            arguments[name] = on_target(item, (*key, name), runtime)
        else:
            arguments[name] = convert(item, hints[name], (*key, name), on_target)
    try:
        return schema(**arguments)
    except ConfigError as error:
        if dotted(key) in str(error):
            raise
        raise ConfigError(f"{dotted(key)}: {error}") from error


def _convert_union(value: Any, members: tuple[Any, ...], key: Key, on_target: OnTarget) -> Any:
    if value is None and type(None) in members:
        return None
    enums = [member for member in members if isinstance(member, type) and issubclass(member, Enum)]
    errors = []
    # `Kind | str` lets code pass a name as well; what a config names must be a member.
    for member in enums or members:
        if member is type(None):
            continue
        try:
            return convert(value, member, key, on_target)
        except InvalidKey as error:
            errors.append((member, error))
    deepest = max((error for _, error in errors), key=lambda error: len(error.key))
    if len(errors) == 1 or len(deepest.key) > len(key):
        raise deepest
    raise _mismatch(value, " or ".join(_describe(member) for member, _ in errors), key)


def _convert_open(value: Any, key: Key, on_target: OnTarget) -> Any:
    if isinstance(value, dict):
        return {k: convert(v, Any, (*key, k), on_target) for k, v in value.items()}
    if isinstance(value, list):
        return [convert(v, Any, (*key, i), on_target) for i, v in enumerate(value)]
    return value


def _convert_sequence(value: Any, kind: type, members: tuple[Any, ...], key: Key, on_target: OnTarget) -> Any:
    _require(isinstance(value, list), value, "a list", key)
    fixed = issubclass(kind, tuple) and members and members[-1] is not Ellipsis
    if fixed:
        _require(len(value) == len(members), value, f"a list of {len(members)}", key)
    kinds = members if fixed else [members[0] if members else Any] * len(value)
    items = [convert(v, kinds[i], (*key, i), on_target) for i, v in enumerate(value)]
    return kind(items) if kind in (tuple, set, frozenset) else items


def _convert_scalar(value: Any, kind: type, key: Key) -> Any:
    if issubclass(kind, Enum):
        for member in kind:
            if value is member or value == member.value:
                return member
        near = nearest(str(value), [str(member.value) for member in kind])
        raise _mismatch(value, _describe(kind) + (f" (nearest: {near})" if near else ""), key)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    _require(fits, value, _describe(kind), key)
    return value


def _is_scalar(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, (str, int, float, Enum, Path))


def _is_open(annotation: Any) -> bool:
    """Annotations that a plain value cannot be held against: Any, callables, type variables."""
    if annotation in (Any, object, inspect.Parameter.empty) or isinstance(annotation, (typing.TypeVar, str)):
        return True
    kind: Any = typing.get_origin(annotation) or annotation
    return not isinstance(kind, type) or kind is collections.abc.Callable


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    is_plain_class = isinstance(target, type) and not dataclasses.is_dataclass(target)
    try:
        return typing.get_type_hints(target.__init__ if is_plain_class else target)
    except (NameError, TypeError):
        # Names that only a type checker imports: such a signature is bound by name alone.
        return {}


def _near(key: Key, names: Collection[str]) -> str:
    parent = dotted(key[:-1])
    text = hint(str(key[-1]), names)
    return text.replace("nearest: ", f"nearest: {parent}.") if parent else text


def _require(holds: bool, value: Any, expected: str, key: Key) -> None:
    if not holds:
        raise _mismatch(value, expected, key)


def _mismatch(value: Any, expected: str, key: Key) -> InvalidKey:
    shown = "null" if value is None else repr(value)
    return InvalidKey(key, f"must be {expected}, not {shown if len(shown) < 80 else shown[:77] + '...'}")


def _describe(kind: Any) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string", Path: "a path"}
    if kind in names:
        return names[kind]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(str(member.value) for member in kind)
    kind = typing.get_origin(kind) or kind
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return "a mapping"
    if isinstance(kind, type) and issubclass(kind, (Sequence, set, frozenset)):
        return "a list"
    return f"of type {getattr(kind, '__name__', kind)}"
