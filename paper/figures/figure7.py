"""Figure 7: training loss and k-NN accuracy by epoch on CIFAR-100, vanilla against MixMask in every framework."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from mixmask.registry import FRAMEWORKS, METHODS
from paper.figures.curves import by_epoch, finish, plot, read
from paper.figures.style import WIDTH
from paper.presets import Budget

ROWS = {"loss": "training loss", "knn": "k-NN accuracy (%)"}


def draw(budgets: Sequence[Budget], folders: Sequence[Path]) -> Figure:
    """A column for each framework: above the loss, all its terms together, below the k-NN accuracy."""
    logs = read(["figure7"], budgets, folders)
    names = logs.frameworks
    figure, grid = plt.subplots(2, len(names), figsize=(WIDTH, 3.5), layout="constrained", sharex="col", squeeze=False)
    absent, unfinished = [], []
    for framework, column in zip(names, grid.T, strict=True):
        for method, lines in logs.curves(framework):
            here = lines[lines["stage"] == "pretrain"]
            for axes, value in zip(column, ROWS, strict=True):
                plot(axes, by_epoch(here, value), METHODS[method])
            name = f"{FRAMEWORKS[framework].title} {METHODS[method].title}"
            last, epochs = here["epoch"].max(), here["epochs"].max()
            if here.empty:
                absent.append(name)
            elif last < epochs:
                unfinished.append(f"{name} (epoch {last} of {epochs})")
        column[0].set_title(FRAMEWORKS[framework].title)
        column[1].set_xlabel("epoch")
    for axes, label in zip(grid[:, 0], ROWS.values(), strict=True):
        axes.set_ylabel(label)
    figure.align_ylabels(grid[:, 0])
    finish(figure, logs, absent, unfinished)
    return figure
