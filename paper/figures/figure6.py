"""Figure 6: training loss and the probe's Top-1 on ImageNet-1K, MixMask against erase-based masking (MSCN)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from mixmask.registry import METHODS
from paper.figures.curves import by_epoch, finish, plot, read
from paper.figures.style import WIDTH
from paper.presets import Budget

PANELS = [  # stage, value, label of y, label of x
    ("pretrain", "loss", "training loss", "pre-training epoch"),
    ("linear", "top1", "Top-1 accuracy (%)", "epoch of the linear probe"),
]


def draw(budgets: Sequence[Budget], folders: Sequence[Path]) -> Figure:
    """Left the loss of each pre-training, right the test accuracy of the probe on its frozen encoder."""
    logs = read(["figure6"], budgets, folders)
    (framework,) = logs.frameworks
    figure, row = plt.subplots(1, 2, figsize=(WIDTH * 0.8, 2.5), layout="constrained")
    absent, unfinished = [], []
    for axes, (stage, value, quantity, x) in zip(row, PANELS, strict=True):
        for method, lines in logs.curves(framework):
            here = lines[lines["stage"] == stage]
            curve, name = by_epoch(here, value), f"{quantity.split(' (')[0]} of {METHODS[method].title}"
            plot(axes, curve, METHODS[method])
            if curve.empty:
                absent.append(name)
            elif curve.index[-1] < here["epochs"].iloc[0]:
                unfinished.append(f"{name} (epoch {curve.index[-1]} of {here['epochs'].iloc[0]})")
        axes.set(xlabel=x, ylabel=quantity)
    finish(figure, logs, absent, unfinished)
    return figure
