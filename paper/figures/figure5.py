"""Figure 5: accuracy against the training budget on CIFAR-100; each point is a run with its own full schedule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from mixmask.registry import FRAMEWORKS, METHODS
from paper.figures.curves import Logs, finish, plot, read
from paper.figures.style import WIDTH
from paper.presets import Budget


def draw(budgets: Sequence[Budget], folders: Sequence[Path]) -> Figure:
    """A panel for each framework, vanilla against MixMask: k-NN for MoCo, the probe's Top-1 for the others."""
    logs = read(["figure5"], budgets, folders)
    figure, row = plt.subplots(1, len(logs.frameworks), figsize=(WIDTH, 2.6), layout="constrained", squeeze=False)
    for axes, framework in zip(row[0], logs.frameworks, strict=True):
        value = FRAMEWORKS[framework].metric
        for method, lines in logs.curves(framework):
            plot(axes, by_budget(lines, value), METHODS[method])
        name = "k-NN" if value == "knn" else "Top-1"
        axes.set(title=FRAMEWORKS[framework].title, xlabel="pre-training epochs", ylabel=f"{name} accuracy (%)")
    finish(figure, logs, absent(logs))
    for axes in row[0]:
        axes.set_xticks(sorted({epochs for *_, epochs in logs.wanted}) if axes.get_lines() else [])
    return figure


def by_budget(lines: pd.DataFrame, value: str) -> pd.DataFrame:
    """The last epoch of finished runs, mean and standard deviation over seeds, by epochs of the pre-training."""
    last = lines[lines["finished"] & (lines["epoch"] == lines["epochs"])].dropna(subset=value)
    return last.groupby("budget")[value].agg(["mean", "std"])


def absent(logs: Logs) -> list[str]:
    """The curves that lack points, and the budgets they lack: `MoCo vanilla (600, 800)`."""
    names = []
    for framework in logs.frameworks:
        value = FRAMEWORKS[framework].metric
        for method, lines in logs.curves(framework):
            asked = [epochs for *name, epochs in logs.wanted if name == [framework, method]]
            missing = [epochs for epochs in asked if epochs not in by_budget(lines, value).index]
            which = "" if missing == asked else f" ({', '.join(map(str, missing))})"
            names += [f"{FRAMEWORKS[framework].title} {METHODS[method].title}{which}"] if missing else []
    return names
