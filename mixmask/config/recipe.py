"""A recipe: YAML file and dotted overrides -> a validated config; a hash of everything that decides its numbers."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mixmask.config.errors import ConfigError
from mixmask.config.fields import build, convert, dotted, flatten, nearest, type_hints
from mixmask.config.schema import GIVEN, Pretrain

T = TypeVar("T")


class Loader(yaml.SafeLoader):
    """YAML whose numbers are decimal: 010, 4:00, 0x1F and 1_000, which are 8, 240, 31 and 1000 in YAML 1.1, are words,
    and a key that wants a number refuses them.
    """


NUMBERS = {
    "int": r"[-+]?(0|[1-9][0-9]*)$",
    "float": r"([-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$",
}
Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in NUMBERS]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for name, pattern in NUMBERS.items():
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(pattern), list("-+.0123456789"))


def recipe_file(name: str | Path) -> Path:
    """A path as it is; where no such file exists, a bare name, `cifar100_moco`, is the recipe that came with the code."""
    path, package = Path(name), Path(__file__).resolve().parents[1]
    if path.exists() or len(path.parts) > 1:
        return path
    homes = (package, package.parent)  # in a wheel the stages lie in the package, in a checkout beside it
    found = [home / stage / "configs" / f"{path.stem}.yaml" for home in homes for stage in ("pretrain", "eval")]
    return next((file for file in found if file.exists()), path)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises ConfigError naming the file (and line) when it does not."""
    try:
        values = yaml.load(recipe_file(path).read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        raise ConfigError(f"no such config file: {path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(values).__name__}")
    return values


def parse_overrides(items: Iterable[str]) -> dict[str, Any]:
    """`["mask.grid=4", "method=mixmask"]` -> {"mask.grid": 4, "method": "mixmask"}; values are YAML.

    Raises ConfigError for an item that has no key or no "=", or whose value is not YAML.
    """
    overrides = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {item}: expected key=value")
        try:
            overrides[key] = yaml.load(text, Loader)
        except yaml.YAMLError:
            raise ConfigError(f"--set {item}: '{text}' is not a YAML value") from None
    return overrides


def apply_overrides(values: Mapping[str, Any], overrides: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """A copy of `values` with dotted keys replaced.

    Raises ConfigError for a key that is neither in the recipe nor a field of `cls`, or that goes through a plain value.
    """
    result = copy.deepcopy(values)
    known = set(flatten(result)) | _dotted_fields(cls)
    for key, value in overrides.items():
        if key not in known and key not in GIVEN:  # those are refused with their reason
            raise ConfigError(f"unknown key '{key}'{nearest(key, known)}")
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
    section, given = values.pop(name), original.get(name, {})
    values["settings"] = {k: _setting(v, given.get(k, v), f"{name}.{k}") for k, v in section.items()}
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
