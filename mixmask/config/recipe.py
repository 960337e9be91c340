"""A recipe: YAML file and dotted overrides -> a validated config; a hash of everything that decides its numbers."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, TypeVar

from mixmask.config.errors import ConfigError
from mixmask.config.evaluations import GIVEN
from mixmask.config.fields import build, convert, dotted, flatten, nearest, type_hints
from mixmask.config.schema import OPTIONAL_SETTINGS, Pretrain
from mixmask.config.values import read_yaml

T = TypeVar("T")


def apply_overrides(values: Mapping[str, Any], overrides: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """A copy of `values` with dotted keys replaced.

    Raises ConfigError for a key that is neither in the recipe nor a field of `cls`, or that goes through a plain value.
    """
    result = copy.deepcopy(values)
    known = set(flatten(result)) | _dotted_fields(cls)
    known |= {key for key in OPTIONAL_SETTINGS if key.split(".")[0] in result}
    for key, value in overrides.items():
        if key not in known and key not in GIVEN:  # those are refused with their reason
            raise ConfigError(f"unknown key '{key}'{nearest(key, known) or '; --keys lists them'}")
        *sections, last = key.split(".")
        target = result
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(f"{section}: expected a section of keys, found {target!r}")
        target[last] = value
    return result


@functools.cache
def _dotted_fields(cls: type, where: str = "") -> frozenset[str]:
    names, hints = set(), type_hints(cls)
    for spec in dataclasses.fields(cls):
        name = dotted(where, spec.name)
        names |= _dotted_fields(hints[spec.name], name) if dataclasses.is_dataclass(hints[spec.name]) else {name}
    return frozenset(names - {"settings"})


def resolve(values: Mapping[str, Any], overrides: Mapping[str, Any], cls: type[T]) -> T:
    """A recipe's mapping and dotted overrides -> a validated config of type `cls`."""
    original = dict(values)
    values = apply_overrides(values, overrides, cls)
    if cls is Pretrain:
        values = _take_settings(values, original)
    return build(cls, values)


def load(path: str | Path, overrides: Mapping[str, Any] | None = None, cls: type[T] = Pretrain) -> T:
    """Read a recipe file and apply overrides. Raises ConfigError naming file and key."""
    values = read_yaml(path)
    try:
        return resolve(values, overrides or {}, cls)
    except ConfigError as error:
        raise ConfigError(f"{error} (in {path})") from None


def _take_settings(values: dict[str, Any], original: Mapping[str, Any]) -> dict[str, Any]:
    """Move the section named after the framework to `settings`; `build_framework` checks it against the framework."""
    if "framework" not in values:  # missing or misspelt: build() says which
        build(Pretrain, {k: v for k, v in values.items() if not isinstance(v, Mapping)})
    name = values["framework"]
    if not isinstance(name, str) or not isinstance(values.get(name), Mapping):
        fields = {spec.name for spec in dataclasses.fields(Pretrain)}
        sections = [key for key, value in values.items() if isinstance(value, Mapping) and key not in fields]
        missing = f"framework: the recipe has no section '{name}:' with its settings"
        raise ConfigError(f"{missing}{nearest(name, sections)}")
    section = values.pop(name)
    optional = {key.split(".")[1]: value for key, value in OPTIONAL_SETTINGS.items() if key.startswith(f"{name}.")}
    given = {**optional, **original.get(name, {})}
    settings = {k: _setting(v, given.get(k, v), f"{name}.{k}") for k, v in section.items()}
    values["settings"] = {k: v for k, v in settings.items() if k not in optional or v != optional[k]}
    return values


def _setting(value: Any, given: Any, where: str) -> Any:
    """`value` as a number where the recipe's `given` is one, however written; otherwise in the type of `given`.

    1 and 1.0, 5e-1 (a string to YAML) and 0.5 are the same setting, and have the same hash.
    """
    number = isinstance(given, int | float) and not isinstance(given, bool)
    if isinstance(given, str):
        with contextlib.suppress(ValueError):
            number = math.isfinite(float(given))
    if not number:
        return convert(value, type(given), where)
    value = convert(value, float, where)
    return int(value) if value.is_integer() else value


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved config as plain types, in a recipe file's layout (what `config.yaml` of a run holds)."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists
    if isinstance(config, Pretrain):
        values[config.framework] = values.pop("settings")
    return values


def identity(config: Any) -> dict[str, Any]:
    """What decides the run's numbers: everything but `run`, `seed` and fields that are at their default."""
    values = _without_defaults(config)
    return {k: v for k, v in values.items() if k not in ("run", "seed")}


def _without_defaults(config: Any) -> dict[str, Any]:
    result = {}
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        if not spec.metadata.get("hashed", True) or (spec.default is not MISSING and value == spec.default):
            continue
        result[spec.name] = _without_defaults(value) if dataclasses.is_dataclass(value) else value
    return result


def hash8(config: Any) -> str:
    """Eight hexadecimal digits of the SHA-256 of `identity(config)`: equal digits are one run, whichever table asks."""
    text = json.dumps(identity(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
