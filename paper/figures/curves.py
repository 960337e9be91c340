"""Run logs -> curves, for Figures 5, 6, 7 and two of our own. No torch here."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mixmask.registry import FRAMEWORKS, Method
from mixmask.runs import read_log, read_result
from paper.cells import Cell, select
from paper.figures.style import GREY, SMALL
from paper.presets import Budget, chains, label, located

RUN = ["row", "framework", "method", "budget", "seed", "stage", "epochs"]
COLUMNS = [*RUN, "finished", "epoch", "loss", "knn", "top1"]
UNBROKEN = "\N{NO-BREAK SPACE}"  # a line never ends inside of a name


@dataclass(frozen=True)
class Logs:
    """What a figure asks for, and what has been logged of it, under one preset."""

    wanted: list[tuple[str, str, int]]  # framework, method, epochs of the pre-training
    lines: pd.DataFrame  # one row a logged epoch of a run: COLUMNS; `epochs` is the length of that run's own stage
    label: str  # the preset's, or the cells' own scale
    kind: str  # which of the two
    replicates: bool  # whether it may stand for a figure of the paper

    @property
    def frameworks(self) -> list[str]:
        """In the paper's order."""
        return [name for name in FRAMEWORKS if name in {framework for framework, *_ in self.wanted}]

    def curves(self, framework: str) -> list[tuple[str, pd.DataFrame]]:
        """The methods of `framework`, each with its lines; none where it has no run."""
        methods = dict.fromkeys(method for name, method, _ in self.wanted if name == framework)
        here = self.lines[self.lines["framework"] == framework]
        return [(method, here[here["method"] == method]) for method in methods]


def read(targets: Sequence[str], budgets: Iterable[Budget], folders: Sequence[Path]) -> Logs:
    """The logs of a figure's cells under the first of `budgets` that has any; one figure never mixes two presets."""
    cells = select(targets)
    logs_of = [_read(cells, budget, folders) for budget in budgets]
    return next((logs for logs in logs_of if len(logs.lines)), logs_of[0])


def _read(cells: Sequence[Cell], budget: Budget, folders: Sequence[Path]) -> Logs:
    wanted, rows = {}, []
    for cell in cells:
        for chain in chains(cell, budget):
            config = chain[0].config
            name = config.framework, config.method, config.epochs
            wanted[name] = None
            for step in chain:
                run = (cell.row, *name, config.seed, step.stage, step.config.epochs)
                rows += [(*run, *line) for line in _epochs(located(folders, step))]
    lines = pd.DataFrame(rows, columns=COLUMNS).drop_duplicates()
    shown = label(cells[0], budget)
    kind = "preset" if shown == budget.label else "scale"
    return Logs(list(wanted), lines, shown, kind, budget.replicates and kind == "preset")


def _epochs(run: Path) -> list[tuple[Any, ...]]:
    """(finished, epoch, loss, k-NN, probe's Top-1) of each logged epoch; None where the log has no such number."""
    finished = read_result(run) is not None
    lines = [line for line in read_log(run) if line["kind"] == "epoch"]
    knn = next((key for line in lines for key in line if key.startswith("knn_")), "knn")
    return [(finished, line["epoch"], line.get("loss"), line.get(knn), line.get("test_top1")) for line in lines]


def by_epoch(lines: pd.DataFrame, value: str) -> pd.DataFrame:
    """Mean and standard deviation over seeds, at the epochs that every seed has logged: columns mean, std."""
    seeds = lines.dropna(subset=value).pivot_table(index="epoch", columns="seed", values=value).dropna()
    return pd.DataFrame({"mean": seeds.mean(axis=1), "std": seeds.std(axis=1)})


def plot(axes: Axes, curve: pd.DataFrame, line: Method) -> None:
    """Mean against the index, a marker at every eighth of the way, one standard deviation as a band."""
    if curve.empty:
        return
    x = curve.index.to_numpy(float)
    every = max(1, len(curve) // 8)
    look = {"color": line.color, "linestyle": line.linestyle, "marker": line.marker}
    axes.plot(x, curve["mean"].to_numpy(float), label=line.title, markevery=(-1 % every, every), **look)
    spread = curve["std"].fillna(0).to_numpy(float)
    axes.fill_between(x, curve["mean"] - spread, curve["mean"] + spread, color=line.color, alpha=0.2, linewidth=0)


def finish(
    figure: Figure, logs: Logs, absent: Sequence[str], unfinished: Sequence[str] = (), columns: int | None = None
) -> None:
    """The legend (None: one line), the preset, and the names of the curves that are not there, or not all there."""
    lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    if lines:
        title = None if logs.replicates else f"{logs.label}: not a replication"
        look = {"loc": "outside upper center", "ncols": columns or len(lines), "handlelength": 3}
        figure.legend(lines.values(), lines.keys(), title=title, title_fontproperties={"weight": "bold"}, **look)
    for axes in figure.axes:
        axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True, steps=[1, 2, 5, 10]))
        if not axes.get_lines():
            axes.text(0.5, 0.5, "no run yet", transform=axes.transAxes, ha="center", va="center", color=GREY)
            axes.set(xticks=[], yticks=[])
    notes = [_origin(logs), _named("no run yet", absent), _named("unfinished", unfinished)]
    text = "\n".join(textwrap.fill(note, int(19 * figure.get_figwidth())) for note in notes if note)
    figure.supxlabel(text.replace(UNBROKEN, " "), fontsize=SMALL, x=0.01, ha="left")


def _origin(logs: Logs) -> str:
    """The preset, or the scale, and the number of seeds a curve."""
    if logs.lines.empty:
        return ""
    seeds = logs.lines.groupby(["row", "framework", "method", "budget"])["seed"].nunique()
    least, most = seeds.min(), seeds.max()
    number = f"n = {most}" if least == most else f"n = {least} to {most}"
    spread = ", mean and standard deviation over seeds" if most > 1 else ""
    return f"{logs.kind} {logs.label}{', the published budget' if logs.replicates else ''}; {number}{spread}"


def _named(state: str, names: Sequence[str]) -> str:
    return f"{state}: {'; '.join(name.replace(' ', UNBROKEN) for name in names)}" if names else ""
