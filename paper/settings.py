"""Tables 8, 9 and 10: our recipes' hyper-parameters beside the printed ones, which are in paper/settings/*.yaml.

A value that differs from the printed one must state its reason; one that agrees must not. No torch here.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mixmask.config import ConfigError, build, flatten, read_yaml
from paper.cells import ROOT
from paper.markup import Footnotes, Sheet

NO_RECIPE = "no recipe yet"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A printed hyper-parameter."""

    name: str
    value: Any  # as printed; a list: one value for each of the column's lists of recipes, printed with slashes
    key: str = ""  # dotted, in our recipes; {framework} stands for the recipe's own section
    fixed: str = ""  # why there is no key
    departure: str = ""  # why ours differs


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of settings, and the recipes that it describes."""

    name: str
    folder: str
    recipes: tuple[tuple[str, ...], ...]
    rows: tuple[Setting, ...]


def names() -> list[str]:
    """table8, table9, table10."""
    return sorted((path.stem for path in (ROOT / "paper" / "settings").glob("*.yaml")), key=lambda n: (len(n), n))


def collect(name: str) -> pd.DataFrame:
    """One row a setting: column, hparam, key, published, ours, note.

    Raises ConfigError for a departure without a reason, and for a reason without a departure.
    """
    rows = []
    for column in _columns(name):
        for setting in column.rows:
            ours = _ours(column, setting)
            _check(f"{name}: {column.name}: {setting.name}", setting, ours)
            note = setting.departure or setting.fixed
            place = {"column": column.name, "hparam": setting.name, "key": setting.key}
            rows.append({**place, "published": _printed(setting.value), "ours": ours, "note": note})
    return pd.DataFrame(rows)


def _columns(name: str) -> list[Column]:
    return [build(Column, entry, name) for entry in _file(name)["columns"]]


@functools.cache
def _file(name: str) -> dict[str, Any]:
    return read_yaml(ROOT / "paper" / "settings" / f"{name}.yaml")


@functools.cache
def _recipe(path: Path) -> dict[str, Any]:
    return flatten(read_yaml(path))


def _ours(column: Column, setting: Setting) -> str:
    """The value in the recipes: one where all agree, else one for each list of them."""
    if not column.recipes:
        return NO_RECIPE
    if setting.fixed:
        return _printed(setting.value)
    parts = [_common(column, part, setting) for part in column.recipes]
    return parts[0] if len(set(parts)) == 1 else "/".join(parts)


def _common(column: Column, recipes: tuple[str, ...], setting: Setting) -> str:
    """The one value of `recipes`; a recipe without the key has no say."""
    values = [_value(_recipe(ROOT / column.folder / f"{recipe}.yaml"), setting.key) for recipe in recipes]
    distinct = sorted({_text(value) for value in values if value is not None})
    if len(distinct) != 1:
        raise ConfigError(f"{setting.key}: expected one value in {', '.join(recipes)}, found {distinct or 'none'}")
    return distinct[0]


def _value(recipe: Mapping[str, Any], key: str) -> Any:
    return recipe.get(key.format(framework=recipe.get("framework", "")))


def _check(where: str, setting: Setting, ours: str) -> None:
    if bool(setting.key) == bool(setting.fixed):
        raise ConfigError(f"{where}: expected a key, or why there is none ('fixed')")
    printed = _printed(setting.value)
    differs = ours.lower() != printed.lower()
    if ours == NO_RECIPE or differs == bool(setting.departure):
        return
    if differs:
        raise ConfigError(f"{where}: the recipe has {ours}, the paper {printed}, and no 'departure' says why")
    raise ConfigError(f"{where}: a 'departure' is named, but the recipe has the paper's {ours}")


def _printed(value: Any) -> str:
    return "/".join(_text(part) for part in value) if isinstance(value, list) else _text(value)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def sheet(name: str, frame: pd.DataFrame) -> Sheet:
    """The paper's layout: the columns of settings side by side, each a name, the published value and ours."""
    notes = Footnotes()
    blocks = [[_line(row, notes) for _, row in rows.iterrows()] for _, rows in frame.groupby("column", sort=False)]
    body = [list(itertools.chain(*line)) for line in itertools.zip_longest(*blocks, fillvalue=["", "", ""])]
    columns = [(group, head) for group in frame["column"].unique() for head in ("hparam", "published", "ours")]
    legend = ["Ours: the values of the recipes in pretrain/configs and eval/configs; a footnote where they differ."]
    return Sheet(name, _file(name)["title"], columns, body, notes, legend)


def _line(row: pd.Series, notes: Footnotes) -> list[str]:
    return [row["hparam"], row["published"], row["ours"] + notes.marks([row["note"]])]


def csv(frame: pd.DataFrame) -> str:
    return frame.to_csv(index=False, lineterminator="\n")
