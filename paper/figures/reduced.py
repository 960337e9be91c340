"""Reduced scale, methods: training loss and k-NN accuracy by epoch, every method; not a figure of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from mixmask.registry import METHODS
from paper.figures.curves import by_epoch, finish, plot, read
from paper.figures.style import WIDTH
from paper.presets import Budget

TARGETS = ["reduced/knn/*"]
PANELS = {"loss": "training loss, all terms", "knn": "k-NN accuracy (%)"}


def draw(budgets: Sequence[Budget], folders: Sequence[Path]) -> Figure:
    """On the left the loss, all its terms together (their number differs by method), on the right the accuracy."""
    logs = read(TARGETS, budgets, folders)
    (framework,) = logs.frameworks
    figure, row = plt.subplots(1, 2, figsize=(WIDTH, 2.8), layout="constrained")
    absent = []
    for method, lines in logs.curves(framework):
        for axes, value in zip(row, PANELS, strict=True):
            plot(axes, by_epoch(lines, value), METHODS[method])
        if lines.empty:
            absent.append(METHODS[method].title)
    for axes, label in zip(row, PANELS.values(), strict=True):
        axes.set(xlabel="epoch", ylabel=label)
    finish(figure, logs, absent)
    return figure
