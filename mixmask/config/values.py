"""Files and command lines as plain values: YAML without its surprising conversions.

In YAML 1.1 010 is 8, 4:00 is 240, 1_000 is 1000, `no` is false, 2024-01-01 is a date, and ` #` begins a comment. Here
numbers are decimal, `true` and `false` are the only truth values, and all else is text, as it stands.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from mixmask.config.errors import ConfigError
from mixmask.config.fields import DECIMAL


class Loader(yaml.SafeLoader):
    """YAML with decimal numbers, true and false, and null; a key that wants a number refuses other spellings.

    A key that appears twice in a section is refused: YAML would silently take the last one.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{name}' appears twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


PLAIN = {
    "int": (r"(0|-?[1-9][0-9]*)$", "-0123456789"),  # only as Python writes it: where a text is expected it is one
    "float": (rf"{DECIMAL.pattern}$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$", "-+.0123456789"),
    "bool": (r"(true|false)$", "tf"),
    "null": (r"(~|null|Null|NULL|)$", ("~", "n", "N", "")),
}
Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] == "merge"]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for name, (pattern, letters) in PLAIN.items():
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(pattern), list(letters))


def parse_yaml(text: str) -> Any:
    """The one document of a text. Raises yaml.YAMLError."""
    loader = Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def recipe_file(name: str | Path) -> Path:
    """A path as it is; if there is no such file, a bare name stands for a bundled recipe."""
    path = Path(name)
    if path.exists() or len(path.parts) > 1:
        return path
    return recipes().get(path.stem, path)


def recipes() -> dict[str, Path]:
    """The bundled recipes, by name."""
    package = Path(__file__).resolve().parents[1]
    homes = (package.parent, package)  # in a wheel the stages lie in the package, in a checkout beside it
    folders = [home / stage / "configs" for home in homes for stage in ("eval", "pretrain")]
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises ConfigError naming the file (and line) when it does not."""
    try:
        values = parse_yaml(recipe_file(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        close = difflib.get_close_matches(Path(path).stem, recipes(), n=1)
        hint = f"; did you mean the bundled recipe {close[0]}?" if close else ""
        raise ConfigError(f"no such config file: {path}{hint}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        found = "none" if values is None else f"a {type(values).__name__}"
        raise ConfigError(f"{path}: expected keys and values, found {found}")
    return values


def parse_overrides(items: Iterable[str]) -> dict[str, Any]:
    """`["mask.grid=4", "method=mixmask"]` -> {"mask.grid": 4, "method": "mixmask"}.

    A value is a number, true or false, a list, a mapping or a quoted text as YAML has them, or else the text as it
    stands. Raises ConfigError for an item without a key or "=", and for brackets or quotes that do not close.
    """
    overrides = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {item}: expected key=value")
        overrides[key] = _value(text.strip(), item)
    return overrides


def _value(text: str, item: str) -> Any:
    scalar = any(re.match(PLAIN[name][0], text) for name in ("int", "float", "bool"))
    if not scalar and not text.startswith(("[", "{", '"', "'")):
        return text
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {item}: {text!r} is not a YAML value; quote it if it is text") from None
