"""Plain values -> typed, range-checked dataclasses; every mistake is named by its dotted key."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, field
from typing import Any, Literal, TypeVar, get_args, get_origin

from mixmask.config.errors import ConfigError

T = TypeVar("T")

type_hints = functools.cache(typing.get_type_hints)

LISTED = 24  # names that a message lists; more would bury it

DECIMAL = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
OTHERWISE = re.compile(rf"(?!{DECIMAL.pattern}$)[-+]?[0-9][0-9a-fA-F_:xob.]*")  # octal, hexadecimal, base 60, 1_000


def within(low: float | None = None, high: float | None = None, default: Any = MISSING, interval: bool = False) -> Any:
    """A dataclass field whose number (or each number of a tuple) lies in [low, high]; `interval`: smaller one first."""
    return field(default=default, metadata={"low": low, "high": high, "interval": interval})


def check_fields(config: Any) -> None:
    """The `__post_init__` of settings that other programs make themselves: each field is checked as a recipe's is.

    Raises ConfigError, which names the field. A whole number that stands for a float becomes one, a list a tuple.
    """
    hints = type_hints(type(config))
    for spec in dataclasses.fields(config):
        where = f"{type(config).__name__}.{spec.name}"
        value = _check(convert(getattr(config, spec.name), hints[spec.name], where), spec, where)
        object.__setattr__(config, spec.name, value)


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """`values` as an instance of the dataclass `cls`. Raises ConfigError for an unknown, missing or wrong key."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or 'the recipe'}: expected a section of keys, found {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise ConfigError(f"unknown key '{dotted(where, key)}'{nearest(key, fields, where)}")
    hints = type_hints(cls)
    result = {}
    for name, spec in fields.items():
        if name in values:
            result[name] = _check(convert(values[name], hints[name], dotted(where, name)), spec, dotted(where, name))
        elif spec.default is MISSING and spec.default_factory is MISSING:
            raise ConfigError(f"missing key '{dotted(where, name)}'")
    return cls(**result)


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotated type; YAML's `1e-4` (a string) and whole-numbered floats are understood.

    Raises ConfigError, which names the key (`where`, dotted), for any other value.
    """
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}: expected one of {', '.join(map(str, args))}; found {value!r}")
        return value
    if origin in (types.UnionType, typing.Union):
        hint = args[1] if isinstance(value, list | tuple) else args[0]
        return convert(value, hint, where)
    if origin is tuple:
        return _convert_tuple(value, args, where)
    if hint is float and (type(value) in (int, float) or (type(value) is str and DECIMAL.fullmatch(value))):
        if math.isfinite(float(value)):
            return float(value)
    elif hint is Any or type(value) is hint or (origin in (Mapping, dict) and isinstance(value, Mapping)):
        return value
    if hint is bool and value in ("True", "TRUE", "False", "FALSE"):
        return value.lower() == "true"
    if hint is str and type(value) in (int, bool):  # a text that looks like one
        return str(value).lower()
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text; quote what looks like a number",
    }
    decimal = ", which is not a decimal number" if isinstance(value, str) and OTHERWISE.fullmatch(value) else ""
    raise ConfigError(f"{where}: expected {names.get(hint, hint)}, found {value!r}{decimal}")


def _convert_tuple(value: Any, args: tuple, where: str) -> tuple:
    if not isinstance(value, list | tuple):
        example = f", such as [{value}];" if isinstance(value, str) else ","
        raise ConfigError(f"{where}: expected a list{example} found {value!r}")
    many = args[-1] is Ellipsis
    if not many and len(value) != len(args):
        raise ConfigError(f"{where}: expected {len(args)} values, found {len(value)}")
    return tuple(convert(v, args[0] if many else args[i], f"{where}[{i}]") for i, v in enumerate(value))


def _check(value: Any, spec: dataclasses.Field, where: str) -> Any:
    low, high = spec.metadata.get("low"), spec.metadata.get("high")
    for number in value if isinstance(value, tuple) else (value,):
        if (low is not None and not number >= low) or (high is not None and not number <= high):
            bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ConfigError(f"{where}: expected {bounds}, found {number!r}")
    if spec.metadata.get("interval") and isinstance(value, tuple) and value[0] > value[1]:
        raise ConfigError(f"{where}: expected the smaller number first, found {list(value)}")
    return value


def dotted(where: str, key: str) -> str:
    return f"{where}.{key}" if where else str(key)


def nearest(key: str, known: Iterable[str], where: str = "") -> str:
    """A hint: '; did you mean X?', or the list of what there is (in the section `where`) where that is short.

    A dotted key is found by its last part, too.
    """
    key, known = str(key), sorted(map(str, known))
    last = {name: name.rpartition(".")[2] for name in known}
    close = [name for name in known if last[name] == key] or difflib.get_close_matches(key, known, n=1)
    if not close and (part := difflib.get_close_matches(key.rpartition(".")[2], set(last.values()), n=1)):
        close = [name for name in known if last[name] == part[0]]
    if close:
        return f"; did you mean {' or '.join(repr(dotted(where, name)) for name in close)}?"
    return f"; known keys: {', '.join(known)}" if len(known) <= LISTED else ""


def flatten(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    flat = {}
    for key, value in values.items():
        flat.update(flatten(value, dotted(where, key)) if isinstance(value, Mapping) else {dotted(where, key): value})
    return flat
