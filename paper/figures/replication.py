"""The replication at a glance: every published number against ours, with the 95 % interval of the difference."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from paper.cells import Table, tables
from paper.collect import collect
from paper.figures.style import ACCENT, GREY, SMALL
from paper.presets import Budget

COLUMNS = (("table1", "table2"), ("table3", "table4", "table5", "table6"), ("table7",))  # as many lines in each
LINE = 0.165  # inches
WIDTH = 12.0
LEAST, MOST = 2.0, 10.0  # points that the axis shows to either side; what is beyond stands at its edge, with a number


@dataclass(frozen=True)
class Look:
    """How a verdict is drawn: by shape and filling, too, for those who see no colour."""

    label: str
    color: str
    marker: str
    filled: bool = True


LOOKS = {
    "agrees": Look("agrees", "#1b6b3a", "o"),
    "differs": Look("differs", ACCENT, "D"),
    "undecided": Look("undecided", "#123a63", "s", filled=False),
    "": Look("not run", "#b5b5b5", "o", filled=False),
}


def draw(budgets: Sequence[Budget], folders: Sequence[Path]) -> Figure:
    """A line a number: ours less the published one, which stands behind the name."""
    shown = {name: tables()[name] for name in itertools.chain(*COLUMNS)}
    frames = {name: collect(table, budgets, folders) for name, table in shown.items()}
    lines = [[line for name in column for line in _lines(shown[name], frames[name])] for column in COLUMNS]
    most = max(map(len, lines))
    size = WIDTH, LINE * most + 1.0
    figure, row = plt.subplots(1, len(COLUMNS), figsize=size, gridspec_kw={"wspace": 1.1})
    figure.subplots_adjust(left=0.16, right=0.99, top=1 - 0.55 / size[1], bottom=0.45 / size[1])
    limit = _limit(frames.values())
    for axes, column in zip(row, lines, strict=True):
        _forest(axes, column, most, limit)
    _legend(figure, frames.values())
    return figure


def _lines(table: Table, frame: pd.DataFrame) -> Iterator[str | pd.Series]:
    """A heading, and a line for each published number, column by column as one reads a claim about a data set."""
    yield table.title.partition(":")[0]
    for column in table.columns:
        for _, cell in frame[frame["column"] == column.label].iterrows():
            if pd.notna(cell["published"]):
                yield cell


def _limit(frames) -> float:
    """The same for all tables: the farthest end of an interval, rounded up."""
    ends = [abs(value) for frame in frames for value in frame[["difference", "low", "high"]].to_numpy().ravel()]
    return min(MOST, math.ceil(max([LEAST, *(end for end in ends if not math.isnan(end))])))


def _forest(axes: Axes, lines: Sequence[str | pd.Series], most: int, limit: float) -> None:
    axes.set(xlim=(-limit * 1.08, limit * 1.08), ylim=(most - 0.4, -0.6), yticks=[])
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
    axes.vlines(0, -0.6, len(lines) - 0.4, color=GREY, linewidth=0.8, zorder=1)
    for place, line in enumerate(lines):
        if isinstance(line, str):
            _name(axes, place, line, "", weight="bold")
        else:
            row = line["row"].rpartition(": ")[2].replace("our reconstruction", "rebuilt")
            _name(axes, place, f"{line['column']}, {row}", f"{line['published']:.1f}")
            _mark(axes, place, line, limit)
    axes.set_xlabel("ours less published (points)", fontsize=SMALL + 0.5)


def _name(axes: Axes, place: int, name: str, value: str, **look: str) -> None:
    text = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": SMALL, "clip_on": False, **look}
    axes.text(-0.15, place, name, ha="right", **text)
    axes.text(-0.02, place, value, ha="right", color=GREY, **text)


def _mark(axes: Axes, place: int, cell: pd.Series, limit: float) -> None:
    """The difference and its interval; a hollow mark on the line of no difference where there is no number of ours."""
    look, value = LOOKS[cell["word"]], cell["difference"]
    if pd.isna(value):
        axes.plot(0, place, look.marker, markersize=3.2, color=look.color, markerfacecolor="white", zorder=2)
        return
    if pd.notna(cell["low"]):
        low, high = max(cell["low"], -limit), min(cell["high"], limit)
        axes.hlines(place, low, high, color=look.color, linewidth=1.1, zorder=2)
    face = look.color if look.filled else "white"
    shown = min(max(value, -limit), limit)
    axes.plot(shown, place, look.marker, markersize=3.6, color=look.color, markerfacecolor=face)
    if abs(value) > limit:
        arrow, side = (f"← {value:+.1f}", "left") if value < 0 else (f"{value:+.1f} →", "right")
        axes.text(0.94 * shown, place, arrow, fontsize=SMALL, va="center", ha=side, color=look.color)


def _legend(figure: Figure, frames) -> None:
    """How many numbers are of each kind."""
    counts = Counter(cell["word"] for frame in frames for _, cell in frame.iterrows() if pd.notna(cell["published"]))
    marks = [
        Line2D([], [], color=look.color, marker=look.marker, linestyle="-" if word else "", linewidth=1.1)
        for word, look in LOOKS.items()
    ]
    for mark, look in zip(marks, LOOKS.values(), strict=True):
        mark.set(markersize=5, markerfacecolor=look.color if look.filled else "white")
    names = [f"{look.label}: {counts[word]}" for word, look in LOOKS.items()]
    title = f"{sum(counts.values())} published numbers (grey, behind each name) and ours, with 95 % intervals"
    figure.legend(marks, names, title=title, loc="upper center", ncols=len(names), bbox_to_anchor=(0.5, 1.0))
