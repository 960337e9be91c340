"""Tables of numbers and of settings as HTML: the published value beside ours, a word and a colour for what it means."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
from markupsafe import Markup

from paper import comparisons
from paper.cells import Heading, Table
from paper.collect import NO_RUN, NOT_IMPLEMENTED, PUBLIC_ONLY, UNREADABLE
from paper.markup import Footnotes, Sheet
from paper.presets import presets
from paper.report.records import Runs
from paper.report.render import render

# What a number can be, in the order in which the summary counts them; colours in style.css.
STATES = {
    "agrees": "agrees",
    "differs": "differs",
    "undecided": "undecided",
    "incomparable": "not comparable",
    "absent": "not run",
    "public": "public checkpoint, not run",
    "unbuilt": "not implemented",
    "unreadable": "unreadable result",
    "ours": "ours alone",
}
WITHOUT_NUMBER = {NO_RUN: "absent", PUBLIC_ONLY: "public", NOT_IMPLEMENTED: "unbuilt", UNREADABLE: "unreadable"}
MEANING = {
    "agrees": "the published value fits our seeds, and a difference of one point would have been seen",
    "differs": "it does not: the 95 % interval of the difference leaves out zero, as it does by chance once in 20",
    "undecided": "one seed, or too few for their noise to see a difference of one point",
    "incomparable": "a run of another budget (smoke: embedded photographs, a small net): never a replication",
    "ours": "besides: numbers of ours where the paper prints none",
    "absent": "no finished run",
    "public": "the method is not implemented here; its authors' checkpoint can be measured",
    "unbuilt": "the method is not implemented here",
    "unreadable": "the result of a run is damaged; the reason stands behind the number",
}


def state(cell: pd.Series) -> str:
    """A key of STATES."""
    if not cell["n"]:
        return WITHOUT_NUMBER[cell["state"]]
    if pd.isna(cell["published"]):
        return "ours"
    return cell["word"] or "incomparable"


def count(frames: Iterable[pd.DataFrame]) -> Counter[str]:
    """How many of the numbers that the paper prints are in each state; `ours`: how many of ours stand by themselves."""
    cells = [cell for frame in frames for _, cell in frame.iterrows()]
    return Counter(state(cell) for cell in cells if pd.notna(cell["published"]) or cell["n"])


def ours(cell: pd.Series) -> str:
    """`69.0 ± 0.3`."""
    return f"{cell['ours_mean']:.1f}" + (f" ± {cell['ours_std']:.1f}" if cell["n"] > 1 else "")


def words(cell: pd.Series) -> str:
    """What the badge says."""
    kind = state(cell)
    if kind == "ours" and cell["against"]:
        return f"{cell['preset']}: {comparisons.words(cell)} from {cell['against']}"
    if kind == "incomparable" or (kind == "ours" and cell["preset"] != "paper"):
        return f"{STATES[kind]} ({cell['preset']})"
    return comparisons.words(cell) or STATES[kind]


# ------------------------------------------------------------------------------------------------------- tables


def table(source: Table, frame: pd.DataFrame, runs: Runs) -> Markup:
    """The paper's layout in a box that scrolls, its footnotes, and what is behind each number."""
    notes, cells = Footnotes(), {(cell["row"], cell["column"]): cell for _, cell in frame.iterrows()}
    rows, group = [], ""
    for row in source.rows:
        if row.group != group:
            group = row.group
            rows.append(group)
        rows.append(_row(row, [cells.get((row.label, column.label)) for column in source.columns], notes))
    return render(
        "table.html",
        source=source,
        heads=_heads([(column.group, column.name) for column in [Heading(""), *source.columns]]),
        width=len(source.columns) + 1,
        rows=rows,
        notes=notes,
        metrics=list(dict.fromkeys(frame["metric"])),
        legend=_legend(source, frame),
        behind=[_behind(cell, runs) for _, cell in frame.iterrows()],
    )


def _legend(source: Table, frame: pd.DataFrame) -> list[str]:
    """How the verdicts are reached, and what each preset that occurs means."""
    used = [name for name in presets() if any(frame["preset"].str.split(",").str[0] == name)]
    spread = ["Ours: mean ± standard deviation over n seeds."] if any(frame["n"] > 1) else []
    return [*spread, *comparisons.legend(source, frame), *(f"Preset {name}: {presets()[name].about}." for name in used)]


def _row(row: Heading, cells: Sequence[pd.Series | None], notes: Footnotes) -> dict[str, Any]:
    name = row.name + notes.marks(cell["note"] for cell in cells if cell is not None)
    return {"name": name, "cells": [None if cell is None else _number(cell, notes) for cell in cells]}


def _number(cell: pd.Series, notes: Footnotes) -> dict[str, Any]:
    mark = notes.marks([_origin(cell)])
    return {
        **_shown(cell),
        "published": f"{cell['published']:.1f}{mark}" if pd.notna(cell["published"]) else "",
        "ours": ours(cell) + notes.marks([cell["remark"]]) if cell["n"] else "",
        "size": f"n = {cell['n']}" + (f", {_epochs(cell)}" if _epochs(cell) else "") if cell["n"] else "",
    }


def _shown(cell: pd.Series) -> dict[str, str]:
    return {"id": cell["cell"], "state": state(cell), "words": words(cell), "searchable": searchable(cell)}


def _epochs(cell: pd.Series) -> str:
    """Of our pre-training; nothing where there is none, or none of ours."""
    return f"{cell['epochs']:.0f} epochs" if pd.notna(cell["epochs"]) else ""


def _origin(cell: pd.Series) -> str:
    return "" if cell["origin"] in ("own", "") else f"published value {cell['origin']}: {cell['source']}"


def searchable(cell: pd.Series) -> str:
    """All that the search box looks at; `is:published` and `is:agrees` (or another state) are exact."""
    exact = f"is:{state(cell)}" + (" is:published" if pd.notna(cell["published"]) else "")
    place = [cell["cell"], cell["row"], cell["column"], exact]
    return " ".join([*place, words(cell), cell["metric"], cell["preset"], cell["runs"]]).lower()


def _behind(cell: pd.Series, runs: Runs) -> dict[str, Any]:
    """A number's provenance: what it is, and the runs that it comes from."""
    facts = {
        "cell": cell["cell"],
        "published": f"{cell['published']:.1f}" if pd.notna(cell["published"]) else "nothing",
        "origin": _origin(cell),
        "ours": f"{ours(cell)} (preset {cell['preset']}, n = {cell['n']})" if cell["n"] else words(cell),
        "difference": comparisons.words(cell),
        "95 % interval": f"{cell['low']:+.1f} to {cell['high']:+.1f}" if pd.notna(cell["low"]) else "",
        "to decide": cell["to_decide"],
        "metric": cell["metric"],
        "pre-training": _epochs(cell),
        "note": "; ".join(filter(None, [cell["note"], cell["remark"]])),
        "launch": f"python slurm/launch.py {cell['cell']}" if cell["state"] != NOT_IMPLEMENTED else "",
    }
    names = dict.fromkeys(itertools.chain.from_iterable(map(runs.chain, cell["runs"].split())))
    shown = {name: value for name, value in facts.items() if value}
    return {**_shown(cell), "title": f"{cell['row']} · {cell['column']}", "facts": shown, "runs": list(names)}


def sheet(source: Sheet) -> Markup:
    """A table of settings, or of claims."""
    notes, legend = source.footnotes, source.legend
    return render("settings.html", heads=_heads(source.columns), body=source.body, notes=notes, legend=legend)


def _heads(columns: Sequence[tuple[str, str]]) -> dict[str, list]:
    """The columns' names, under their groups where there are any."""
    groups = [(group, len(list(part))) for group, part in itertools.groupby(group for group, _ in columns)]
    named = any(group for group, _ in groups)
    return {"groups": groups if named else [], "names": [name for _, name in columns]}
