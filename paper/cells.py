"""The paper's numbers as objects: `select(["table4"])` -> the cells of Table 4. The data is in paper/cells/*.yaml.

One file a table or figure. A new number is a new entry there: its id, where it stands in the paper's table, the
published value and where that comes from, and what has to be run for it. Nothing here imports torch.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mixmask.config import ConfigError, build, nearest, read_yaml

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number of the paper and the runs that replicate it."""

    id: str  # target/dataset/framework/method/..., unique
    row: str
    column: str
    published: float  # as printed; Top-1 and AP in percent
    origin: Literal["own", "cited", "unclear"]  # where the published value comes from
    source: str = ""  # of a value that is not the paper's own
    recipe: str  # pretrain/configs/<recipe>.yaml
    overrides: Mapping[str, Any]  # dotted keys of that recipe
    seeds: int  # 0, 1, ... seeds - 1
    metric: str  # full name, protocol included, in the result of the last stage
    evaluation: str = ""  # <stage>/<recipe in eval/configs>; empty: the metric is the pre-training's own
    note: str = ""  # what a reader of our number must know

    @property
    def target(self) -> str:
        return self.id.split("/")[0]


@dataclass(frozen=True)
class Table:
    """A table of the paper: its cells, and the order of its columns (rows come in the order of the cells)."""

    name: str
    title: str
    columns: tuple[str, ...]
    cells: tuple[Cell, ...]


@functools.cache
def tables() -> dict[str, Table]:
    """Every table that has a file in paper/cells, by name."""
    return {path.stem: _read(path) for path in sorted((ROOT / "paper" / "cells").glob("*.yaml"))}


def _read(path: Path) -> Table:
    values = read_yaml(path)
    cells = []
    for entry in values["cells"]:
        cell = build(Cell, {**values["common"], **entry}, f"{path.name}: {entry.get('id')}")
        if cell.target != path.stem or cell.column not in values["columns"]:
            raise ConfigError(f"{path}: {cell.id}: expected an id under {path.stem}/ and one of {values['columns']}")
        cells.append(cell)
    return Table(path.stem, values["title"], tuple(values["columns"]), tuple(cells))


def select(targets: Iterable[str]) -> list[Cell]:
    """The cells of `targets` (a table, a cell id, wildcards, `all`; none means all), each once, in the paper's order.

    Raises ConfigError, with the nearest name and the list, for a target that names nothing.
    """
    cells = [cell for table in tables().values() for cell in table.cells]
    wanted = set()
    for target in list(targets) or ["all"]:
        found = {c.id for c in cells if target in ("all", c.target) or fnmatch.fnmatchcase(c.id, target)}
        if not found:
            raise ConfigError(_unknown(target, [cell.id for cell in cells]))
        wanted |= found
    return [cell for cell in cells if cell.id in wanted]


def _unknown(target: str, ids: list[str]) -> str:
    names = [*tables(), "all"]
    hint = nearest(target, ids if "/" in target else names)
    return f"unknown target '{target}'{hint} (targets: {', '.join(names)}; a cell such as {ids[0]}; wildcards)"
