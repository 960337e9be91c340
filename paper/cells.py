"""The paper's numbers as objects: `select(["table4"])` -> the cells of Table 4. The data is in paper/cells/*.yaml.

One file a table or figure, written as the table is: columns, rows, and in each row the published values. A cell is
what its file, its column, its row and the row's exception for that column say, the later over the earlier
(docs/cells.md). Nothing here imports torch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from mixmask.config import ConfigError, build, nearest, read_yaml, within

ROOT = Path(__file__).resolve().parents[1]

OURS = "ours"  # in place of a published value
LAYOUT = ("id", "name", "group", "published", "except")  # of a row or column; its other keys are its cells'

# Targets that need no run, and what makes them.
WITHOUT_RUNS = {
    **{f"table{n}": f"python paper/make_tables.py table{n}" for n in (8, 9, 10)},
    **{f"figure{n}": f"python paper/make_figures.py figure{n}" for n in (1, 2, 3, 4, 8)},
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number of the paper, or one curve, and the runs that replicate it."""

    id: str  # target/dataset/framework/method/..., unique
    row: str
    column: str
    published: float | None = None  # as printed; Top-1 and AP in percent; curves and cells of ours have none
    origin: Literal["own", "cited", "unclear"] = "own"  # where the published value comes from
    source: str = ""  # of a value that is not the paper's own
    published_runs: int = within(1, default=1)  # runs that it averages: 1 unless the paper, or the source, says more
    recipe: str = ""  # pretrain/configs/<recipe>.yaml; empty: the method is not implemented here
    checkpoint: str = ""  # paper/checkpoints.yaml: a public one that can take the pre-training's place
    overrides: Mapping[str, Any] = field(default_factory=dict)  # dotted keys of that recipe
    seeds: int  # of the pre-training: 0, 1, ... seeds - 1
    repeats: int = 1  # of the evaluation, for each pre-training
    metric: str  # full name, protocol included, in the result of the last stage
    evaluation: str = ""  # <stage>/<its recipe>; empty: the metric is the pre-training's own
    note: str = ""  # what a reader of our number must know
    scale: str = ""  # of a number that is not at the paper's scale: a word for it, such as `reduced`
    extra: bool = False  # at the paper's scale, but not a number of the paper: no part of `all`

    @property
    def target(self) -> str:
        return self.id.split("/")[0]


@dataclass(frozen=True)
class Heading:
    """Of a row or a column: its name, and the group that it stands under, if any."""

    name: str
    group: str = ""

    @property
    def label(self) -> str:
        return f"{self.group}: {self.name}" if self.group else self.name


@dataclass(frozen=True)
class Table:
    """A table (or figure) of the paper: its headings in the paper's order, and its cells, row by row."""

    name: str
    title: str
    columns: tuple[Heading, ...]
    rows: tuple[Heading, ...]
    cells: tuple[Cell, ...]
    scale: str = ""  # not the paper's: its cells are compared with its first row, and are no part of `all`
    about: str = ""  # what that scale is
    spread: str = "own"  # of a verdict: from a cell's own seeds, or `pooled` over the cells of one data set and metric


@functools.cache
def tables() -> dict[str, Table]:
    """Every table and figure that has a file in paper/cells, by name: table1 ..., figure5 ..., reduced ..."""
    order = {"t": 0, "f": 1}
    paths = (ROOT / "paper" / "cells").glob("*.yaml")
    paths = sorted(paths, key=lambda path: (order.get(path.stem[0], 2), len(path.stem), path.stem))
    return {path.stem: _read(path) for path in paths}


def _read(path: Path) -> Table:
    values = read_yaml(path)
    try:
        columns, rows = (tuple(_heading(entry) for entry in values[key]) for key in ("columns", "rows"))
        own = {key: values[key] for key in ("scale", "about", "spread") if key in values}
        if own.get("spread", "own") not in ("own", "pooled"):
            raise ConfigError(f"spread: expected own or pooled, found {own['spread']}")
        return Table(path.stem, values["title"], columns, rows, tuple(_cells(path.stem, values)), **own)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except KeyError as error:
        raise ConfigError(f"{path}: missing key {error}") from None


def _heading(entry: Mapping[str, Any]) -> Heading:
    return Heading(entry["name"], entry.get("group", ""))


def _cells(target: str, values: Mapping[str, Any]) -> Iterator[Cell]:
    """Row by row. `published` is a number, `ours` for a cell that the paper does not print, null for no cell."""
    columns, pattern = values["columns"], values.get("id", "{column}/{row}")
    common = {**values["common"], "scale": values.get("scale", "")}
    for row in values["rows"]:
        published = row.get("published", [OURS] * len(columns))
        if len(published) != len(columns):
            raise ConfigError(f"{row['id']}: {len(published)} published values for {len(columns)} columns")
        unknown = set(row.get("except", {})) - {column["id"] for column in columns}
        if unknown:
            raise ConfigError(f"{row['id']}: except: no column '{min(unknown)}'")
        for column, value in zip(columns, published, strict=True):
            if value is not None:
                name = f"{target}/{pattern.format(row=row['id'], column=column['id'])}"
                place = {"id": name, "row": _heading(row).label, "column": _heading(column).label, "published": value}
                yield _cell(place, common, column, row, row.get("except", {}).get(column["id"], {}))


def _cell(place: Mapping[str, Any], *parts: Mapping[str, Any]) -> Cell:
    """The later part over the earlier, key by key; so are their overrides."""
    values = {key: value for part in parts for key, value in part.items() if key not in LAYOUT}
    overrides = {key: value for part in parts for key, value in part.get("overrides", {}).items()}
    given = {key: value for key, value in place.items() if value != OURS}
    return build(Cell, {**values, **given, "overrides": overrides}, place["id"])


def select(targets: Iterable[str]) -> list[Cell]:
    """The cells of `targets` (a table, a figure, a cell id, wildcards, `all`; none means all), each once, in order.

    `all` is all of the paper: what is at another scale, or extra, is named. A target of WITHOUT_RUNS has none. Raises
    ConfigError, with the nearest name, for a target that names nothing.
    """
    cells = [cell for table in tables().values() for cell in table.cells]
    wanted = set()
    for target in list(targets) or ["all"]:
        fitting = {cell.id for cell in cells if _fits(cell, target)}
        if not fitting and target not in WITHOUT_RUNS:
            raise ConfigError(_unknown(target, [cell.id for cell in cells]))
        wanted |= fitting
    return [cell for cell in cells if cell.id in wanted]


def _fits(cell: Cell, target: str) -> bool:
    if target == "all":
        return not cell.scale and not cell.extra
    return fnmatchcase(cell.target, target) or fnmatchcase(cell.id, target)


def _unknown(target: str, ids: list[str]) -> str:
    names = [*tables(), *WITHOUT_RUNS, "all"]
    hint = nearest(target, ids if "/" in target else names)
    return f"unknown target '{target}'{hint} (targets: {', '.join(names)}; a cell such as {ids[0]}; wildcards)"
